"""Labels of an encoder's patches, from a label map (Sec. 3.3)."""

from __future__ import annotations

import numpy as np
import torch

from fmbseg.data.images import IGNORED


def patch_labels(labels: np.ndarray, grid: tuple[int, int], min_labelled: float) -> torch.Tensor:
    """Label of every patch: (h, w) int64, the commonest label of its pixels; -1 where too few are labelled.

    labels: (height, width) ``uint8`` class indices, 255 where unlabelled; grid: (h, w) patches that share the image
    evenly; min_labelled: the least labelled share of a patch (ours: half).
    """
    rows = (np.arange(labels.shape[0]) * grid[0]) // labels.shape[0]
    columns = (np.arange(labels.shape[1]) * grid[1]) // labels.shape[1]
    patch = rows[:, None] * grid[1] + columns[None, :]
    counts = np.bincount(patch.ravel() * 256 + labels.ravel(), minlength=grid[0] * grid[1] * 256).reshape(-1, 256)
    total, labelled = counts.sum(axis=1), counts[:, :IGNORED].sum(axis=1)
    keep = (labelled > 0) & (labelled >= min_labelled * total)
    return torch.from_numpy(np.where(keep, counts[:, :IGNORED].argmax(axis=1), -1).reshape(grid))
