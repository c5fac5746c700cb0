"""The alignment module M, which maps frozen encoder patches into the space of the texts (Sec. 3.3; Table 2, left)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fmbseg.errors import ParameterError
from fmbseg.params import ModuleParams


class LinearAlignment(nn.Module):
    """One linear layer on every patch by itself."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.project = nn.Linear(width, out)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, width) -> (B, N, hidden): what goes into the last layer."""
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, width) -> (B, N, out), not of unit norm."""
        return self.project(self.features(x))


class MlpAlignment(LinearAlignment):
    """A hidden layer with GELU, then linear, on every patch by itself."""

    def __init__(self, width: int, out: int, ratio: float):
        super().__init__(int(width * ratio), out)
        self.hidden = nn.Linear(width, int(width * ratio))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.hidden(x))


class TransformerAlignment(LinearAlignment):
    """One pre-norm transformer block over an image's patches, then linear: the paper's module."""

    def __init__(self, width: int, out: int, ratio: float, heads: int):
        super().__init__(width, out)
        self.block = nn.TransformerEncoderLayer(
            width, heads, int(width * ratio), dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


class Alignment(nn.Module):
    """M with the fixed standardisation of its input: z = unit(M((x - mean) / std)).

    Mean and std, (width,), are measured once on the training patches and saved with the module (ours: with them one
    learning rate suits every encoder).
    """

    def __init__(self, width: int, out: int, params: ModuleParams):
        super().__init__()
        self.width, self.out, self.params = width, out, params
        heads = params.heads or _heads(width)
        if width % heads:
            raise ParameterError(f"heads = {heads}: must divide the encoder's {width} dimensions, as {_heads(width)} does")
        if params.module == "linear":
            self.module = LinearAlignment(width, out)
        elif params.module == "mlp":
            self.module = MlpAlignment(width, out, params.mlp_ratio)
        else:
            self.module = TransformerAlignment(width, out, params.mlp_ratio, heads)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def features(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, width, h, w) encoder patches -> (B, h * w, hidden): what goes into M's last layer."""
        return self.module.features(self._standardised(patches))

    def _standardised(self, patches: torch.Tensor) -> torch.Tensor:
        return (patches.flatten(2).transpose(1, 2) - self.mean) / self.std

    def forward(self, patches: torch.Tensor, at_once: int | None = None) -> torch.Tensor:
        """(B, width, h, w) encoder patches -> (B, out, h, w) unit-norm embeddings in the space of the texts.

        at_once: number of images that go through M together; none: all of them (ours). For parts z_p of z, every loss L of z has
        the gradient of one pass, dL/dtheta = sum_p (dz_p/dtheta)^T dL/dz_p. The intermediate results of part p are made again
        when dL/dz_p is known, so that memory holds those of one part; M runs forward twice.
        """
        if at_once and at_once < len(patches):
            parts = patches.split(at_once)
            return torch.cat([checkpoint(self.forward, part, use_reentrant=False, preserve_rng_state=False) for part in parts])
        batch, _, height, width = patches.shape
        z = F.normalize(self.module(self._standardised(patches)), dim=-1)
        return z.transpose(1, 2).reshape(batch, self.out, height, width)


def _heads(width: int) -> int:
    """The number of heads that divides the width and is nearest to width / 64 (16 for ViT-L, 6 for ViT-S)."""
    wanted = max(round(width / 64), 1)
    return min((h for h in range(1, width + 1) if width % h == 0), key=lambda h: (abs(h - wanted), h))
