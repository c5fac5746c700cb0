"""The losses of Eq. 1-4 and of Table 2, as pure functions.

Throughout: z is (n, D), the unit-norm patch embeddings of the labelled patches of a whole batch (n = B*N);
labels is (n,) int64 in [0, K); texts is (K, D), the unit-norm text features. The losses return a scalar.
With temperature 1 and no weights they are the equations as written; the temperature divides every dot product (ours).
In the formulas, N_k is the number of patches of class k among the n.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK = 2**21
"""Similarities that are in memory at once; it changes no value but for rounding."""


def log_sum_others(z: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log sum_{j != i} exp(z_i.z_j) of every patch, (n,): a term of both Eq. 3 and Eq. 4, and the only n x n product.

    The product is made a block of rows at a time, so memory grows with n and not with n x n.
    For a lone patch, which has no other, it is minus infinity.
    """
    if len(z) < 2:
        return z.new_full((len(z),), -torch.inf)
    return _LogSumOthers.apply(z, temperature)


class _LogSumOthers(torch.autograd.Function):
    """With s_ij = z_i.z_j and o_i = log sum_{j != i} exp(s_ij), the gradient of sum_i g_i o_i by z_i is
    sum_{j != i} (g_i exp(s_ij - o_i) + g_j exp(s_ij - o_j)) z_j, for s is symmetric."""

    @staticmethod
    def forward(context, z: torch.Tensor, temperature: float) -> torch.Tensor:
        others = z.new_empty(len(z))
        for rows, similar in _row_blocks(z, temperature):
            others[rows] = similar.logsumexp(dim=1)
        context.save_for_backward(z, others)
        context.temperature = temperature
        return others

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        z, others = context.saved_tensors
        gradient = torch.empty_like(z)
        for rows, similar in _row_blocks(z, context.temperature):
            own = (similar - others[rows, None]).exp_().mul_(g[rows, None])
            gradient[rows] = (own + (similar - others).exp_().mul_(g)) @ z
        return gradient / context.temperature, None


def _row_blocks(z: torch.Tensor, temperature: float) -> Iterator[tuple[slice, torch.Tensor]]:
    """The (n, n) similarities with minus infinity on the diagonal, in blocks: (slice of rows, (rows, n))."""
    step = max(BLOCK // len(z), 1)
    for start in range(0, len(z), step):
        rows = slice(start, start + step)
        similar = (z[rows] @ z.T).div_(temperature)
        similar.diagonal(start).fill_(-torch.inf)
        yield rows, similar


def patch_text_terms(
    z: torch.Tensor, labels: torch.Tensor, texts: torch.Tensor, temperature: float = 1.0, others: torch.Tensor | None = None
) -> torch.Tensor:
    """Eq. 3, of every patch, (n,): l_t(z_i, t_yi) = -z_i.t_yi + log(sum_k exp(z_i.t_k) + sum_{j != i} exp(z_i.z_j)).

    Minus the similarity to its own text, plus the log of the sum over all K texts and all OTHER patches.
    others: ``log_sum_others(z)``, if it has been computed already.
    """
    to_texts = z @ texts.T / temperature
    own = to_texts.gather(1, labels[:, None])[:, 0]
    others = log_sum_others(z, temperature) if others is None else others
    return torch.logaddexp(torch.logsumexp(to_texts, dim=1), others) - own


def text_terms(per_patch: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Eq. 2, of every class, (K,): l_t(t_k) = (1 / N_k) sum_{i: y_i = k} l_t(z_i, t_k).

    The mean of Eq. 3 over the patches of the class; 0 for a class without patches. per_patch: ``patch_text_terms``, (n,).
    """
    sums = per_patch.new_zeros(classes).index_add(0, labels, per_patch)
    return sums / labels.bincount(minlength=classes).clamp(min=1)


def patch_patch_terms(z: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, others: torch.Tensor | None = None) -> torch.Tensor:
    """Eq. 4, of every patch, (n,): l_im(z_i) = (1 / N_yi) sum_{l: y_l = y_i} (-z_i.z_l + log sum_{j != i} exp(z_i.z_j)).

    Minus the mean similarity to the patches l of its class (itself included, as Eq. 4 is written), which is the similarity
    to the mean of these patches, plus the log of the sum over all OTHER patches. For a lone patch it is 0.
    """
    if len(z) < 2:
        return z.sum(dim=1) * 0
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    means = z.new_zeros(len(classes), z.shape[1]).index_add(0, index, z) / counts[:, None]
    others = log_sum_others(z, temperature) if others is None else others
    return others - (z * means.index_select(0, index)).sum(dim=1) / temperature


def tsupcon(
    z: torch.Tensor,
    labels: torch.Tensor,
    texts: torch.Tensor,
    temperature: float = 1.0,
    text_weight: float | None = None,
    image_weight: float | None = None,
) -> torch.Tensor:
    """Eq. 1, TSupCon: (sum_k l_t(t_k) + sum_i l_im(z_i)) / (n + K).

    It is a weighted sum of two means, that of l_t over the classes present and that of l_im over the patches. Weight ``None``
    is the weight of Eq. 1: n/(n + K) for the patches and, with K' classes present, K'/(n + K) for the texts, which is small.
    """
    present = labels.unique().numel()
    others = log_sum_others(z, temperature)
    text = text_terms(patch_text_terms(z, labels, texts, temperature, others), labels, len(texts)).sum() / present
    image = patch_patch_terms(z, labels, temperature, others).mean()
    everything = len(z) + len(texts)
    text_weight = present / everything if text_weight is None else text_weight
    image_weight = len(z) / everything if image_weight is None else image_weight
    return text_weight * text + image_weight * image


def prototype(z: torch.Tensor, labels: torch.Tensor, texts: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Table 2's l_t alone: the mean of Eq. 2 over the classes present."""
    terms = text_terms(patch_text_terms(z, labels, texts, temperature), labels, len(texts))
    return terms.sum() / labels.unique().numel()


def supcon(z: torch.Tensor, labels: torch.Tensor, texts: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Table 2's SupCon alone (Khosla et al. 2020): a text is one more example of its class.

    An example's positives are the other examples of its class. Its loss is the log of the sum over all OTHER examples,
    minus the mean similarity to its positives. Returned is the mean over the examples that have a positive.
    """
    everything = torch.cat([z, texts])
    classes = torch.cat([labels, torch.arange(len(texts), device=labels.device)])
    sums = texts.index_add(0, labels, z)
    positives = classes.bincount()[classes] - 1
    to_positives = (everything * (sums.index_select(0, classes) - everything)).sum(dim=1) / temperature
    per_example = log_sum_others(everything, temperature) - to_positives / positives.clamp(min=1)
    return per_example[positives > 0].mean()
