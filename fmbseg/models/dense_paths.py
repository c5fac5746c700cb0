"""Dense features from the last block of a vision transformer, one small function a path (Sec. 3.1 and later work).

x is the block's input, (B, N, W): the class token, other prefix tokens, then the patches row by row. q, k and v are the
heads' (B, H, N, d) projections of its layer-normed tokens, o the attention's output projection. The class token that votes
(Sec. 3.2) never comes from here: it takes the model's own way.
"""

from __future__ import annotations

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


def attention(block: LastBlock, x: torch.Tensor) -> torch.Tensor:
    """The block's own attention, o(A v) with A = softmax(q k' / sqrt(d)): what the others are held against."""
    q, k = (block.split(block.part(x, i)) for i in (0, 1))
    return block.attend(x, torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1))


def value(block: LastBlock, x: torch.Tensor) -> torch.Tensor:
    """o(v): every token looks at itself alone, A = I (Sec. 3.1, after Zhou et al. 2022)."""
    return block.branch(block.part(x, 2))
