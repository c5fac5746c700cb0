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


def similarity(tokens: torch.Tensor, texts: ClassTexts) -> torch.Tensor:
    """(C, K) cosine similarity of the class tokens of C crops, (C, D), to every class."""
    return texts.per_class(F.normalize(tokens, dim=-1) @ texts.features.T)


def spread(tokens: torch.Tensor, texts: ClassTexts) -> torch.Tensor:
    """(K,) standard deviation of each class's similarity over many crops, (C, D): ours, the unit in which crops vote.

    A word that the image-text model hardly knows is hardly more similar to one crop than to another and never wins a
    vote; in units of its own spread it can.
    """
    return similarity(tokens, texts).std(dim=0, correction=0).clamp(min=1e-6)


def winners(features: ImageFeatures, texts: ClassTexts, unit: torch.Tensor | None = None) -> list[int]:
    """Class of every crop: the one most similar to its class token over the WHOLE vocabulary.

    unit: ``spread``, (K,), by which similarities are divided before; none: as the paper has it.
    """
    similar = similarity(features.tokens, texts)
    return (similar if unit is None else similar / unit).argmax(dim=1).tolist()


def detect(features: ImageFeatures, texts: ClassTexts, params: DetectParams, unit: torch.Tensor | None = None) -> list[Detected]:
    """Classes with more than ``min_votes`` crops and more than ``min_vote_share`` of them, most votes first."""
    counts = torch.tensor(winners(features, texts, unit)).bincount(minlength=len(texts.names))
    enough = max(params.min_votes, params.min_vote_share * len(features.tokens))
    order = counts.argsort(descending=True, stable=True).tolist()
    return [Detected(k, texts.names[k], int(counts[k])) for k in order if counts[k] > enough]


def given(labels: list[int], texts: ClassTexts) -> list[Detected]:
    """Image-level labels in place of detection (the paper's semi-supervised variant): no votes."""
    return [Detected(k, texts.names[k], 0) for k in labels]
