"""Which classes are in an image: every crop votes (Sec. 3.2, "Object Detection")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fmbseg.models.texts import ClassTexts
from fmbseg.params import DetectParams
from fmbseg.stage1.features import ImageFeatures


@dataclass(frozen=True)
class Detected:
    """A class found in an image: its index in the vocabulary, its name and how many crops voted for it."""

    index: int
    name: str
    votes: int


def similarity(tokens: torch.Tensor, texts: ClassTexts) -> torch.Tensor:
    """(C, K) cosine similarity of the class tokens of C crops, (C, D), to every class."""
    return texts.per_class(F.normalize(tokens, dim=-1) @ texts.features.T)


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of each class's similarity over the crops of many images, (K,) each (ours).

    A word that the image-text model hardly knows is about equally similar to all crops, so in a large vocabulary it is
    never the most similar one. On its own scale it can win a vote.
    """

    mean: torch.Tensor
    spread: torch.Tensor

    @classmethod
    def of(cls, tokens: torch.Tensor, texts: ClassTexts) -> Scale:
        """tokens: class tokens of the crops, (C, D)."""
        similar = similarity(tokens, texts)
        return cls(similar.mean(dim=0), similar.std(dim=0, correction=0).clamp(min=1e-6))


def winners(features: ImageFeatures, texts: ClassTexts, scale: Scale | None = None) -> list[int]:
    """Class of every crop: the class of the WHOLE vocabulary that is most similar to its class token.

    scale: standardises the similarities first; None: as in the paper.
    """
    similar = similarity(features.tokens, texts)
    return (similar if scale is None else (similar - scale.mean) / scale.spread).argmax(dim=1).tolist()


def detect(features: ImageFeatures, texts: ClassTexts, params: DetectParams, scale: Scale | None = None) -> list[Detected]:
    """Classes with more than ``min_votes`` crops and more than ``min_vote_share`` of them, most votes first."""
    counts = torch.tensor(winners(features, texts, scale)).bincount(minlength=len(texts.names))
    enough = max(params.min_votes, params.min_vote_share * len(features.tokens))
    order = counts.argsort(descending=True, stable=True).tolist()
    return [Detected(k, texts.names[k], int(counts[k])) for k in order if counts[k] > enough]


def given(labels: list[int], texts: ClassTexts) -> list[Detected]:
    """Image-level labels in place of detection (the paper's semi-supervised variant): no votes."""
    return [Detected(k, texts.names[k], 0) for k in labels]
