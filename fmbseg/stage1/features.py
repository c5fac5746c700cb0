"""High-resolution features (Sec. 3.2): overlapping crops of the image, each through CLIP on its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fmbseg.data import images
from fmbseg.errors import ParameterError
from fmbseg.models.clip import ImageText
from fmbseg.params import FeatureParams
from fmbseg.stage1 import windows
from fmbseg.stage1.windows import Window


@dataclass(frozen=True)
class ImageFeatures:
    """CLIP's features of one image.

    size: the image's (height, width) in pixels; map: (D, h, w), dense features put back in place;
    tokens: (C, D), one class token a crop; crops: where the C crops lie, in positions of the map.
    Neither map nor tokens have unit norm.
    """

    size: tuple[int, int]
    map: torch.Tensor
    tokens: torch.Tensor
    crops: tuple[Window, ...]

    def centre(self, row: int, column: int) -> tuple[float, float]:
        """Centre of a position of the map as (x, y) in pixels of the image."""
        height, width = self.map.shape[1:]
        return (column + 0.5) / width * self.size[1], (row + 0.5) / height * self.size[0]

    def crop_box(self, crop: Window) -> tuple[float, float, float, float]:
        """(x, y, width, height) of a crop in pixels of the image."""
        vertical, horizontal = self.size[0] / self.map.shape[1], self.size[1] / self.map.shape[2]
        return crop.left * horizontal, crop.top * vertical, crop.width * horizontal, crop.height * vertical


def crop_grid(clip: ImageText, params: FeatureParams) -> tuple[int, int, int]:
    """(pixels of the resized image a position, crop size and crop stride in positions)."""
    side = (params.crop_input or clip.image_size) // clip.stride  # positions along one crop
    if not side or params.crop_size % side or params.crop_stride % (params.crop_size // side):
        raise ParameterError(
            f"crop_size = {params.crop_size}, crop_stride = {params.crop_stride}: a crop has {side} positions a side, so crop_size must be"
            f" a multiple of {side} and crop_stride one of crop_size / {side}"
        )
    cell = params.crop_size // side
    return cell, side, params.crop_stride // cell


def extract(image: np.ndarray, clip: ImageText, params: FeatureParams) -> ImageFeatures:
    """Dense features and crop tokens of a (height, width, 3) RGB ``uint8`` image.

    The image is scaled so that its short side is ``params.short_side`` and both sides are whole positions;
    every crop is scaled to the size that CLIP takes.
    """
    images.check_image(image)
    cell, size, stride = crop_grid(clip, params)
    scaled = images.resize(image, images.target_size(*image.shape[:2], params.short_side, params.long_limit, cell))
    height, width = scaled.shape[0] // cell, scaled.shape[1] // cell
    if min(height, width) < size:  # a long, thin image: one crop must fit
        scale = size / min(image.shape[:2])
        height, width = (max(size, round(side * scale)) for side in image.shape[:2])
        scaled = images.resize(image, (height * cell, width * cell))
    crops = windows.windows(height, width, size, stride)
    tiles, tokens = [], []
    for start in range(0, len(crops), params.crop_batch):
        batch = crops[start : start + params.crop_batch]
        pixels = [scaled[c.top * cell : (c.top + size) * cell, c.left * cell : (c.left + size) * cell] for c in batch]
        side = size * clip.stride
        out = clip.encode_crops(torch.from_numpy(np.stack([images.resize(p, (side, side)) for p in pixels])), params.path, params.residual)
        tokens.append(out.tokens.cpu())
        tiles += zip(batch, out.maps.cpu())
    rounded = (one.half().float() for one in (windows.stitch(tiles, height, width), torch.cat(tokens)))  # as on disk (ours)
    return ImageFeatures(image.shape[:2], *rounded, tuple(crops))
