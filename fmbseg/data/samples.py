"""Samples, an image with its truth, of which every data set consists, and how the truth is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools import mask as rle

from fmbseg.data import images
from fmbseg.data.images import IGNORED, IGNORED_IN_FILES
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.errors import DataError


@dataclass(frozen=True)
class Sample:
    """An image, its name, which is unique in its data set, and its truth if it has one.

    truth: returns (height, width) ``int16`` class indices of the data set's label space, or IGNORED; mask: the index mask that
    it reads, where it reads one.
    """

    name: str
    image: Path
    truth: Callable[[], np.ndarray] | None = None
    mask: Path | None = None

    def __str__(self) -> str:
        return str(self.image)


@dataclass(frozen=True)
class Dataset:
    """A benchmark. name: its column in Table 1; space: its classes; source: where its images come from, in words."""

    name: str
    space: LabelSpace
    samples: tuple[Sample, ...]
    source: str


Table = tuple[int, ...]
"""The class of each raw id of a mask from 0: an index, IGNORED, or UNDEFINED where the data set has no such id. The last entry is for
pixels that the file ignores."""

UNDEFINED = -2


def lookup(classes: Mapping[int | str, int], known: Iterable[int] = ()) -> Table:
    """The table of {raw id: class}. known: further ids of the data set, which are ignored; so is IGNORED unless it is a key."""
    table = dict.fromkeys((*known, IGNORED), IGNORED) | {int(raw): index for raw, index in classes.items()}
    return tuple(table.get(raw, UNDEFINED) for raw in (*range(max(table) + 1), IGNORED))


def shifted(classes: int) -> Table:
    """The table that ignores id 0 and maps ids 1 to ``classes`` to classes from 0 (ADE20K; the columns without background)."""
    return lookup({raw: raw - 1 for raw in range(1, classes + 1)}, known=[0])


def read_index(path: Path, table: Table, image: Path) -> np.ndarray:
    """Truth from an index mask whose raw ids a table maps to classes: (height, width) ``int16``.

    Raises ImageError when mask and image differ in size, DataError when there is no mask or it holds an id that the data set
    does not define.
    """
    if not path.is_file():
        raise DataError(f"{image.name}: has no mask at {path}; put it there, or take the image away")
    mask = images.read_mask(path, images.image_size(image))
    classes = np.full(max(mask.max() + 2, len(table)), UNDEFINED, dtype=np.int16)
    classes[: len(table) - 1], classes[IGNORED] = table[:-1], table[-1]
    truth = classes[mask]
    if (undefined := truth == UNDEFINED).any():
        eight, sixteen = IGNORED_IN_FILES.values()
        raise DataError(
            f"{path}: holds id {mask[undefined][0]}, which this data set does not define; its ids are 0 to {len(table) - 2},"
            f" and {eight} ({sixteen} in 16 bits)"
        )
    return truth


def read_panoptic(path: Path, segments: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Truth from a COCO panoptic PNG (id = R + 256 G + 65536 B): (height, width) ``int16``.

    segments: (id, class) of each segment that counts; the rest is ignored. Raises ImageError for a file that cannot be read.
    """
    raw = np.array(images.open_image(path).convert("RGB"), dtype=np.uint32)
    ids = raw[..., 0] + 256 * raw[..., 1] + 65536 * raw[..., 2]
    truth = np.full(ids.shape, IGNORED, dtype=np.int16)
    for segment, index in segments:
        truth[ids == segment] = index
    return truth


def read_instances(size: tuple[int, int], instances: Iterable[tuple[int, Mapping]], background: int) -> np.ndarray:
    """Truth from COCO instances, large ones painted first: (height, width) ``int16`` of ``size``; the rest is ``background``.

    instances: (class, COCO's annotation) of each; crowds are ignored, and an area that is not given is the mask's. Raises DataError
    for an outline that is neither a polygon nor a run-length code of that size.
    """
    truth = np.full(size, background, dtype=np.int16)
    for index, annotation in sorted(instances, key=lambda one: -_area(size, *one)):
        truth[_instance(size, index, annotation)] = IGNORED if annotation["iscrowd"] else index
    return truth


def _area(size: tuple[int, int], index: int, annotation: Mapping) -> float:
    return _instance(size, index, annotation).sum() if annotation.get("area") is None else annotation["area"]


def _instance(size: tuple[int, int], index: int, annotation: Mapping) -> np.ndarray:
    """(height, width) bool."""
    try:
        coded = annotation["segmentation"]
        if isinstance(coded, list) or not isinstance(coded["counts"], str):  # else it is compressed already
            coded = rle.frPyObjects(coded, *size)
        mask = rle.decode(rle.merge(coded) if isinstance(coded, list) else coded).astype(bool)
        if mask.shape != tuple(size):
            raise ValueError(f"its size is {mask.shape[::-1]}, its image's {tuple(size)[::-1]}")
        return mask
    except Exception as error:  # pycocotools raises plain Exception too
        raise DataError(f"instance of class {index}: its outline cannot be read ({error}); repair the annotations") from error
