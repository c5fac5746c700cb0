"""The benchmarks of Table 1 in their official layouts under one folder, the data root.

Reading is ours and not ``torchvision.datasets``: that has two of the six layouts (VOC, Cityscapes), knows no id maps,
and does not say which file is missing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fmbseg import images, vocabulary
from fmbseg.errors import DataError
from fmbseg.images import IGNORED
from fmbseg.samples import Sample
from fmbseg.truth import Table, lookup, read_index, shifted
from fmbseg.vocabulary import LabelSpace


@dataclass(frozen=True)
class Layout:
    """Where an official data set lies under the data root.

    folder: its top folder; images: how many its validation split has; parts: (what, path in the folder) that must be
    there; pictures: glob of its pictures in the folder; read: its samples from (folder, label space);
    bring: the official source, in words.
    """

    folder: str
    images: int
    parts: tuple[tuple[str, str], ...]
    pictures: str
    read: Callable[[Path, LabelSpace], list[Sample]]
    bring: str

    def missing(self, root: Path) -> list[str]:
        """The parts that are not under the data root, as "masks VOCdevkit/..."."""
        return [f"{what} {self.folder}/{path}" for what, path in self.parts if not (root / self.folder / path).exists()]

    def count(self, root: Path) -> int:
        """How many pictures of it are under the data root, of any split that its picture folder holds."""
        return sum(1 for _ in (root / self.folder).glob(self.pictures))


def pair(base: Path, pictures: list[Path], mask_of: Callable[[Path], Path], table: Table) -> Iterator[Sample]:
    """Samples of pictures with their masks; a missing mask is an error."""
    for path in pictures:
        mask = mask_of(path)
        if not mask.is_file():
            raise DataError(f"{path.name}: has no mask at {mask}; every picture of the split needs one")
        yield Sample(path.stem, path, functools.partial(read_index, mask, table, path))


def _of_split(base: Path, split: str) -> list[Path]:
    """The pictures of a VOC split file, in its order."""
    stems = (base / split).read_text(encoding="utf-8").split()
    found = [base / "JPEGImages" / f"{stem}.jpg" for stem in stems]
    missing = [path.stem for path in found if not path.is_file()]
    if missing:
        raise DataError(f"{base / split}: the split names {len(missing)} pictures that are not there, such as {missing[0]}")
    return found


def _voc(split: str, masks: str, classes: int, base: Path, space: LabelSpace) -> list[Sample]:
    table = lookup({raw: raw for raw in range(classes + 1)}) if space.background else shifted(classes)
    return list(pair(base, _of_split(base, split), lambda p: base / masks / f"{p.stem}.png", table))


def _coco(base: Path, space: LabelSpace) -> list[Sample]:
    raw_ids = vocabulary.assets()["id_maps"]["coco_stuff171_raw"]
    if space.name != "coco_stuff171":  # things -> 1..80, stuff -> 0; without background: 0..79 and ignored
        stuff = 0 if space.background else IGNORED
        raw_ids = {raw: index + space.background if index < 80 else stuff for raw, index in raw_ids.items() if index != IGNORED}
    table = lookup(raw_ids, known=range(182))
    return list(pair(base, sorted(base.glob("images/val2017/*.jpg")), lambda p: base / "annotations/val2017" / f"{p.stem}.png", table))


def _ade(base: Path, space: LabelSpace) -> list[Sample]:
    pictures = sorted(base.glob("images/validation/*.jpg"))
    return list(pair(base, pictures, lambda p: base / "annotations/validation" / f"{p.stem}.png", shifted(150)))


def _cityscapes(base: Path, space: LabelSpace) -> list[Sample]:
    def mask_of(path: Path) -> Path:
        return base / "gtFine/val" / path.parent.name / f"{path.stem.removesuffix('_leftImg8bit')}_gtFine_labelIds.png"

    table = lookup(vocabulary.assets()["id_maps"]["cityscapes19_ids"], known=range(34))
    return list(pair(base, sorted(base.glob("leftImg8bit/val/*/*_leftImg8bit.png")), mask_of, table))


def _camvid(base: Path, space: LabelSpace) -> list[Sample]:
    """A folder data set whose classes.txt spells the classes CamVid's way, in any order."""
    spelled = vocabulary.assets()["id_maps"]["camvid11_names"]
    given = (base / "classes.txt").read_text(encoding="utf-8").split()
    if unknown := [name for name in given if name not in spelled]:
        raise DataError(f"{base / 'classes.txt'}: {unknown[0]!r} is no class of CamVid's 11; they are {', '.join(spelled)}")
    table = lookup({raw: space.names.index(spelled[name]) for raw, name in enumerate(given)})
    return list(pair(base, images.find_images(base / "images"), lambda p: base / "masks" / f"{p.stem}.png", table))


_VOC12 = Layout(
    "VOCdevkit/VOC2012",
    1449,
    (("images", "JPEGImages"), ("masks", "SegmentationClass"), ("split", "ImageSets/Segmentation/val.txt")),
    "JPEGImages/*.jpg",
    functools.partial(_voc, "ImageSets/Segmentation/val.txt", "SegmentationClass", 20),
    "VOCtrainval_11-May-2012.tar from the PASCAL VOC 2012 site, unpacked in the data root",
)
_CONTEXT = Layout(
    "VOCdevkit/VOC2010",
    5104,
    (("images", "JPEGImages"), ("masks", "SegmentationClassContext"), ("split", "ImageSets/SegmentationContext/val.txt")),
    "JPEGImages/*.jpg",
    functools.partial(_voc, "ImageSets/SegmentationContext/val.txt", "SegmentationClassContext", 59),
    "VOCtrainval_03-May-2010.tar from the PASCAL VOC 2010 site, unpacked in the data root; masks and split are made from"
    " trainval_merged.json of the PASCAL-Context site by mmsegmentation's pascal_context.py (it needs the Detail API)",
)
_COCO = Layout(
    "coco",
    5000,
    (("images", "images/val2017"), ("masks", "annotations/val2017")),
    "images/val2017/*.jpg",
    _coco,
    "val2017.zip from the COCO site, unpacked in coco/images, and stuffthingmaps_trainval2017.zip from the COCO-Stuff"
    " repository, unpacked in coco/annotations",
)
_CITYSCAPES = Layout(
    "cityscapes",
    500,
    (("images", "leftImg8bit/val"), ("masks", "gtFine/val")),
    "leftImg8bit/val/*/*_leftImg8bit.png",
    _cityscapes,
    "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from the Cityscapes site (free account), unpacked in cityscapes",
)
_ADE = Layout(
    "ADEChallengeData2016",
    2000,
    (("images", "images/validation"), ("masks", "annotations/validation")),
    "images/validation/*.jpg",
    _ade,
    "ADEChallengeData2016.zip from the MIT Scene Parsing Benchmark site, unpacked in the data root",
)
_CAMVID = Layout(
    "camvid",
    101,
    (("images", "images"), ("masks", "masks"), ("classes", "classes.txt")),
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
    (("images", "images/train2017"),),
    "images/train2017/*.jpg",
    lambda base, space: [],
    "train2017.zip from the COCO site, unpacked in coco/images (none of its annotations is used)",
)
"""COCO-Stuff train: the photographs that the paper trains on, without any label."""


def train_pictures(root: Path) -> Path:
    """The folder of TRAIN's pictures. Raises DataError with their official source when it is not there."""
    if missing := TRAIN.missing(root):
        raise DataError(f"coco_stuff_train: not under {root}: {', '.join(missing)}; it comes as {TRAIN.bring}")
    return root / TRAIN.folder / "images/train2017"


def voc_pictures(root: Path) -> Path:
    """The folder of all photographs of VOC 2012, those of its validation split among them. Raises DataError without it."""
    folder = root / _VOC12.folder / "JPEGImages"
    if not folder.is_dir():
        raise DataError(f"voc_photographs: not under {root}: {_VOC12.folder}/JPEGImages; it comes as {_VOC12.bring}")
    return folder


def read(name: str, root: Path, space: LabelSpace) -> list[Sample]:
    """Samples of one of LAYOUTS. Raises DataError saying what is missing and its official source."""
    layout = LAYOUTS[name]
    if missing := layout.missing(root):
        raise DataError(f"{name}: not under {root}: {', '.join(missing)}; it comes as {layout.bring}")
    samples = layout.read(root / layout.folder, space)
    if not samples:
        raise DataError(f"{name}: no picture found at {root / layout.folder / layout.pictures}; the layout is not the official one")
    return samples
