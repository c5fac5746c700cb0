"""Which classes are in a picture: every crop votes (Sec. 3.2, "Object Detection")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fmbseg.features import ImageFeatures
from fmbseg.params import DetectParams
from fmbseg.vocabulary import ClassTexts


@dataclass(frozen=True)
class Detected:
    """A class found in a picture: its index in the vocabulary, its name and how many crops voted for it."""

    index: int
    name: str
    votes: int


def winners(features: ImageFeatures, texts: ClassTexts) -> list[int]:
    """Class of every crop: the one most similar to its class token over the WHOLE vocabulary."""
    return texts.per_class(F.normalize(features.tokens, dim=-1) @ texts.features.T).argmax(dim=1).tolist()


def detect(features: ImageFeatures, texts: ClassTexts, params: DetectParams) -> list[Detected]:
    """Classes with more than ``min_votes`` crops and more than ``min_vote_share`` of them, most votes first."""
    counts = torch.tensor(winners(features, texts)).bincount(minlength=len(texts.names))
    enough = max(params.min_votes, params.min_vote_share * len(features.tokens))
    order = counts.argsort(descending=True, stable=True).tolist()
    return [Detected(k, texts.names[k], int(counts[k])) for k in order if counts[k] > enough]


def given(labels: list[int], texts: ClassTexts) -> list[Detected]:
    """Image-level labels in place of detection (the paper's semi-supervised variant): no votes."""
    return [Detected(k, texts.names[k], 0) for k in labels]
