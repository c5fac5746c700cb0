"""Photographs and benchmarks: the columns of Table 1 in their official layouts, the embedded sets, and any folder.

A benchmark's truth is read as (height, width) ``uint8`` class indices of its label space, 255 ignored.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fmbseg import images, storage, vocabulary, weights
from fmbseg.errors import DataError, ParameterError, WeightsError
from fmbseg.images import IGNORED
from fmbseg.truth import lookup, read_index, read_instances, read_panoptic, shifted
from fmbseg.vocabulary import LabelSpace, label_space


@dataclass(frozen=True)
class Sample:
    """A picture with a name that is unique in its set and, where there is one, a way to read its truth."""

    name: str
    image: Path
    truth: Callable[[], np.ndarray] | None = None

    def __str__(self) -> str:
        return str(self.image)


@dataclass(frozen=True)
class Dataset:
    """A benchmark: its column's label space, its samples and where they come from."""

    name: str
    space: LabelSpace
    samples: tuple[Sample, ...]
    source: str


# ---------------------------------------------------------------- the embedded sets


def _embedded_panoptic(space: LabelSpace) -> list[Sample]:
    """The 20 photographs with full panoptic truth, as 133 classes, or as things with or without background."""
    folder = weights.require("coco_panoptic_20")
    described = storage.read_json(folder / "panoptic.json")
    ids = vocabulary.assets()["id_maps"]["coco_panoptic133_ids"]
    things = vocabulary.assets()["id_maps"]["coco_object81_ids"]
    files = {image["id"]: image["file_name"] for image in described["images"]}
    samples = []
    for annotation in sorted(described["annotations"], key=lambda a: a["image_id"]):
        segments = []
        for segment in annotation["segments_info"]:
            category = segment["category_id"]
            if segment["iscrowd"]:
                continue
            if space.name == "coco_panoptic133":
                segments.append((segment["id"], ids.index(category)))
            elif str(category) in things:
                segments.append((segment["id"], things[str(category)] - (not space.background)))
            elif space.background:
                segments.append((segment["id"], 0))
        path = folder / "images" / Path(files[annotation["image_id"]]).name
        mask = folder / "masks" / Path(annotation["file_name"]).name
        samples.append(Sample(path.stem, path, functools.partial(read_panoptic, mask, tuple(segments))))
    return samples


def _embedded_instances(space: LabelSpace) -> list[Sample]:
    """The 10 photographs with instance outlines; what has no outline is background."""
    folder = weights.require("coco_instances_10")
    described = storage.read_json(folder / "instances_val2017_subset.json")
    things = vocabulary.assets()["id_maps"]["coco_object81_ids"]
    samples = []
    for image in sorted(described["images"], key=lambda i: i["id"]):
        path = folder / "images" / image["file_name"]
        if not path.is_file():
            continue
        outlines = tuple(
            (things[str(a["category_id"])] - (not space.background), a["segmentation"], a["area"], a["iscrowd"])
            for a in described["annotations"]
            if a["image_id"] == image["id"]
        )
        read = functools.partial(read_instances, (image["height"], image["width"]), outlines, 0 if space.background else IGNORED)
        samples.append(Sample(path.stem, path, read))
    return samples


def _embedded(name: str) -> Dataset:
    space = label_space(name.removeprefix("embedded_"))
    samples = _embedded_panoptic(space)
    source = "20 COCO val2017 photographs with panoptic truth (embedded subset)"
    if space.name != "coco_panoptic133":
        samples += _embedded_instances(space)
        source = "30 COCO val2017 photographs (embedded subset: 20 panoptic, 10 instances)"
    return Dataset(name, space, tuple(samples), source)


EMBEDDED = ("embedded_coco_object80", "embedded_coco_object81", "embedded_coco_panoptic133")


def _drawn() -> Dataset:
    """Six drawn pictures with their truth, made on the spot: for smoke runs, where nothing is fetched."""
    folder = storage.home() / "drawn"
    space = vocabulary.own_words(["sky", "grass", "sun", "house"], "drawn")
    samples = []
    for i in range(6):
        width, height = 160 + 16 * i, 128
        truth = np.zeros((height, width), dtype=np.uint8)
        truth[80:] = 1
        rows, columns = np.mgrid[:height, :width]
        truth[(rows - 30) ** 2 + (columns - 30 - 15 * i) ** 2 < 300] = 2
        truth[50:100, width - 60 : width - 20] = 3
        colours = np.array([[120, 180, 240], [60, 150, 60], [250, 220, 60], [170, 80, 60]])
        noise = np.random.RandomState(i).randint(-25, 25, (height, width, 3))
        path = folder / f"drawn_{i}.png"
        if not path.is_file():
            with storage.atomic_path(path) as part:
                Image.fromarray(np.clip(colours[truth] + noise, 0, 255).astype(np.uint8)).save(part, format="PNG")
        samples.append(Sample(path.stem, path, functools.partial(np.copy, truth)))
    return Dataset("drawn", space, tuple(samples), "6 drawn pictures (smoke run)")


# ---------------------------------------------------------------- the official layouts


def _pairs(root: Path, image_glob: str, mask_of: Callable[[Path], Path], stems: list[str] | None, table: tuple | None) -> list[Sample]:
    """Samples of a layout: every picture (of the split) with its mask; a missing mask is an error."""
    found = sorted(root.glob(image_glob))
    if stems is not None:
        by_stem = {path.stem: path for path in found}
        missing = [stem for stem in stems if stem not in by_stem]
        if missing:
            raise DataError(f"{root}: the split names {len(missing)} pictures that are not there, such as {missing[0]}")
        found = [by_stem[stem] for stem in stems]
    samples = []
    for path in found:
        mask = mask_of(path)
        if not mask.is_file():
            raise DataError(f"{path.name}: has no mask at {mask}; every picture of the split needs one")
        samples.append(Sample(path.stem, path, functools.partial(read_index, mask, table)))
    return samples


def _voc(root: Path, space: LabelSpace) -> list[Sample]:
    base = root / "VOCdevkit/VOC2012"
    stems = (base / "ImageSets/Segmentation/val.txt").read_text().split()
    table = None if space.background else shifted(20)
    return _pairs(base, "JPEGImages/*.jpg", lambda p: base / "SegmentationClass" / f"{p.stem}.png", stems, table)


def _context(root: Path, space: LabelSpace) -> list[Sample]:
    base = root / "VOCdevkit/VOC2010"
    stems = (base / "ImageSets/SegmentationContext/val.txt").read_text().split()
    table = None if space.background else shifted(59)
    return _pairs(base, "JPEGImages/*.jpg", lambda p: base / "SegmentationClassContext" / f"{p.stem}.png", stems, table)


def _coco(root: Path, space: LabelSpace) -> list[Sample]:
    base = root / "coco"
    table = lookup(vocabulary.assets()["id_maps"]["coco_stuff171_raw"])
    if space.name != "coco_stuff171":  # things -> 1..80, stuff -> 0; without background: 0..79 and ignored
        stuff = 0 if space.background else IGNORED
        things = np.where(table < 80, table + int(space.background), stuff).astype(np.uint8)
        table = np.where(table == IGNORED, IGNORED, things)
    return _pairs(base, "images/val2017/*.jpg", lambda p: base / "annotations/val2017" / f"{p.stem}.png", None, tuple(table.tolist()))


def _ade(root: Path, space: LabelSpace) -> list[Sample]:
    base = root / "ADEChallengeData2016"
    masks = base / "annotations/validation"
    return _pairs(base, "images/validation/*.jpg", lambda p: masks / f"{p.stem}.png", None, shifted(150))


def _cityscapes(root: Path, space: LabelSpace) -> list[Sample]:
    base = root / "cityscapes"

    def mask_of(path: Path) -> Path:
        return base / "gtFine/val" / path.parent.name / f"{path.stem.removesuffix('_leftImg8bit')}_gtFine_labelIds.png"

    table = tuple(lookup(vocabulary.assets()["id_maps"]["cityscapes19_ids"]).tolist())
    return _pairs(base, "leftImg8bit/val/*/*_leftImg8bit.png", mask_of, None, table)


_LAYOUTS: dict[str, tuple[str, Callable[[Path, LabelSpace], list[Sample]]]] = {
    "voc21": ("VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", _voc),
    "voc20": ("VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", _voc),
    "context60": ("VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt", _context),
    "context59": ("VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt", _context),
    "coco_object81": ("coco/annotations/val2017", _coco),
    "coco_object80": ("coco/annotations/val2017", _coco),
    "coco_stuff171": ("coco/annotations/val2017", _coco),
    "cityscapes19": ("cityscapes/gtFine/val", _cityscapes),
    "ade150": ("ADEChallengeData2016/annotations/validation", _ade),
}
BENCHMARKS = (*_LAYOUTS, *EMBEDDED, "drawn")


def _folder(folder: Path) -> Dataset:
    """images/ID.jpg, masks/ID.png and classes.txt (line n is class n); "background" as class 0 is background."""
    for part in ("images", "masks", "classes.txt"):
        if not (folder / part).exists():
            raise DataError(f"{folder}: has no {part}; a folder data set holds images/, masks/ and classes.txt (a class a line)")
    space = vocabulary.own_words((folder / "classes.txt").read_text(encoding="utf-8").splitlines(), folder.name)
    if space.names[0] == "background":
        space = LabelSpace(space.name, space.names, space.prompts, space.palette, True)
    found = images.find_images(folder / "images")
    samples = _pairs(folder / "images", "*", lambda p: folder / "masks" / f"{p.stem}.png", [p.stem for p in found], None)
    return Dataset(folder.name, space, tuple(samples), str(folder.name))


def load_benchmark(name: str, data_root: str = "") -> Dataset:
    """A benchmark by name, an embedded one, or ``folder:NAME`` for a folder data set (under data_root, or any path).

    Raises ParameterError for an unknown name and DataError, with what is missing, when it is not there.
    """
    if name in EMBEDDED:
        return _embedded(name)
    if name == "drawn":
        return _drawn()
    if name.startswith("folder:"):
        path = Path(name.removeprefix("folder:")).expanduser()
        return _folder(path if path.is_absolute() else Path(data_root or ".").expanduser() / path)
    if name not in _LAYOUTS:
        raise ParameterError(f"benchmark {name!r}: unknown; known are {', '.join(BENCHMARKS)}, and folder:PATH")
    needed, read = _LAYOUTS[name]
    if not data_root:
        raise DataError(f"{name}: needs data_root, the folder that holds {needed.split('/')[0]}/ in its official layout")
    root = Path(data_root).expanduser()
    if not (root / needed).exists():
        raise DataError(f"{name}: {root / needed} is not there; put the official data set under data_root")
    space = label_space(name)
    samples = read(root, space)
    if not samples:
        raise DataError(f"{name}: no picture found under {root}; the layout is not the official one")
    return Dataset(name, space, tuple(samples), f"{len(samples)} images under data_root")


# ---------------------------------------------------------------- unlabelled photographs

POOL = ("pool_objects_scenes", "pool_coco_45", "pool_pets_streets")


def load_collection(name: str, data_root: str = "", evaluation: Sequence[str] | None = None) -> list[Sample]:
    """Unlabelled photographs: ``embedded_pool`` (255), ``embedded_objects`` (155 of them), ``coco_stuff_train``, ``drawn``, or any folder of pictures.

    A photograph that is also in an evaluation set that is here (same bytes or same file name) is left out.
    """
    if name == "drawn":
        return [Sample(s.name, s.image) for s in _drawn().samples]
    if name in ("embedded_pool", "embedded_objects"):
        found = [path for pool in POOL for path in images.find_images(weights.require(pool))]
        root = weights.require(POOL[0]).parent
        if name == "embedded_objects":  # 100 photographs of one town's streets and parks hold few kinds of things
            found = [path for path in found if path.parent.name != "enhancement"]
    else:
        root = Path(data_root).expanduser() / "coco/images/train2017" if name == "coco_stuff_train" else Path(name).expanduser()
        found = images.find_images(root)
    stems, hashes = _evaluation_pictures(tuple(evaluation or (*EMBEDDED, *(_LAYOUTS if data_root else ()))), data_root)
    kept = [p for p in found if p.stem not in stems and storage.image_sha256(p) not in hashes]
    if not kept:
        raise DataError(f"{name}: every picture in it is an evaluation picture; give others to train on")
    short = ["__".join(p.relative_to(root).with_suffix("").parts) for p in kept]
    return [Sample(name if short.count(name) == 1 else "__".join(p.relative_to(root).parts), p) for name, p in zip(short, kept)]


@functools.lru_cache(maxsize=4)
def _evaluation_pictures(benchmarks: tuple[str, ...], data_root: str) -> tuple[frozenset[str], frozenset[str]]:
    """File names (those long enough to tell a picture) and hashes of the evaluation pictures that are here."""
    here = []
    for name in benchmarks:
        with contextlib.suppress(DataError, WeightsError):  # a benchmark that is not here
            here += [sample.image for sample in load_benchmark(name, data_root).samples]
    return frozenset(p.stem for p in here if len(p.stem) > 8), frozenset(storage.image_sha256(p) for p in here)
