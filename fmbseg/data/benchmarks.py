"""The benchmarks of Table 1 in their official layouts under one folder, the data root; embedded and drawn benchmarks; folder data sets.

``torchvision.datasets`` has two of the six layouts (VOC, Cityscapes), no id maps, and does not say which file is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fmbseg import files
from fmbseg.data import fetch, images, label_spaces
from fmbseg.data.images import IGNORED
from fmbseg.data.label_spaces import LabelSpace, label_space
from fmbseg.data.samples import Dataset, Sample, Table, lookup, read_index, read_instances, read_panoptic, shifted
from fmbseg.errors import DataError, ImageError, ParameterError


@dataclass(frozen=True)
class Layout:
    """Where an official data set lies under the data root; its fields are explained in ``assets/layouts.yaml``."""

    folder: str
    images: int
    parts: Mapping[str, str]
    pattern: str
    source: str
    other: str = ""
    suffix: str = ".png"

    def base(self, root: Path) -> Path:
        """Its top folder under the data root: ``folder`` or ``other``, whichever is complete; ``folder`` where neither is."""
        names = [name for name in (self.folder, self.other) if name]
        whole = (root / name for name in names if all((root / name / path).exists() for path in self.parts.values()))
        return next(whole, root / self.folder)

    def missing(self, root: Path) -> list[str]:
        """The parts that are not under the data root, as "masks VOCdevkit/..."."""
        return [f"{what} {self.folder}/{path}" for what, path in self.parts.items() if not (self.base(root) / path).exists()]

    def count(self, root: Path) -> int:
        """How many of its images are under the data root, in any split."""
        return sum(1 for _ in self.base(root).glob(self.pattern))

    def require(self, name: str, root: Path) -> Path:
        """Its folder under the data root. Raises DataError saying what is missing and its official source."""
        if missing := self.missing(root):
            raise DataError(f"{name}: not under {root}: {', '.join(missing)}; it comes as {self.source}")
        return self.base(root)


_ALL = {name: Layout(**values) for name, values in files.asset("layouts.yaml").items()}

LAYOUTS = {name: layout for name, layout in _ALL.items() if "masks" in layout.parts}
"""The columns of Table 1, CamVid (11 of Cityscapes' classes), and two benchmarks with hundreds of classes."""

UNLABELLED = {name: layout for name, layout in _ALL.items() if name not in LAYOUTS}
"""Unlabelled images to train on: COCO-Stuff train, as in the paper, and all images of VOC."""


def pair(paths: Sequence[Path], mask_of: Callable[[Path], Path], table: Table) -> list[Sample]:
    """Samples of images with their masks; table: raw id of a mask -> class.

    A missing mask is an error when it is read. Raises DataError at once where more than half are missing: then they are
    elsewhere.
    """
    masks = [mask_of(path) for path in paths]
    if 2 * len(missing := [(p, m) for p, m in zip(paths, masks) if not m.is_file()]) > len(paths):
        path, mask = missing[0]
        raise DataError(f"{path.name}: has no mask at {mask}, nor have {len(missing) - 1} more of {len(paths)} images; put them there")
    return [Sample(p.stem, p, functools.partial(read_index, m, table, p), m) for p, m in zip(paths, masks)]


def _of_split(base: Path, split: str) -> list[Path]:
    """The images of a VOC split file, in its order. Raises DataError where more than half are not there."""
    stems = [stem for line in label_spaces.read_words(base / split) for stem in line.split()]
    found = [base / "JPEGImages" / f"{stem}.jpg" for stem in stems]
    if 2 * len(missing := [path for path in found if not path.is_file()]) > len(found):
        raise DataError(f"{base / split}: the split names {len(missing)} images of {len(found)} that are not there, such as {missing[0]}")
    return found


def _table(name: str, base: Path, space: LabelSpace) -> Table:
    """Raw id of a mask -> class, for one of LAYOUTS."""
    id_maps = files.asset("label_spaces.json")["id_maps"]
    if name == "cityscapes19":
        return lookup(id_maps["cityscapes19_ids"], known=range(34))
    if name == "camvid11":  # its classes.txt has CamVid's spelling of the classes, in any order
        spelled = id_maps["camvid11_names"]
        given = label_spaces.read_words(base / "classes.txt", numbered=True)
        if unknown := [word for word in given if label_spaces.normal(word) not in spelled]:
            raise DataError(f"{base / 'classes.txt'}: {unknown[0]!r} is no class of CamVid's 11; they are {', '.join(spelled)}")
        return lookup({raw: space.names.index(spelled[label_spaces.normal(word)]) for raw, word in enumerate(given)})
    if name.startswith("coco_"):
        raw_ids = id_maps["coco_stuff171_raw"]
        if name != "coco_stuff171":  # things -> 1..80, stuff and unlabelled -> 0; without background: things -> 0..79, the rest is ignored
            stuff = 0 if space.background else IGNORED
            raw_ids = {raw: index + space.background if index < 80 else stuff for raw, index in raw_ids.items()}
            raw_ids[IGNORED] = stuff
        return lookup(raw_ids, known=range(182))
    from_zero = space.background or LAYOUTS[name].suffix == ".tif"
    return lookup({index: index for index in range(len(space))}) if from_zero else shifted(len(space))


def read(name: str, root: Path, space: LabelSpace) -> list[Sample]:
    """Samples of one of LAYOUTS. Raises DataError saying what is missing and its official source."""
    layout = LAYOUTS[name]
    base, parts = layout.require(name, root), layout.parts
    if "split" in parts:
        paths = _of_split(base, parts["split"])
    elif "classes" in parts:
        paths = images.find_images(base / parts["images"])
    elif not (paths := sorted(base.glob(layout.pattern))):
        raise DataError(f"{name}: no image found at {base / layout.pattern}; the layout is not the official one")

    def mask_of(path: Path) -> Path:
        folder = base / parts["masks"] / (path.parent.name if name == "cityscapes19" else "")
        return folder / f"{path.stem.replace('_leftImg8bit', '_gtFine_labelIds')}{layout.suffix}"

    if layout.suffix == ".tif":
        paths = [path for path in paths if mask_of(path).is_file()]
    return pair(paths, mask_of, _table(name, base, space))


# ---------------------------------------------------------------- without a data root

EMBEDDED = ("embedded_coco_object80", "embedded_coco_object81", "embedded_coco_panoptic133")


def _class_of(category: int, space: LabelSpace) -> int | None:
    """Class of a COCO category in the 133 panoptic classes, or in the things with or without background; None where it has none."""
    ids = files.asset("label_spaces.json")["id_maps"]
    if space.name == "coco_panoptic133":
        return ids["coco_panoptic133_ids"].index(category)
    thing = ids["coco_object81_ids"].get(str(category))
    return thing - (not space.background) if thing is not None else 0 if space.background else None


def _embedded_panoptic(space: LabelSpace) -> list[Sample]:
    """The 20 images with full panoptic truth."""
    folder = fetch.require("coco_panoptic_20")
    described = files.read_json(folder / "panoptic.json")
    names = {image["id"]: Path(image["file_name"]).name for image in described["images"]}
    samples = []
    for annotation in sorted(described["annotations"], key=lambda a: a["image_id"]):
        classes = ((one["id"], _class_of(one["category_id"], space)) for one in annotation["segments_info"] if not one["iscrowd"])
        segments = tuple((segment, index) for segment, index in classes if index is not None)
        path, mask = folder / "images" / names[annotation["image_id"]], folder / "masks" / Path(annotation["file_name"]).name
        samples.append(Sample(path.stem, path, functools.partial(read_panoptic, mask, segments)))
    return samples


def _embedded_instances(space: LabelSpace) -> list[Sample]:
    """The 10 images with instance outlines; pixels outside all outlines are background."""
    folder = fetch.require("coco_instances_10")
    described = files.read_json(folder / "instances_val2017_subset.json")
    samples = []
    for image in sorted(described["images"], key=lambda i: i["id"]):
        path = folder / "images" / image["file_name"]
        if path.is_file():
            own = tuple((_class_of(a["category_id"], space), a) for a in described["annotations"] if a["image_id"] == image["id"])
            size, rest = (image["height"], image["width"]), 0 if space.background else IGNORED
            samples.append(Sample(path.stem, path, functools.partial(read_instances, size, own, rest)))
    return samples


def _embedded(name: str) -> Dataset:
    """One of EMBEDDED. Raises WeightsError, naming the command that fetches the images, when they are not here."""
    space = label_space(name.removeprefix("embedded_"))
    samples = _embedded_panoptic(space)
    source = "20 COCO val2017 images with panoptic truth (embedded subset)"
    if space.name != "coco_panoptic133":
        samples += _embedded_instances(space)
        source = "30 COCO val2017 images (embedded subset: 20 panoptic, 10 instances)"
    return Dataset(name, space, tuple(samples), source)


def drawn() -> Dataset:
    """Six images with their truth, drawn here, for smoke runs, which fetch nothing."""
    folder = files.home() / "drawn"
    space = label_spaces.own_words(["sky", "grass", "sun", "house"], "drawn")
    samples = []
    for i in range(6):
        width, height = 160 + 16 * i, 128
        truth = np.zeros((height, width), dtype=np.int16)
        truth[80:] = 1
        rows, columns = np.mgrid[:height, :width]
        truth[(rows - 30) ** 2 + (columns - 30 - 15 * i) ** 2 < 300] = 2
        truth[50:100, width - 60 : width - 20] = 3
        colours = np.array([[120, 180, 240], [60, 150, 60], [250, 220, 60], [170, 80, 60]])
        noise = np.random.RandomState(i).randint(-25, 25, (height, width, 3))
        path = folder / f"drawn_{i}.png"
        if not path.is_file():
            with files.atomic_path(path) as part:
                Image.fromarray(np.clip(colours[truth] + noise, 0, 255).astype(np.uint8)).save(part, format="PNG")
        samples.append(Sample(path.stem, path, functools.partial(np.copy, truth)))
    return Dataset("drawn", space, tuple(samples), "6 drawn images (smoke run)")


# ---------------------------------------------------------------- any folder

BENCHMARKS = (*LAYOUTS, *EMBEDDED, "drawn")
FOLDER_PARTS = ("images", "masks", "classes.txt")

CHECKED = 200
"""How many masks of a folder data set, evenly spread, are checked when it is loaded."""


def folder_set(folder: Path) -> Dataset:
    """A folder of images/ID.jpg, masks/ID.png and classes.txt (line n names class n - 1; class 0 may be "background").

    Raises DataError for a missing part, a classes.txt that makes no sense, and masks that are coded in another way.
    """
    for part in FOLDER_PARTS:
        if not os.path.exists(folder / part):
            raise DataError(f"{folder}: has no {part}; a folder data set holds images/, masks/ and classes.txt (a class a line)")
    space = _folder_space(folder)
    paths = images.find_images(folder / "images")
    if repeated := sorted(stem for stem, count in Counter(path.stem for path in paths).items() if count > 1):
        raise DataError(f"{folder / 'images'}: several images are named {repeated[0]}; a mask belongs to one image, so rename them")
    samples = pair(paths, lambda p: folder / "masks" / f"{p.stem}.png", lookup({index: index for index in range(len(space))}))
    _check_coding(folder, space, [sample.mask for sample in samples[:: -(-len(samples) // CHECKED)]])
    return Dataset(folder.name, space, tuple(samples), str(folder.name))


def _folder_space(folder: Path) -> LabelSpace:
    path = folder / "classes.txt"
    words = label_spaces.read_words(path, numbered=True)
    try:
        space = label_spaces.own_words(words, str(path), lines=True)
    except ParameterError as error:
        raise DataError(str(error)) from error
    others = [k for k, word in enumerate(words) if label_spaces.is_background(word.partition(":")[0])]
    if others and others[-1] > 0:
        raise DataError(
            f"{path}: line {others[-1] + 1} is {words[others[-1]]!r}, which is class 0 or none; put it first, or name it otherwise"
        )
    names = ("background", *space.names[1:]) if others else space.names
    prompts = (("background",), *space.prompts[1:]) if others else space.prompts
    return LabelSpace(folder.name, names, prompts, space.palette, bool(others))


def _check_coding(folder: Path, space: LabelSpace, masks: Sequence[Path]) -> None:
    """Raise DataError where these masks are no index masks, count from 1, hold 0 and 255 alone, or hold ids without a class."""
    held, errors, undefined = set(), [], 0
    for mask in masks:
        try:
            found = np.flatnonzero(np.bincount(images.read_mask(mask).ravel() - IGNORED)) + IGNORED
        except ImageError as error:
            errors.append(error)
            continue
        held.update(found.tolist())
        undefined += found[-1] >= len(space)
    ids, read = held - {IGNORED}, len(masks) - len(errors)
    ignored = images.IGNORED_IN_FILES[8]
    if 2 * len(errors) > len(masks):
        raise DataError(f"{folder}: {len(errors)} of {len(masks)} masks looked at cannot be read, such as {errors[0]}")
    if ids and min(ids) > 0 and max(ids) == len(space):
        raise DataError(
            f"{folder}: its masks count from 1 (id {len(space)} occurs, 0 never), and line n of classes.txt names class n - 1;"
            " make every id one less, or put what id 0 means first in classes.txt"
        )
    if len(space) == 2 and ids == {0} and IGNORED in held:
        raise DataError(
            f"{folder}: its masks hold 0 and {ignored} alone, and {ignored} is ignored, so {space.names[1]!r} never counts; write 1 for {ignored}"
        )
    if 2 * undefined > read:
        raise DataError(
            f"{folder}: {undefined} of {read} masks looked at hold ids past {len(space) - 1}, such as {max(ids)}, and classes.txt has"
            f" {len(space)} lines; give every id its line, and {ignored} what is to be ignored"
        )


def unseen(dataset: Dataset, pixels: np.ndarray) -> str:
    """A warning about classes of a folder data set that no counted mask holds, as when masks count from 1; empty where there are none.

    pixels: (K,) number of pixels of each class in the truth.
    """
    absent = [name for name, n in zip(dataset.space.names, pixels) if n == 0]
    if dataset.name in BENCHMARKS or not absent:
        return ""
    named = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
    looks = "see that its ids do not count from 1" if pixels[0] else "id 0 never occurs, so its ids look counted from 1"
    return f"{dataset.name}: no counted mask holds {named}; {looks}, for line n of classes.txt names class n - 1"


def load_benchmark(name: str, data_root: str = "") -> Dataset:
    """A benchmark by name, an embedded one, or ``folder:NAME`` for a folder data set (under data_root, or any path).

    Raises ParameterError for an unknown name and DataError, with what is missing, when it is not there.
    """
    if name in EMBEDDED:
        return _embedded(name)
    if name == "drawn":
        return drawn()
    if name.startswith("folder:"):
        root, path = Path(data_root or ".").expanduser(), Path(name.removeprefix("folder:")).expanduser()
        own = f"folder:{path.relative_to(root) if path.is_relative_to(root) else path}"  # tells folders of the same base name apart
        return dataclasses.replace(folder_set(root / path), name=own, source=own)
    if name not in LAYOUTS:
        raise ParameterError(f"benchmark {name!r}: unknown; known are {', '.join(BENCHMARKS)}, and folder:PATH")
    layout = LAYOUTS[name]
    if not data_root:
        raise DataError(f"{name}: needs data_root, the folder that holds {layout.folder} in its official layout")
    space = label_space(name)
    samples = read(name, Path(data_root).expanduser(), space)
    return Dataset(name, space, tuple(samples), f"{len(samples)} of the official {layout.images} images, under data_root")
