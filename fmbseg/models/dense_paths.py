"""Dense features from the last block of a vision transformer, one small function a path (Sec. 3.1 and later work).

x is the block's input, (B, N, W): the class token, other prefix tokens, then the patches row by row; grid is (rows,
columns) of patches. q, k and v are the (B, H, N, d) projections of its layer-normed tokens in each head, o is the attention's
output projection (and LayerScale). The class token that votes (Sec. 3.2) does not come from here but from the model's own
forward pass.

All paths but the value path are later work, written from the published descriptions. We have run none with real weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class LastBlock:
    """The parts of a transformer block of open_clip or timm.

    weight: (3 W, W), bias: (3 W,) or None, of queries, keys and values; scale1, scale2: LayerScale, or the identity.
    """

    norm1: nn.Module
    weight: torch.Tensor
    bias: torch.Tensor | None
    heads: int
    out: nn.Module
    scale1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    scale2: nn.Module

    @classmethod
    def of(cls, block: nn.Module) -> LastBlock:
        """Those of an open_clip residual block or a timm block. Raises AttributeError for a block with other parts (EVA)."""
        a, heads = block.attn, block.attn.num_heads
        if hasattr(block, "ln_1"):  # open_clip
            return cls(block.ln_1, a.in_proj_weight, a.in_proj_bias, heads, a.out_proj, block.ls_1, block.ln_2, block.mlp, block.ls_2)
        return cls(block.norm1, a.qkv.weight, a.qkv.bias, heads, a.proj, block.ls1, block.norm2, block.mlp, block.ls2)

    def part(self, x: torch.Tensor, which: int) -> torch.Tensor:
        """(B, N, W) queries (0), keys (1) or values (2) of all heads side by side."""
        width = x.shape[-1]
        rows = slice(which * width, (which + 1) * width)
        return F.linear(self.norm1(x), self.weight[rows], None if self.bias is None else self.bias[rows])

    def split(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, W) -> (B, H, N, d), one slice a head."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """(B, N, W): o(A v), with the attention A, (B, H, N, N) or (B, 1, N, N)."""
        return self.branch((weights @ self.split(self.part(x, 2))).transpose(1, 2).flatten(2))

    def branch(self, mixed: torch.Tensor) -> torch.Tensor:
        """(B, N, W) mixed values -> what the attention adds to the block's input."""
        return self.scale1(self.out(mixed))

    def whole(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """The block's output: its input, what the attention adds, and the MLP."""
        x = x + branch
        return x + self.scale2(self.mlp(self.norm2(x)))


def _alike(block: LastBlock, x: torch.Tensor, one: int, other: int) -> torch.Tensor:
    """(B, H, N, N) scaled products of two projections of each head, such as q k' / sqrt(d) for 0 and 1."""
    a, b = (block.split(block.part(x, which)) for which in (one, other))
    return a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5


def attention(block: LastBlock, x: torch.Tensor) -> torch.Tensor:
    """The block's own attention, o(A v) with A = softmax(q k' / sqrt(d))."""
    return block.attend(x, _alike(block, x, 0, 1).softmax(-1))


def value(block: LastBlock, x: torch.Tensor) -> torch.Tensor:
    """o(v): every token attends to itself alone, A = I (Sec. 3.1, after Zhou et al. 2022)."""
    return block.branch(block.part(x, 2))


def qq(block: LastBlock, x: torch.Tensor) -> torch.Tensor:
    """o(A v) with A = softmax(q q' / sqrt(d)): tokens attend to those with similar queries (ClearCLIP, Lan et al. 2024)."""
    return block.attend(x, _alike(block, x, 0, 0).softmax(-1))


def qqkk(block: LastBlock, x: torch.Tensor) -> torch.Tensor:
    """o(A v) with A = softmax(q q' / sqrt(d)) + softmax(k k' / sqrt(d)), whose rows sum to 2 (SCLIP, Wang et al. 2024)."""
    return block.attend(x, _alike(block, x, 0, 0).softmax(-1) + _alike(block, x, 1, 1).softmax(-1))


BY_NAME = {"value": value, "qq": qq, "qqkk": qqkk}
"""The paths that need only the last block and its input."""

SIGMA = 5.0
"""Standard deviation of the neighbourhood of the kk path, in patches (Hajimiri et al. 2025)."""


def kk(block: LastBlock, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """o(A v) with A = softmax(k k' / sqrt(d) + G): tokens attend to similar keys nearby (NACLIP, Hajimiri et al. 2025).

    G_ij = exp(-((r_i - r_j)^2 + (c_i - c_j)^2) / (2 sigma^2)) for patches i and j in rows r and columns c; G is 0 for
    prefix tokens.
    """
    places = torch.cartesian_prod(*(torch.arange(float(n), device=x.device) for n in grid))
    near = (-(places[:, None] - places[None]).square().sum(-1) / (2 * SIGMA**2)).exp()
    prefix = x.shape[1] - len(places)
    return block.attend(x, (_alike(block, x, 1, 1) + F.pad(near, (prefix, 0, prefix, 0))).softmax(-1))


def guided(
    block: LastBlock, x: torch.Tensor, grid: tuple[int, int], guide: torch.Tensor, regions: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, P, W) patches, o(A v) with A from another encoder (ProxyCLIP, Lan et al. 2024; scope: CorrCLIP, Zhang et al. 2025).

    v is that of the P patches only; all heads share A. With the guide's unit-norm patches as the rows of d, and S = d d':

        without regions  A = softmax(3 (S - 1.2 mean S)) over the pairs of S_ij >= 1.2 mean S
        with regions     A = softmax(4 S) over the pairs in one region, and over those with a patch outside all regions where
                         S_ij > mean S

    mean S is over one image; the pairs i = j always count. guide: (B, width, *grid) of the frozen encoder; regions: (B, *grid)
    number of SAM's mask at each patch, from 1, and 0 outside all masks. Computed in float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        similar = _cosines(guide.float().flatten(2).transpose(1, 2))
        mean = similar.mean(dim=(1, 2), keepdim=True)
        if regions is None:
            scores, pairs = 3 * (similar - 1.2 * mean), similar >= 1.2 * mean
        else:
            of = regions.flatten(1)
            same, outside = of[:, :, None] == of[:, None], (of == 0)[:, :, None] | (of == 0)[:, None]
            scores, pairs = 4 * similar, torch.where(outside, similar > mean, same)
        pairs = pairs | torch.eye(similar.shape[-1], dtype=torch.bool, device=similar.device)
        return block.attend(x[:, -grid[0] * grid[1] :].float(), scores.masked_fill(~pairs, -torch.inf).softmax(-1)[:, None])


@dataclass(frozen=True)
class Calibration:
    """Constants of the selfcal path; blocks are numbered from 0.

    pre, post: the blocks whose similarities average patches before and after attention; multi: first and last of the blocks
    whose outputs are summed; cls: weight of the class token.
    """

    pre: int
    post: int
    multi: tuple[int, int]
    cls: float

    @classmethod
    def of(cls, depth: int) -> Calibration:
        """For a tower of ``depth`` blocks: the published constants for 12 and 24; else (ours) the nearer ones, scaled by the depth."""
        if depth in CALIBRATIONS:
            return CALIBRATIONS[depth]
        near = min(CALIBRATIONS, key=lambda known: abs(known - depth))
        c = CALIBRATIONS[near]
        pre, post, first, last = (min(round(i * depth / near), depth - 2) for i in (c.pre, c.post, *c.multi))
        return cls(pre, post, (first, last), c.cls)


CALIBRATIONS = {12: Calibration(8, 3, (3, 9), 0.3), 24: Calibration(16, 6, (8, 18), 0.1)}
"""Published constants by the number of blocks: CLIP ViT-B/16 and ViT-L/14 (Bai et al. 2024)."""

BETA = 0.4
"""Cosines below it are set to 0 in the selfcal path."""


def selfcal(block: LastBlock, states: Sequence[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
    """(B, P, W) patches by self-calibration (SC-CLIP, Bai et al. 2024): outliers are mended, then similar patches attend.

    states: h_0 ... h_{L-2}, the outputs of all blocks but the last, where token 0 is the class token; x = h_{L-2}.

        C(f) = u(f) u(f)'                     cosines of all pairs of patches; u scales rows to unit norm
        T(C) = C [C >= beta], rows sum to 1
        S = C(R(h_pre)), P = T(C(h_post))     R replaces outliers (`outliers`, `mend`)
        f(t) = o(W v) + c cls                 W = (softmax(m(3 (S - mean S))) + softmax(k k' / sqrt(d))) / 2; k, v of t
        dense = P f(T(S) R(x)) + P f(s)       s is the sum of h_i over the blocks of multi

    c is the weight of the class token; m leaves out negative entries except on the diagonal. Computed in float32, which a
    nearly constant crop needs.
    """
    set_by = Calibration.of(len(states) + 1)
    with torch.autocast(states[0].device.type, enabled=False):
        states = [h.float() for h in states]
        x, prefix = states[-1], states[-1].shape[1] - grid[0] * grid[1]
        bad = outliers(x[:, prefix:])
        similar = _cosines(mend(states[set_by.pre][:, prefix:], bad, grid))
        scores = 3 * (similar - similar.mean(dim=(1, 2), keepdim=True))
        itself = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill((scores < 0) & ~itself, -torch.inf).softmax(-1)[:, None]  # one for all heads
        after = _thresholded(_cosines(states[set_by.post][:, prefix:]))

        def through(patches: torch.Tensor, class_token: torch.Tensor) -> torch.Tensor:
            weights = (scores + _alike(block, patches, 1, 1).softmax(-1)) / 2
            return after @ (block.attend(patches, weights) + set_by.cls * class_token)

        summed = torch.stack(states[set_by.multi[0] : set_by.multi[1] + 1]).sum(dim=0)
        once = through(_thresholded(similar) @ mend(x[:, prefix:], bad, grid), x[:, :1])
        return once + through(summed[:, prefix:], summed[:, :1])


def outliers(patches: torch.Tensor, neighbours: int = 30, quantile: float = 0.95) -> torch.Tensor:
    """(B, P) True for those of (B, P, W) patches that are further from their neighbours than these are from theirs.

    D_i is the squared distance from patch i to the last of its nearest neighbours. The score of i is D_i times the mean of
    1 / D_j over its neighbours j; the scores of outliers are above the quantile of their image.
    """
    count = min(neighbours, patches.shape[1] - 1)
    if count < 1:
        return torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device)
    distances = torch.cdist(patches, patches, compute_mode="donot_use_mm_for_euclid_dist").square()
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = distances.topk(count, largest=False)
    far = nearest.values[..., -1].clamp_min(1e-6)
    scores = far * (1 / far).gather(1, nearest.indices.flatten(1)).view_as(nearest.values).mean(-1)
    return scores > scores.quantile(quantile, dim=1, keepdim=True)


def mend(patches: torch.Tensor, bad: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, P, W) patches; those that (B, P) ``bad`` marks become the mean of their unmarked 3 x 3 neighbours, if there are any."""
    maps, good = patches.transpose(1, 2).unflatten(2, grid), (~bad).to(patches).view(-1, 1, *grid)
    counts = F.avg_pool2d(good, 3, stride=1, padding=1)
    means = F.avg_pool2d(maps * good, 3, stride=1, padding=1) / counts.clamp_min(0.1)  # one of nine is 0.11
    return torch.where((good == 0) & (counts > 0.1), means, maps).flatten(2).transpose(1, 2)


def _cosines(patches: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(patches, dim=-1)
    return unit @ unit.transpose(1, 2)


def _thresholded(cosines: torch.Tensor) -> torch.Tensor:
    kept = cosines * (cosines >= BETA)
    return kept / (kept.sum(dim=-1, keepdim=True) + 1e-6)
