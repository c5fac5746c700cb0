"""Mean intersection over union from one confusion matrix (Sec. 4.1)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from fmbseg.data.images import IGNORED
from fmbseg.errors import DataError


@dataclass
class Confusion:
    """Counts of pixels: a row for each true class, a column for each predicted class, a last column for unlabelled pixels.

    A pixel that the prediction leaves unlabelled (IGNORED) is a miss of its true class and a false alarm of no class.
    """

    classes: int
    counts: np.ndarray = field(default=None)

    def __post_init__(self) -> None:
        if self.counts is None:
            self.counts = np.zeros((self.classes, self.classes + 1), dtype=np.int64)

    def add(self, truth: np.ndarray | torch.Tensor, prediction: np.ndarray | torch.Tensor) -> None:
        """Count one image: (height, width) class indices each, arrays or tensors; pixels whose truth is IGNORED do not count.

        The counting is done on the device of the prediction. Raises DataError when the sizes differ or an index is neither a
        class nor IGNORED.
        """
        truth, prediction = torch.as_tensor(truth), torch.as_tensor(prediction)
        if truth.shape != prediction.shape:
            raise DataError(f"the truth is {tuple(truth.shape)} and the prediction {tuple(prediction.shape)}; both must be of one size")
        truth, side = truth.to(prediction.device), self.classes + 1
        for name, values in (("truth", truth), ("prediction", prediction)):
            if values.numel() and not IGNORED <= values.min() <= values.max() < self.classes:
                wrong = values[(values < IGNORED) | (values >= self.classes)][0]
                raise DataError(f"the {name} holds index {wrong}, and there are {self.classes} classes (and {IGNORED} for nothing)")
        pairs = truth.int().mul_(side).add_(prediction).add_(-IGNORED * (side + 1))
        counts = pairs.flatten().bincount(minlength=side**2).reshape(side, side)[1:].cpu().numpy()
        self.counts += np.roll(counts, -1, axis=1)  # IGNORED comes first there, and last here

    def nonzero(self) -> np.ndarray:
        """(2, n) int64, positions in the flattened matrix and their counts; one image fills few of them."""
        where = np.flatnonzero(self.counts)
        return np.stack([where, self.counts.flat[where]])

    def add_nonzero(self, pairs: np.ndarray) -> None:
        """Add what ``nonzero`` gave of another matrix over the same classes."""
        self.counts.flat[pairs[0]] += pairs[1]

    def iou(self) -> np.ndarray:
        """(classes,) intersection over union; NaN for a class that occurs in neither truth nor prediction."""
        square = self.counts[:, : self.classes]
        hits = np.diag(square)
        union = self.counts.sum(axis=1) + square.sum(axis=0) - hits
        return np.where(union > 0, hits / np.maximum(union, 1), np.nan)

    def miou(self) -> float:
        """Mean over the classes that occur, in per cent."""
        iou = self.iou()
        return float(100 * np.nanmean(iou)) if not np.isnan(iou).all() else float("nan")

    def precision(self) -> float:
        """Share of the labelled pixels whose label is right, in per cent."""
        predicted = self.counts[:, : self.classes].sum()
        return float(100 * np.trace(self.counts[:, : self.classes]) / predicted) if predicted else float("nan")

    def coverage(self) -> float:
        """Share of the pixels with a truth that the prediction labels, in per cent."""
        total = self.counts.sum()
        return float(100 * self.counts[:, : self.classes].sum() / total) if total else float("nan")
