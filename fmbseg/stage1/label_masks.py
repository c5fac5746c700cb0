"""Stage 1.2: SAM's automatic masks, each labelled with a detected class (Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from fmbseg.models.sam import AutomaticMask, SamSegmenter
from fmbseg.models.texts import ClassTexts
from fmbseg.params import MaskParams
from fmbseg.stage1.detection import Detected, Scale
from fmbseg.stage1.features import ImageFeatures


@dataclass(frozen=True)
class LabelledMask:
    """A mask with its class.

    mask: (height, width) bool; similarity: of its mean feature to the class, in [-1, 1];
    margin: its similarity to the class minus that to the most similar other class of the whole vocabulary, detected or not;
    in standard deviations where votes are standardised, else in cosine similarity.
    """

    mask: np.ndarray
    detected: Detected
    similarity: float
    margin: float


def automatic_masks(image: np.ndarray, sam: SamSegmenter, params: MaskParams) -> list[AutomaticMask]:
    """SAM's automatic masks of a (height, width, 3) RGB ``uint8`` image, filtered by confidence and by size."""
    grid, thresholds = (params.points_per_side, params.points_per_batch), (params.predicted_iou, params.stability, params.box_nms)
    found = sam.automatic_masks(image, *grid, *thresholds, params.sam_long_side)
    smallest = params.min_area * image.shape[0] * image.shape[1]
    return [mask for mask in found if mask.area >= max(smallest, 1)]


def mean_features(masks: Sequence[np.ndarray], features: ImageFeatures) -> torch.Tensor:
    """(M, D) unit-norm mean CLIP feature inside each (height, width) mask; a position counts by the share that the mask covers."""
    shape = features.map.shape[1:]
    weights = torch.cat([F.interpolate(torch.from_numpy(mask)[None, None].float(), size=shape, mode="area") for mask in masks])
    return F.normalize(weights.flatten(1) @ features.map.flatten(1).T, dim=-1)


def label_masks(
    masks: Sequence[np.ndarray], features: ImageFeatures, detected: Sequence[Detected], texts: ClassTexts, scale: Scale | None = None
) -> list[LabelledMask]:
    """Give every mask the detected class whose text is nearest to its mean feature. scale: standardises the margins (ours)."""
    if not masks or not detected:
        return []
    everything = texts.per_class(mean_features(masks, features) @ texts.features.T)
    values, which = everything[:, [d.index for d in detected]].max(dim=1)
    own = torch.tensor([detected[best].index for best in which.tolist()])[:, None]
    scaled = everything if scale is None else (everything - scale.mean) / scale.spread
    others = scaled.scatter(1, own, -torch.inf).max(dim=1).values
    margins = scaled.gather(1, own)[:, 0] - others
    return [
        LabelledMask(mask, detected[best], value, margin)
        for mask, best, value, margin in zip(masks, which.tolist(), values.tolist(), margins.tolist())
    ]
