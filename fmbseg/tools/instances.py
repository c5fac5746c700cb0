"""The instances of a label map: connected parts, or SAM's masks (ours), and the outlines of masks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from contourpy import FillType, contour_generator
from pycocotools import mask as rle

from fmbseg.params import MaskParams, RunParams
from fmbseg.runs import cache, parallel
from fmbseg.runs.cache import Models

Regions = Callable[[], Sequence[np.ndarray]]
"""Returns SAM's automatic masks of an image, (height, width) bool each."""

Way = Literal["", "parts", "sam"]
"""What an instance is: all pixels of a class, one of their connected parts, or one of SAM's masks."""

MOSTLY = 0.8
"""Share of a SAM mask's pixels that have to be of one class (ours)."""

SMALL = 0.001
"""A part that SAM's masks leave over joins the instance that it touches if it covers less than this share of the image (ours)."""


def split(mask: np.ndarray, way: Way, regions: Sequence[np.ndarray] = ()) -> Iterator[np.ndarray]:
    """The instances of one class (ours): (height, width) bool masks that share no pixel and together are ``mask``, one at a time.

    way "": the whole mask. "parts": its connected parts. "sam": each of ``regions``, (height, width) bool, large ones first, of
    which at least the share MOSTLY is in the mask and in no instance yet, cut to these pixels. The rest of the mask is divided into
    connected parts; those under the share SMALL of the image join the instance that they touch most.
    """
    if not way or not mask.any():
        yield from [mask] if mask.any() else []
    elif way == "parts":
        yield from _parts(mask)
    else:
        owner = np.zeros(mask.shape, np.int32)  # 0: in no instance yet
        free, count = mask.copy(), 0
        for region in sorted(regions, key=lambda region: -int(region.sum())):
            inside = region & free
            if inside.any() and inside.sum() >= MOSTLY * region.sum():
                count += 1
                owner[inside], free[inside] = count, False
        rest = sorted(_parts(free), key=lambda part: -int(part.sum())) if free.any() else []
        for part in rest:
            touched = np.bincount(owner[_grown(part) & ~part & mask])[1:]
            if part.sum() < SMALL * mask.size and touched.any():
                owner[part] = touched.argmax() + 1
            else:
                count += 1
                owner[part] = count
        yield from (owner == one for one in range(1, count + 1))


def sam_regions(paths: Sequence[Path], params: RunParams) -> dict[Path, Regions]:
    """SAM's masks of every image, by ``MaskParams``, made now by the run's workers and kept on disk."""
    work = functools.partial(_masks, models=Models.of(params), params=params)
    parallel.each(functools.partial(_make, work), paths, "SAM's masks", params.workers, read=cache.reader(params.device))
    return {path: functools.partial(work, path) for path in paths}


def _masks(path: Path, models: Models, params: MaskParams) -> list[np.ndarray]:
    return [one.mask for one in cache.automatic_masks(path, models, params)]


def _make(work: Callable[[Path], object], path: Path) -> None:
    work(path)


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask with the eight neighbours of every pixel."""
    wide = np.pad(mask, 1)
    tall = wide[:, :-2] | wide[:, 1:-1] | wide[:, 2:]
    return tall[:-2] | tall[1:-1] | tall[2:]


def _parts(mask: np.ndarray) -> Iterator[np.ndarray]:
    height, width = mask.shape
    for ring in outlines(mask):
        yield rle.decode(rle.merge(rle.frPyObjects([(ring + 0.5).ravel().tolist()], height, width))).astype(bool)


def outlines(mask: np.ndarray, level: float = 0.5) -> list[np.ndarray]:
    """The parts of a (height, width) bool mask, one closed polygon of (x, y) vertices each; pixel centres have whole numbers.

    A line that is passed twice joins a hole to its outline. level: where the outline runs, from 0 at the centres of the pixels
    outside to 1 at those inside. Filled by the rule of pixel centres, as pycocotools does, the polygons give back the mask.
    """
    padded = np.pad(mask, 1)
    found = []
    for points, offsets in zip(*contour_generator(z=padded.astype(np.float64), fill_type=FillType.OuterOffset).filled(level, 2)):
        outer, *holes = (points[start : end - 1] for start, end in zip(offsets, offsets[1:]))
        hooks: dict[tuple[float, float], list] = {}  # vertex -> what is joined to it

        def joined(ring: np.ndarray, hooks=hooks) -> list:
            path = []
            for vertex in ring.tolist():
                path.append(vertex)
                for hole in hooks.pop(_key(vertex), ()):
                    path += [*hole, hole[0], vertex]
            return path

        rings = [np.roll(hole, -hole[:, 1].argmin(), axis=0) for hole in holes]
        for ring in sorted(rings, key=lambda ring: -ring[0, 1]):  # holes that are joined to another hole are below its top
            column, row = round(ring[0, 0]), int(ring[0, 1])
            above = np.flatnonzero(~padded[:row, column])[-1]  # straight up through the mask to the next outline
            hooks.setdefault(_key((column, above + level)), []).append(joined(ring))
        found.append(np.array(joined(outer)) - 1)
    return found


def _key(vertex: Sequence[float]) -> tuple[float, float]:
    return round(vertex[0], 4), round(vertex[1], 4)
