"""Cleaning of pseudo labels over a collection, by the frozen encoder (ours; off in the paper's profile)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from fmbseg.data.images import IGNORED
from fmbseg.params import CleanParams

LEAST = 3
"""Fewest images of a class from which a prototype is made: with fewer, an outlier cannot be told from the rest."""


def regions(patches: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The (R,) classes of an image's labelled patches, and the (R, width) mean encoder patch of each.

    patches: (width, h, w) of the frozen encoder; labels: (h, w) classes, IGNORED where unlabelled.
    """
    classes = labels.unique()
    classes = classes[classes != IGNORED].long()
    own = (labels.flatten()[None] == classes[:, None]).float()
    return classes, own @ patches.float().flatten(1).T / own.sum(dim=1, keepdim=True)


def reassign(classes: torch.Tensor, means: torch.Tensor, params: CleanParams) -> torch.Tensor:
    """The (R,) class of every region of a collection after cleaning, IGNORED where it is dropped.

    With u(.) unit norm, a region r has the feature f_r = u(m_r - mean of all m), and a class k has, for region r, the
    prototype p_k(r) = u(sum of f_s over the regions s of class k, s != r). Region r of class k is doubtful where

        max_j f_r p_j(r) - f_r p_k(r) > clean_margin

    and is then dropped, or takes class j ("relabel"). A class with fewer than LEAST regions has no prototype and keeps its
    regions. classes: (R,), means: (R, width), of ``regions`` of all images together.
    """
    if not len(classes):
        return classes
    features = F.normalize(means - means.mean(dim=0), dim=-1)
    known, index, counts = classes.unique(return_inverse=True, return_counts=True)
    sums = features.new_zeros(len(known), features.shape[1]).index_add(0, index, features)
    scores = features @ F.normalize(sums, dim=-1).T
    scores[:, counts < LEAST] = -torch.inf
    own = (features * F.normalize(sums[index] - features, dim=-1)).sum(dim=-1)
    scores.scatter_(1, index[:, None], own[:, None])
    best, nearest = scores.max(dim=1)
    doubtful = (best - own > params.clean_margin) & (counts[index] >= LEAST)
    return torch.where(doubtful, known[nearest] if params.clean == "relabel" else IGNORED, classes)


def clean_labels(patches: Iterable[torch.Tensor], labels: Sequence[torch.Tensor], params: CleanParams) -> list[torch.Tensor]:
    """Patch labels of a collection with doubtful regions dropped or relabelled (``reassign``).

    patches: (width, h, w) of each image, read once in order; labels: (h, w) of each image, IGNORED where unlabelled.
    """
    found = [regions(one, label) for one, label in zip(patches, labels)]
    new = reassign(*(torch.cat(parts) for parts in zip(*found)), params).split([len(classes) for classes, _ in found])
    cleaned = []
    for label, (classes, _), now in zip(labels, found, new):
        made = label.clone()
        for k, other in zip(classes.tolist(), now.tolist()):
            made[label == k] = other
        cleaned.append(made)
    return cleaned
