"""Stage 1.2: SAM's automatic masks, each labelled with a detected class (Sec. 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from fmbseg.models.sam import AutomaticMask, SamSegmenter
from fmbseg.models.texts import ClassTexts
from fmbseg.params import MaskParams
from fmbseg.stage1.detection import Detected
from fmbseg.stage1.features import ImageFeatures


@dataclass(frozen=True)
class LabelledMask:
    """A mask with its class.

    mask: (height, width) bool; similarity: of its mean feature to the class, in [-1, 1];
    nearest: whether no class of the whole vocabulary, detected or not, is nearer.
    """

    mask: np.ndarray
    detected: Detected
    similarity: float
    nearest: bool


def automatic_masks(image: np.ndarray, sam: SamSegmenter, params: MaskParams) -> list[AutomaticMask]:
    """SAM's automatic masks of a (height, width, 3) RGB ``uint8`` image, filtered by confidence and by size."""
    found = sam.automatic_masks(
        image, params.points_per_side, params.points_per_batch, params.predicted_iou, params.stability, params.box_nms
    )
    smallest = params.min_area * image.shape[0] * image.shape[1]
    return [mask for mask in found if mask.area >= max(smallest, 1)]


def mean_features(masks: list[np.ndarray], features: ImageFeatures) -> torch.Tensor:
    """(M, D) unit-norm mean CLIP feature inside each (height, width) mask, weighted by its share of each position."""
    shape = features.map.shape[1:]
    weights = torch.cat([F.interpolate(torch.from_numpy(mask)[None, None].float(), size=shape, mode="area") for mask in masks])
    return F.normalize(weights.flatten(1) @ features.map.flatten(1).T, dim=-1)


def label_masks(masks: list[np.ndarray], features: ImageFeatures, detected: list[Detected], texts: ClassTexts) -> list[LabelledMask]:
    """Give every mask the detected class whose text is nearest to its mean feature."""
    if not masks or not detected:
        return []
    everything = texts.per_class(mean_features(masks, features) @ texts.features.T)
    values, which = everything[:, [d.index for d in detected]].max(dim=1)
    nearest = values >= everything.max(dim=1).values
    return [
        LabelledMask(mask, detected[best], float(value), bool(is_nearest))
        for mask, best, value, is_nearest in zip(masks, which.tolist(), values, nearest)
    ]
