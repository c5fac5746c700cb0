"""Pseudo labels of one image: both stages' masks as one label map (Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fmbseg.data.images import IGNORED
from fmbseg.models.clip import ImageText
from fmbseg.models.sam import AutomaticMask, SamSegmenter
from fmbseg.models.texts import ClassTexts
from fmbseg.params import CombineParams, LabelParams
from fmbseg.stage1 import detection, features, label_masks, query_sam
from fmbseg.stage1.detection import Detected, Scale
from fmbseg.stage1.features import ImageFeatures
from fmbseg.stage1.label_masks import LabelledMask
from fmbseg.stage1.query_sam import QueryMask


@dataclass(frozen=True)
class PseudoLabel:
    """Stage 1 of one image.

    labels: (height, width) ``int16`` class indices, IGNORED where unlabelled; queries: SAM's answers in Stage 1.1;
    query_masks, automatic_masks: the labelled masks of Stage 1.1 and 1.2.
    """

    labels: np.ndarray
    queries: list[QueryMask]
    query_masks: list[LabelledMask]
    automatic_masks: list[LabelledMask]

    @property
    def detected(self) -> list[Detected]:
        return [q.detected for q in self.queries]


def label_image(
    image: np.ndarray,
    clip: ImageText,
    sam: SamSegmenter,
    texts: ClassTexts,
    params: LabelParams | None = None,
    given: Sequence[int] | None = None,
    scale: Scale | None = None,
) -> PseudoLabel:
    """Stage 1 of one image, all in memory: features, detection, Stage 1.1, Stage 1.2, combination (Sec. 3.2).

    image: (height, width, 3) RGB ``uint8``; texts: those of the vocabulary, ``class_texts(clip, own_words("cat, sofa"))``;
    params: by default the paper's; ``profiles.load("label", "embedded")`` gives those of that profile; given: image-level labels
    (class indices) in place of detection; scale: standardises the votes (ours).
    Raises ImageError for an array that is no such image.
    """
    params = params or LabelParams()
    found = features.extract(image, clip, params)
    detected = detection.detect(found, texts, params, scale) if given is None else detection.given(given, texts)
    queries = query_sam.query_masks(image, found, detected, texts, sam, params)
    automatic = label_masks.automatic_masks(image, sam, params) if params.stages != "1.1" and detected else []
    return assemble(queries, automatic, found, texts, params, scale)


def assemble(
    queries: Sequence[QueryMask],
    automatic: Sequence[AutomaticMask],
    found: ImageFeatures,
    texts: ClassTexts,
    params: LabelParams,
    scale: Scale | None = None,
) -> PseudoLabel:
    """Label the automatic masks with the detected classes, drop masks of too small a margin, and combine the stages.

    scale: standardises the margins; the one that the votes took.
    """
    query_masks = [m for q in queries for m in label_masks.label_masks([q.chosen], found, [q.detected], texts, scale)]
    labelled = label_masks.label_masks([a.mask for a in automatic], found, [q.detected for q in queries], texts, scale)
    if (least := least_margin(params, scale)) is not None:
        query_masks, labelled = ([m for m in masks if m.margin > least] for masks in (query_masks, labelled))
    return PseudoLabel(combine(query_masks, labelled, found.size, params), list(queries), query_masks, labelled)


def least_margin(params: LabelParams, scale: Scale | None) -> float | None:
    """``min_margin``; None, so that every mask stays, where votes were to be standardised and are not, for it is in their unit (ours)."""
    return params.min_margin if scale is not None or not params.reference_images else None


def combine(query: list[LabelledMask], automatic: list[LabelledMask], size: tuple[int, int], params: CombineParams) -> np.ndarray:
    """One (height, width) ``int16`` label map of both stages; a pixel that one stage labels takes that label.

    Where both label a pixel, "similarity" takes the class whose mask is more similar to it, "query" takes Stage 1.1's class,
    and "agree" labels the pixel only if they agree (ours: the paper says that the stages complement each other, not how).
    """
    first, first_similarity = paint(query if params.stages != "1.2" else [], size)
    second, second_similarity = paint(automatic if params.stages != "1.1" else [], size)
    labels = np.where(first_similarity > second_similarity, first, second)
    both = (first != IGNORED) & (second != IGNORED)
    if params.overlap == "query":
        labels[both] = first[both]
    elif params.overlap == "agree":
        labels[both & (first != second)] = IGNORED
    return labels


def paint(masks: Sequence[LabelledMask], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Paint masks, large ones first and small ones last: (labels, similarity), (height, width) each; IGNORED outside all masks."""
    labels = np.full(size, IGNORED, dtype=np.int16)
    similarity = np.full(size, -np.inf, dtype=np.float32)
    for mask in sorted(masks, key=lambda m: -int(m.mask.sum())):
        labels[mask.mask] = mask.detected.index
        similarity[mask.mask] = mask.similarity
    return labels, similarity
