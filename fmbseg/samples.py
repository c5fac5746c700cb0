"""What every data set is made of: samples, and the label space that their truth is written in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fmbseg.vocabulary import LabelSpace


@dataclass(frozen=True)
class Sample:
    """A picture with a name that is unique in its set and, where there is one, a way to read its truth.

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
