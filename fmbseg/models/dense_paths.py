"""Dense features from the last block of a vision transformer, one small function a path (Sec. 3.1 and later work).

x is the block's input, (B, N, W): the class token, other prefix tokens, then the patches row by row; grid is (rows,
columns) of patches. q, k and v are the heads' (B, H, N, d) projections of its layer-normed tokens, o the attention's output
projection (and LayerScale). The class token that votes (Sec. 3.2) never comes from here: it takes the model's own way.

All but the value path are later work, written from the published descriptions; none was run with real weights by us.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class LastBlock:
    """The parts of a transformer block, whoever wrote it.

    weight: (3 W, W), bias: (3 W) or none, of queries, keys and values; scale1, scale2: LayerScale, or the identity.
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
        """Of an open_clip residual block or a timm block. Raises AttributeError for a block of other parts (EVA)."""
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
        """(B, N, W) -> (B, H, N, d), a head apart."""
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
    """(B, H, N, N) scaled products of two of a head's projections, such as q k' / sqrt(d) of 0 and 1."""
    a, b = (block.split(block.part(x, which)) for which in (one, other))
    return a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5


def attention(block: LastBlock, x: torch.Tensor) -> torch.Tensor:
    """The block's own attention, o(A v) with A = softmax(q k' / sqrt(d)): what the others are held against."""
    return block.attend(x, _alike(block, x, 0, 1).softmax(-1))


def value(block: LastBlock, x: torch.Tensor) -> torch.Tensor:
    """o(v): every token looks at itself alone, A = I (Sec. 3.1, after Zhou et al. 2022)."""
    return block.branch(block.part(x, 2))


def qq(block: LastBlock, x: torch.Tensor) -> torch.Tensor:
    """o(A v) with A = softmax(q q' / sqrt(d)): tokens look at those that ask alike (ClearCLIP, Lan et al. 2024)."""
    return block.attend(x, _alike(block, x, 0, 0).softmax(-1))


def qqkk(block: LastBlock, x: torch.Tensor) -> torch.Tensor:
    """o(A v) with A = softmax(q q' / sqrt(d)) + softmax(k k' / sqrt(d)), whose rows sum to 2 (SCLIP, Wang et al. 2024)."""
    return block.attend(x, _alike(block, x, 0, 0).softmax(-1) + _alike(block, x, 1, 1).softmax(-1))


BY_NAME = {"value": value, "qq": qq, "qqkk": qqkk}
"""The paths that need no more than the last block and its input."""

SIGMA = 5.0
"""Of the neighbourhood of the kk path, in patches (Hajimiri et al. 2025)."""


def kk(block: LastBlock, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """o(A v) with A = softmax(k k' / sqrt(d) + G): tokens look at like keys nearby (NACLIP, Hajimiri et al. 2025).

    G_ij = exp(-((r_i - r_j)^2 + (c_i - c_j)^2) / (2 sigma^2)) of the patches' rows r and columns c, 0 in the rows and
    columns of the prefix tokens.
    """
    places = torch.cartesian_prod(*(torch.arange(float(n), device=x.device) for n in grid))
    near = (-(places[:, None] - places[None]).square().sum(-1) / (2 * SIGMA**2)).exp()
    prefix = x.shape[1] - len(places)
    return block.attend(x, (_alike(block, x, 1, 1) + F.pad(near, (prefix, 0, prefix, 0))).softmax(-1))


def guided(
    block: LastBlock, x: torch.Tensor, grid: tuple[int, int], guide: torch.Tensor, regions: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, P, W) patches, o(A v) with A from another encoder (ProxyCLIP, Lan et al. 2024; scope: CorrCLIP, Zhang et al. 2025).

    v is of the P patches alone and A one for all heads. With the rows d of unit norm of the guide's patches and S = d d':

        without regions  A = softmax(3 (S - 1.2 mean S)), its entries under 0 left out before
        with regions     A = softmax(4 S), left out before where neither i and j are in one region nor, one of them being
                         in none, S_ij > mean S

    mean S is of one image; the diagonal stays. guide: (B, width, *grid) of the frozen encoder; regions: (B, *grid) numbers
    of SAM's masks from 1, 0 in none. In float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        similar = _cosines(guide.float().flatten(2).transpose(1, 2))
        mean = similar.mean(dim=(1, 2), keepdim=True)
        if regions is None:
            scores, left = 3 * (similar - 1.2 * mean), similar >= 1.2 * mean
        else:
            of = regions.flatten(1)
            one, none = of[:, :, None] == of[:, None], (of == 0)[:, :, None] | (of == 0)[:, None]
            scores, left = 4 * similar, torch.where(none, similar > mean, one)
        left = left | torch.eye(similar.shape[-1], dtype=torch.bool, device=similar.device)
        return block.attend(x[:, -grid[0] * grid[1] :].float(), scores.masked_fill(~left, -torch.inf).softmax(-1)[:, None])


@dataclass(frozen=True)
class Calibration:
    """Constants of the selfcal path; blocks are numbered from 0.

    pre: block whose similarities weigh tokens before attention; post: ... after it; multi: first and last of the blocks
    whose outputs are summed; cls: weight of the class token.
    """

    pre: int
    post: int
    multi: tuple[int, int]
    cls: float

    @classmethod
    def of(cls, depth: int) -> Calibration:
        """For a tower of so many blocks: the published ones of 12 and 24; for others (ours) the nearer's, scaled by the depth."""
        if depth in CALIBRATIONS:
            return CALIBRATIONS[depth]
        near = min(CALIBRATIONS, key=lambda known: abs(known - depth))
        c = CALIBRATIONS[near]
        pre, post, first, last = (min(round(i * depth / near), depth - 2) for i in (c.pre, c.post, *c.multi))
        return cls(pre, post, (first, last), c.cls)


CALIBRATIONS = {12: Calibration(8, 3, (3, 9), 0.3), 24: Calibration(16, 6, (8, 18), 0.1)}
"""Published constants by the number of blocks: CLIP ViT-B/16 and ViT-L/14 (Bai et al. 2024)."""

BETA = 0.4
"""Cosines under it count for nothing in the selfcal path."""


def selfcal(block: LastBlock, states: Sequence[torch.Tensor], grid: tuple[int, int], constants: Calibration | None = None) -> torch.Tensor:
    """(B, N - prefix, W) patches by self-calibration (SC-CLIP, Bai et al. 2024): outliers mended, then attention by likeness.

    states: h_0 ... h_{L-2}, the outputs of all blocks but the last, token 0 the class token; x = h_{L-2}. With R mending
    outliers (`outliers`, `mend`), unit rows u(.), C(f) = u(f) u(f)', T(C) = the rows of C [C >= beta] over their sums,
    S = C(R(h_pre)), s the sum of h_i over multi, and c the weight of the class token:

        f(t) = o(W v) + c cls,  W = (softmax(m(3 (S - mean S))) + softmax(k k' / sqrt(d))) / 2,  q, k, v of t
        dense = P f(T(S) R(x)) + P f(s),  P = T(C(h_post))

    m leaves out what is negative; the diagonal stays. All in float32, for a nearly constant crop's sake. constants: of
    another tower than one of this depth.
    """
    set_by = constants or Calibration.of(len(states) + 1)
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
    """(B, P) which of an image's (B, P, W) patches lie further from their neighbours than those from theirs.

    With D_i the squared distance from i to its last neighbour, i's score is D_i times the mean of 1 / D_j over its
    neighbours j; an outlier's is above the quantile of its image.
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
    """(B, P, W) patches, those marked in the (B, P) ``bad`` replaced by the mean of their unmarked 3 x 3 neighbours, if any."""
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
