"""Stage 1.1: the patches most similar to a detected class query SAM for its mask (Sec. 3.2, Fig. 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from fmbseg.models.sam import SamSegmenter
from fmbseg.models.texts import ClassTexts
from fmbseg.params import QueryParams
from fmbseg.stage1.detection import Detected
from fmbseg.stage1.features import ImageFeatures


@dataclass(frozen=True)
class QueryMask:
    """SAM's answer for one detected class.

    points: (p, 2) as (x, y) in pixels; masks: (3, height, width) bool; scores: (3,), SAM's confidence in them;
    chosen: (height, width) bool, the most confident mask, or the union of these over separate queries.
    """

    detected: Detected
    points: np.ndarray
    masks: np.ndarray
    scores: np.ndarray
    chosen: np.ndarray


def word_similarity(features: ImageFeatures, texts: ClassTexts) -> torch.Tensor:
    """(h, w, P) cosine similarity of every position of the map to every prompt word."""
    flat = F.normalize(features.map.flatten(1).T, dim=-1)
    return (flat @ texts.features.T).unflatten(0, features.map.shape[1:])


def class_similarity(features: ImageFeatures, texts: ClassTexts) -> torch.Tensor:
    """(K, h, w) cosine similarity of every position of the map to every class."""
    return texts.per_class(word_similarity(features, texts)).permute(2, 0, 1)


def query_points(similarity: torch.Tensor, features: ImageFeatures, count: int) -> np.ndarray:
    """Centres of the ``count`` positions most similar to a class: (count, 2) as (x, y) in pixels, best first.

    similarity: (h, w), of one class.
    """
    best = similarity.flatten().topk(min(count, similarity.numel())).indices.tolist()
    return np.array([features.centre(*divmod(i, similarity.shape[1])) for i in best], dtype=np.float32)


def query_masks(
    image: np.ndarray, features: ImageFeatures, detected: list[Detected], texts: ClassTexts, sam: SamSegmenter, params: QueryParams
) -> list[QueryMask]:
    """Stage 1.1 of one image, (height, width, 3) RGB ``uint8``: one mask for every detected class."""
    if not detected:
        return []
    sam.set_image(image)
    similarity = class_similarity(features, texts)
    found = []
    for one in detected:
        points = query_points(similarity[one.index], features, params.points)
        if params.separate_points:
            answers = [sam.predict(point[None]) for point in points]
            masks, scores = answers[0]
            chosen = np.logical_or.reduce([masks[scores.argmax()] for masks, scores in answers])
        else:
            masks, scores = sam.predict(points)
            chosen = masks[scores.argmax()]
        found.append(QueryMask(one, points, masks, scores, chosen))
    return found
