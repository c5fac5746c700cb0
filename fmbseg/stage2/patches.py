"""Labels of an encoder's patches, from a label map (Sec. 3.3)."""

from __future__ import annotations

import numpy as np
import torch

from fmbseg.data.images import IGNORED


def patch_labels(labels: np.ndarray, grid: tuple[int, int], min_labelled: float) -> torch.Tensor:
    """Label of every patch: (h, w) int64, the commonest label of its pixels; IGNORED where too few are labelled.

    labels: (height, width) class indices, IGNORED where unlabelled; grid: (h, w) patches that share the image
    evenly; min_labelled: the least labelled share of a patch (ours: half).
    """
    rows = (np.arange(labels.shape[0]) * grid[0]) // labels.shape[0]
    columns = (np.arange(labels.shape[1]) * grid[1]) // labels.shape[1]
    patch = rows[:, None] * grid[1] + columns[None, :]
    pixels = np.bincount(labels.ravel() - IGNORED)
    present, column = np.flatnonzero(pixels), np.cumsum(pixels > 0) - 1
    shape = (grid[0] * grid[1], len(present))
    counts = np.bincount((patch * shape[1] + column[labels - IGNORED]).ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    present, total = present + IGNORED, counts.sum(axis=1)
    of_classes = np.where(present == IGNORED, 0, counts)
    labelled = of_classes.sum(axis=1)
    keep = (labelled > 0) & (labelled >= min_labelled * total)
    return torch.from_numpy(np.where(keep, present[of_classes.argmax(axis=1)], IGNORED).reshape(grid))
