"""The losses of Eq. 1-4 and of Table 2, as pure functions.

Throughout: z is (n, D), the unit-norm patch embeddings of the labelled patches of a whole batch (n = B*N);
labels is (n,) int64 in [0, K); texts is (K, D), the unit-norm text features. All return a scalar.
Temperature 1 and no weights are the equations as written; the temperature divides every dot product (ours).
"""

from __future__ import annotations

import torch


def patch_text_terms(z: torch.Tensor, labels: torch.Tensor, texts: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Eq. 3, l_t(z_i, t_yi) of every patch: (n,).

    Minus the similarity with its own text, plus the log of the sum over all K texts and all OTHER patches.
    """
    to_texts = z @ texts.T / temperature
    to_patches = _without_self(z @ z.T / temperature)
    own = to_texts.gather(1, labels[:, None])[:, 0]
    return torch.logsumexp(torch.cat([to_texts, to_patches], dim=1), dim=1) - own


def text_terms(per_patch: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Eq. 2, l_t(t_k) of every class: the mean of Eq. 3 over its patches, (K,). A class without patches has none: 0."""
    sums = per_patch.new_zeros(classes).index_add(0, labels, per_patch)
    return sums / labels.bincount(minlength=classes).clamp(min=1)


def patch_patch_terms(z: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Eq. 4, l_im(z_i) of every patch: (n,).

    The mean over the patches l of its class (itself among them, as Eq. 4 is written) of minus their similarity,
    plus the log of the sum over all OTHER patches. A lone patch has no other: 0.
    """
    if len(z) < 2:
        return z.sum(dim=1) * 0
    similarity = z @ z.T / temperature
    same = (labels[:, None] == labels[None, :]).to(z.dtype)
    return torch.logsumexp(_without_self(similarity), dim=1) - (similarity * same).sum(dim=1) / same.sum(dim=1)


def tsupcon(
    z: torch.Tensor,
    labels: torch.Tensor,
    texts: torch.Tensor,
    temperature: float = 1.0,
    text_weight: float | None = None,
    image_weight: float | None = None,
) -> torch.Tensor:
    """Eq. 1, TSupCon: (sum_k l_t(t_k) + sum_i l_im(z_i)) / (n + K).

    It is a weighted sum of two means: of l_t over the classes present and of l_im over the patches. ``None`` gives a
    mean the weight that Eq. 1 gives it, which is small for the texts (K'/(n + K), K' classes present).
    """
    present = labels.unique().numel()
    text = text_terms(patch_text_terms(z, labels, texts, temperature), labels, len(texts)).sum() / present
    image = patch_patch_terms(z, labels, temperature).mean()
    everything = len(z) + len(texts)
    text_weight = present / everything if text_weight is None else text_weight
    image_weight = len(z) / everything if image_weight is None else image_weight
    return text_weight * text + image_weight * image


def prototype(z: torch.Tensor, labels: torch.Tensor, texts: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Table 2's l_t alone: the mean of Eq. 2 over the classes present."""
    terms = text_terms(patch_text_terms(z, labels, texts, temperature), labels, len(texts))
    return terms.sum() / labels.unique().numel()


def supcon(z: torch.Tensor, labels: torch.Tensor, texts: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Table 2's SupCon alone (Khosla et al. 2020): the texts are just more examples of their class.

    Mean over all patches and texts that have a positive other than themselves.
    """
    everything = torch.cat([z, texts])
    classes = torch.cat([labels, torch.arange(len(texts), device=labels.device)])
    similarity = everything @ everything.T / temperature
    log_share = similarity - torch.logsumexp(_without_self(similarity), dim=1, keepdim=True)
    positive = (classes[:, None] == classes[None, :]).fill_diagonal_(False)
    count = positive.sum(dim=1)
    per_example = -(log_share * positive).sum(dim=1) / count.clamp(min=1)
    return per_example[count > 0].mean()


def _without_self(similarity: torch.Tensor) -> torch.Tensor:
    """The j != i of the sums: minus infinity on the diagonal."""
    return similarity.masked_fill(torch.eye(len(similarity), dtype=torch.bool, device=similarity.device), -torch.inf)
