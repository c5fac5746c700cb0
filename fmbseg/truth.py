"""Reading the truth of the benchmarks: (height, width) ``uint8`` class indices, 255 ignored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from fmbseg import images
from fmbseg.images import IGNORED


def lookup(pairs: dict) -> np.ndarray:
    """A table of 256 entries: raw id -> class, all others 255."""
    table = np.full(256, IGNORED, dtype=np.uint8)
    for raw, index in pairs.items():
        table[int(raw)] = index
    return table


def read_index(path: Path, table: tuple[int, ...] | None = None) -> np.ndarray:
    """An index PNG, its raw ids sent through a 256-entry table."""
    mask = images.read_mask(path)
    return mask if table is None else np.array(table, dtype=np.uint8)[mask]


def shifted(classes: int) -> tuple[int, ...]:
    """0 becomes ignored, every other id one less (ADE20K's reduce-zero-label; the columns without background)."""
    return tuple(lookup({raw: raw - 1 for raw in range(1, classes + 1)}).tolist())


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
