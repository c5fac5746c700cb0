"""Mean intersection over union from one confusion matrix (Sec. 4.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from fmbseg.data.images import IGNORED
from fmbseg.errors import DataError


@dataclass
class Confusion:
    """Counts of pixels, rows the truth and columns the prediction; one more column for pixels predicted as nothing.

    A prediction of 255 (unlabelled) is a miss of its true class and a false alarm of none.
    """

    classes: int
    counts: np.ndarray = field(default=None)

    def __post_init__(self) -> None:
        if self.counts is None:
            self.counts = np.zeros((self.classes, self.classes + 1), dtype=np.int64)

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Count one image: (height, width) class indices each; pixels whose truth is 255 count for nothing.

        Raises DataError when the sizes differ or an index is neither a class nor 255.
        """
        if truth.shape != prediction.shape:
            raise DataError(f"the truth is {truth.shape} and the prediction {prediction.shape}; both must be of one size")
        for name, values in (("truth", truth), ("prediction", prediction)):
            if values.size and not 0 <= values.min() <= values.max() <= IGNORED:
                self._refuse(name, values)
        pairs = np.multiply(truth, IGNORED + 1, dtype=np.intp)
        pairs += prediction
        counts = np.bincount(pairs.ravel(), minlength=(IGNORED + 1) ** 2).reshape(IGNORED + 1, IGNORED + 1)
        for name, values, beyond in (
            ("truth", truth, counts[self.classes : IGNORED]),
            ("prediction", prediction, counts[:, self.classes : IGNORED]),
        ):
            if beyond.any():
                self._refuse(name, values)
        self.counts[:, :-1] += counts[: self.classes, : self.classes]
        self.counts[:, -1] += counts[: self.classes, IGNORED]

    def _refuse(self, name: str, values: np.ndarray) -> NoReturn:
        wrong = values[(values != IGNORED) & ((values >= self.classes) | (values < 0))][0]
        raise DataError(f"the {name} holds index {wrong}, and there are {self.classes} classes (and 255 for nothing)")

    def nonzero(self) -> np.ndarray:
        """(2, n) int64, positions in the flattened matrix and their counts: an image fills few of them."""
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
        """Share of the predicted pixels that are right, in per cent."""
        predicted = self.counts[:, : self.classes].sum()
        return float(100 * np.trace(self.counts[:, : self.classes]) / predicted) if predicted else float("nan")

    def coverage(self) -> float:
        """Share of the pixels with a truth that got a prediction, in per cent."""
        total = self.counts.sum()
        return float(100 * self.counts[:, : self.classes].sum() / total) if total else float("nan")
