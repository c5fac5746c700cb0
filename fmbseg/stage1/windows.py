"""Sliding windows: where they lie, and how their maps are put back together.

The high-resolution features (Sec. 3.2) use them in units of patches, the sliding evaluation in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fmbseg.data.images import resampling
from fmbseg.errors import ParameterError


@dataclass(frozen=True)
class Window:
    """A rectangle: top left corner and size, in units of its map (patches or pixels)."""

    top: int
    left: int
    height: int
    width: int

    def of(self, array):
        """This part of a (..., height, width) tensor."""
        return array[..., self.top : self.top + self.height, self.left : self.left + self.width]


def windows(height: int, width: int, size: int, stride: int) -> list[Window]:
    """Windows of ``size`` every ``stride`` that cover a map, row by row; the last of a row or column are moved inward to fit.

    A side shorter than ``size`` gets one window of its own length. Raises ParameterError where windows leave gaps.
    """
    if not 0 < stride <= size:
        raise ParameterError(f"windows of {size} every {stride} leave gaps; the stride must be 1 to {size}")

    def starts(length: int) -> list[int]:
        count = max(math.ceil((length - size) / stride), 0) + 1
        return [min(i * stride, max(length - size, 0)) for i in range(count)]

    return [Window(top, left, min(size, height), min(size, width)) for top in starts(height) for left in starts(width)]


def stitch(tiles: Iterable[tuple[Window, torch.Tensor]], height: int, width: int) -> torch.Tensor:
    """Put (window, (C, h, w) tensor) pairs back into one (C, height, width) map; overlaps are averaged.

    The windows together must cover the map.
    """
    total = count = None
    for window, tile in tiles:
        if total is None:
            total = tile.new_zeros(tile.shape[0], height, width)
            count = tile.new_zeros(1, height, width)
        window.of(total).add_(tile)
        window.of(count).add_(1)
    if count is None or bool((count == 0).any()):
        raise ValueError("the windows do not cover the map")
    return total / count


def side_by_side(places: Sequence[Window], maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """(C, h, w) maps of a grid of windows -> (C, rows * h, columns * w), side by side without overlap.

    places: row by row, as ``windows`` gives them.
    """
    columns = len({place.left for place in places})
    return torch.cat([torch.cat(tuple(maps[i : i + columns]), dim=2) for i in range(0, len(maps), columns)], dim=1)


def placing(starts: Iterable[int], size: int, patches: int, length: int, mode: str = "bilinear") -> torch.Tensor:
    """(length, windows * patches) matrix of one axis, from windows ``side_by_side`` to the map that they cover.

    It interpolates each window's ``patches`` to its ``size`` and averages overlaps, as ``stitch`` does. Both are linear
    and treat rows and columns separately, so one matrix for each axis does it all.
    starts: where windows begin; repeated ones count once.
    """
    tiles = []
    for start in sorted(set(starts)):
        tile = torch.zeros(length, patches)
        tile[start : start + size] = resampling(size, patches, mode)
        tiles.append(tile)
    covered = sum((tile != 0).any(dim=1, keepdim=True).float() for tile in tiles)
    return torch.cat(tiles, dim=1) / covered
