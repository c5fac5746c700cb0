"""The benchmarks of Table 1 in their official layouts under one folder, the data root, and any folder data set.

``torchvision.datasets`` has two of the six layouts (VOC, Cityscapes), no id maps, and does not say which file is missing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fmbseg.data import embedded, images, label_spaces
from fmbseg.data.embedded import EMBEDDED
from fmbseg.data.images import IGNORED
from fmbseg.data.label_spaces import LabelSpace, label_space
from fmbseg.data.samples import Dataset, Sample, Table, lookup, read_index, shifted
from fmbseg.errors import DataError, ParameterError


@dataclass(frozen=True)
class Layout:
    """Where an official data set lies under the data root.

    folder: its top folder; images: how many its validation split has; parts: {what: path in the folder} of all that must be
    there; pattern: glob of its images in the folder; read: (folder, label space) -> its samples; source: where it officially
    comes from, in words.
    """

    folder: str
    images: int
    parts: Mapping[str, str]
    pattern: str
    read: Callable[[Path, LabelSpace], list[Sample]]
    source: str

    def missing(self, root: Path) -> list[str]:
        """The parts that are not under the data root, as "masks VOCdevkit/..."."""
        return [f"{what} {self.folder}/{path}" for what, path in self.parts.items() if not (root / self.folder / path).exists()]

    def count(self, root: Path) -> int:
        """How many images of it are under the data root, of any split that its image folder holds."""
        return sum(1 for _ in (root / self.folder).glob(self.pattern))


def pair(paths: Sequence[Path], mask_of: Callable[[Path], Path], table: Table) -> Iterator[Sample]:
    """Samples of images with their masks; table: raw id of a mask -> class. Raises DataError for an image without a mask."""
    for path in paths:
        mask = mask_of(path)
        if not mask.is_file():
            raise DataError(f"{path.name}: has no mask at {mask}; every image of the split needs one")
        yield Sample(path.stem, path, functools.partial(read_index, mask, table, path))


def _of_split(base: Path, split: str) -> list[Path]:
    """The images of a VOC split file, in its order."""
    stems = (base / split).read_text(encoding="utf-8").split()
    found = [base / "JPEGImages" / f"{stem}.jpg" for stem in stems]
    missing = [path.stem for path in found if not path.is_file()]
    if missing:
        raise DataError(f"{base / split}: the split names {len(missing)} images that are not there, such as {missing[0]}")
    return found


def _voc(split: str, masks: str, classes: int, base: Path, space: LabelSpace) -> list[Sample]:
    table = lookup({raw: raw for raw in range(classes + 1)}) if space.background else shifted(classes)
    return list(pair(_of_split(base, split), lambda p: base / masks / f"{p.stem}.png", table))


def _coco(base: Path, space: LabelSpace) -> list[Sample]:
    raw_ids = label_spaces.assets()["id_maps"]["coco_stuff171_raw"]
    if space.name != "coco_stuff171":  # things -> 1..80, stuff and what nobody labelled (255) -> 0; without background: 0..79 and ignored
        stuff = 0 if space.background else IGNORED
        raw_ids = {raw: index + space.background if index < 80 else stuff for raw, index in raw_ids.items() if index != IGNORED}
        raw_ids[IGNORED] = stuff
    table = lookup(raw_ids, known=range(182))
    return list(pair(sorted(base.glob("images/val2017/*.jpg")), lambda p: base / "annotations/val2017" / f"{p.stem}.png", table))


def _ade(base: Path, space: LabelSpace) -> list[Sample]:
    paths = sorted(base.glob("images/validation/*.jpg"))
    return list(pair(paths, lambda p: base / "annotations/validation" / f"{p.stem}.png", shifted(150)))


def _cityscapes(base: Path, space: LabelSpace) -> list[Sample]:
    def mask_of(path: Path) -> Path:
        return base / "gtFine/val" / path.parent.name / f"{path.stem.removesuffix('_leftImg8bit')}_gtFine_labelIds.png"

    table = lookup(label_spaces.assets()["id_maps"]["cityscapes19_ids"], known=range(34))
    return list(pair(sorted(base.glob("leftImg8bit/val/*/*_leftImg8bit.png")), mask_of, table))


def _camvid(base: Path, space: LabelSpace) -> list[Sample]:
    """A folder data set whose classes.txt spells the classes CamVid's way, in any order."""
    spelled = label_spaces.assets()["id_maps"]["camvid11_names"]
    given = (base / "classes.txt").read_text(encoding="utf-8").split()
    if unknown := [name for name in given if name not in spelled]:
        raise DataError(f"{base / 'classes.txt'}: {unknown[0]!r} is no class of CamVid's 11; they are {', '.join(spelled)}")
    table = lookup({raw: space.names.index(spelled[name]) for raw, name in enumerate(given)})
    return list(pair(images.find_images(base / "images"), lambda p: base / "masks" / f"{p.stem}.png", table))


_VOC12 = Layout(
    "VOCdevkit/VOC2012",
    1449,
    {"images": "JPEGImages", "masks": "SegmentationClass", "split": "ImageSets/Segmentation/val.txt"},
    "JPEGImages/*.jpg",
    functools.partial(_voc, "ImageSets/Segmentation/val.txt", "SegmentationClass", 20),
    "VOCtrainval_11-May-2012.tar from the PASCAL VOC 2012 site, unpacked in the data root",
)
_CONTEXT = Layout(
    "VOCdevkit/VOC2010",
    5104,
    {"images": "JPEGImages", "masks": "SegmentationClassContext", "split": "ImageSets/SegmentationContext/val.txt"},
    "JPEGImages/*.jpg",
    functools.partial(_voc, "ImageSets/SegmentationContext/val.txt", "SegmentationClassContext", 59),
    "VOCtrainval_03-May-2010.tar from the PASCAL VOC 2010 site, unpacked in the data root; masks and split are made from"
    " trainval_merged.json of the PASCAL-Context site by mmsegmentation's pascal_context.py (it needs the Detail API)",
)
_COCO = Layout(
    "coco",
    5000,
    {"images": "images/val2017", "masks": "annotations/val2017"},
    "images/val2017/*.jpg",
    _coco,
    "val2017.zip from the COCO site, unpacked in coco/images, and stuffthingmaps_trainval2017.zip from the COCO-Stuff"
    " repository, unpacked in coco/annotations",
)
_CITYSCAPES = Layout(
    "cityscapes",
    500,
    {"images": "leftImg8bit/val", "masks": "gtFine/val"},
    "leftImg8bit/val/*/*_leftImg8bit.png",
    _cityscapes,
    "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from the Cityscapes site (free account), unpacked in cityscapes",
)
_ADE = Layout(
    "ADEChallengeData2016",
    2000,
    {"images": "images/validation", "masks": "annotations/validation"},
    "images/validation/*.jpg",
    _ade,
    "ADEChallengeData2016.zip from the MIT Scene Parsing Benchmark site, unpacked in the data root",
)
_CAMVID = Layout(
    "camvid",
    101,
    {"images": "images", "masks": "masks", "classes": "classes.txt"},
    "images/*",
    _camvid,
    "frames and 11-class index masks of the CamVid site's validation split, put as a folder data set: images/, masks/, classes.txt",
)

LAYOUTS: dict[str, Layout] = {
    "voc21": _VOC12,
    "voc20": _VOC12,
    "context60": _CONTEXT,
    "context59": _CONTEXT,
    "coco_object81": _COCO,
    "coco_object80": _COCO,
    "coco_stuff171": _COCO,
    "cityscapes19": _CITYSCAPES,
    "ade150": _ADE,
    "camvid11": _CAMVID,
}
"""The columns of Table 1, and CamVid, which is 11 of Cityscapes' classes."""

TRAIN = Layout(
    "coco",
    118_287,
    {"images": "images/train2017"},
    "images/train2017/*.jpg",
    lambda base, space: [],
    "train2017.zip from the COCO site, unpacked in coco/images (none of its annotations is used)",
)
"""COCO-Stuff train: the images that the paper trains on, without any label."""


def train_folder(root: Path) -> Path:
    """The folder of TRAIN's images. Raises DataError with their official source when it is not there."""
    if missing := TRAIN.missing(root):
        raise DataError(f"coco_stuff_train: not under {root}: {', '.join(missing)}; it comes as {TRAIN.source}")
    return root / TRAIN.folder / "images/train2017"


def voc_folder(root: Path) -> Path:
    """The folder of all images of VOC 2012, those of its validation split among them. Raises DataError without it."""
    folder = root / _VOC12.folder / "JPEGImages"
    if not folder.is_dir():
        raise DataError(f"voc_images: not under {root}: {_VOC12.folder}/JPEGImages; it comes as {_VOC12.source}")
    return folder


def read(name: str, root: Path, space: LabelSpace) -> list[Sample]:
    """Samples of one of LAYOUTS. Raises DataError saying what is missing and its official source."""
    layout = LAYOUTS[name]
    if missing := layout.missing(root):
        raise DataError(f"{name}: not under {root}: {', '.join(missing)}; it comes as {layout.source}")
    samples = layout.read(root / layout.folder, space)
    if not samples:
        raise DataError(f"{name}: no image found at {root / layout.folder / layout.pattern}; the layout is not the official one")
    return samples


BENCHMARKS = (*LAYOUTS, *EMBEDDED, "drawn")
FOLDER_PARTS = ("images", "masks", "classes.txt")


def folder_set(folder: Path) -> Dataset:
    """A folder of images/ID.jpg, masks/ID.png and classes.txt (line n is class n); a class 0 named "background" is background.

    Raises DataError for what is missing, ParameterError for a classes.txt that is no list of words.
    """
    for part in FOLDER_PARTS:
        if not (folder / part).exists():
            raise DataError(f"{folder}: has no {part}; a folder data set holds images/, masks/ and classes.txt (a class a line)")
    space = label_spaces.own_words((folder / "classes.txt").read_text(encoding="utf-8").splitlines(), folder.name)
    if space.names[0] == "background":
        space = LabelSpace(space.name, space.names, space.prompts, space.palette, True)
    table = lookup({index: index for index in range(len(space))})
    paths = images.find_images(folder / "images")
    if repeated := sorted(stem for stem, count in Counter(path.stem for path in paths).items() if count > 1):
        raise DataError(f"{folder / 'images'}: several images are named {repeated[0]}; a mask belongs to one image, so rename them")
    samples = pair(paths, lambda p: folder / "masks" / f"{p.stem}.png", table)
    return Dataset(folder.name, space, tuple(samples), str(folder.name))


def load_benchmark(name: str, data_root: str = "") -> Dataset:
    """A benchmark by name, an embedded one, or ``folder:NAME`` for a folder data set (under data_root, or any path).

    Raises ParameterError for an unknown name and DataError, with what is missing, when it is not there.
    """
    if name in EMBEDDED:
        return embedded.load(name)
    if name == "drawn":
        return embedded.drawn()
    if name.startswith("folder:"):
        root, path = Path(data_root or ".").expanduser(), Path(name.removeprefix("folder:")).expanduser()
        own = (
            f"folder:{path.relative_to(root) if path.is_relative_to(root) else path}"  # the path as asked for tells sets of one name apart
        )
        return dataclasses.replace(folder_set(root / path), name=own, source=own)
    if name not in LAYOUTS:
        raise ParameterError(f"benchmark {name!r}: unknown; known are {', '.join(BENCHMARKS)}, and folder:PATH")
    layout = LAYOUTS[name]
    if not data_root:
        raise DataError(f"{name}: needs data_root, the folder that holds {layout.folder} in its official layout")
    space = label_space(name)
    samples = read(name, Path(data_root).expanduser(), space)
    return Dataset(name, space, tuple(samples), f"{len(samples)} of the official {layout.images} images, under data_root")
