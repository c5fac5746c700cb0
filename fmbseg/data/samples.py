"""What every data set is made of: samples, and how their truth is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from fmbseg.data import images
from fmbseg.data.images import IGNORED
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.errors import DataError


@dataclass(frozen=True)
class Sample:
    """An image with a name that is unique in its set and, where there is one, a way to read its truth.

    truth: gives (height, width) ``uint8`` class indices of the data set's label space, 255 ignored.
    """

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


Table = tuple[int, ...]
"""256 entries, raw id -> class: 255 where the id is ignored, -1 where the data set has no such id."""


def lookup(classes: Mapping[int | str, int], known: Iterable[int] = ()) -> Table:
    """A table from raw id -> class. known: ids that the data set has and that are ignored, as 255 is."""
    table = [-1] * 256
    for raw in (*known, IGNORED):
        table[raw] = IGNORED
    for raw, index in classes.items():
        table[int(raw)] = index
    return tuple(table)


def shifted(classes: int) -> Table:
    """0 becomes ignored, every other id one less (ADE20K's reduce-zero-label; the columns without background)."""
    return lookup({raw: raw - 1 for raw in range(1, classes + 1)}, known=[0])


def read_index(path: Path, table: Table, picture: Path) -> np.ndarray:
    """An index PNG, its raw ids sent through a table.

    Raises ImageError when the mask has not the size of its image, DataError when it holds an id that the data set has not.
    """
    mask = images.read_mask(path, images.image_size(picture))
    truth = np.array(table, dtype=np.int16)[mask]
    if (truth < 0).any():
        last = max(raw for raw in range(IGNORED) if table[raw] >= 0)
        raise DataError(f"{path}: holds id {mask[truth < 0][0]}, which the data set has not; its ids are 0 to {last}, and {IGNORED}")
    return truth.astype(np.uint8)


def read_panoptic(path: Path, segments: tuple[tuple[int, int], ...]) -> np.ndarray:
    """A COCO panoptic PNG (id = R + 256 G + 65536 B): each (id, class) segment painted, all else ignored."""
    raw = np.array(Image.open(path).convert("RGB"), dtype=np.uint32)
    ids = raw[..., 0] + 256 * raw[..., 1] + 65536 * raw[..., 2]
    truth = np.full(ids.shape, IGNORED, dtype=np.uint8)
    for segment, index in segments:
        truth[ids == segment] = index
    return truth


def read_instances(size: tuple[int, int], outlines: tuple, background: int) -> np.ndarray:
    """COCO instances: (class, segmentation, area, crowd) painted large first; the rest is background; crowds ignored."""
    truth = np.full(size, background, dtype=np.uint8)
    for index, segmentation, _, crowd in sorted(outlines, key=lambda o: -o[2]):
        coded = rle.frPyObjects(segmentation, *size)
        coded = rle.merge(coded) if isinstance(coded, list) else coded
        truth[rle.decode(coded).astype(bool)] = IGNORED if crowd else index
    return truth
