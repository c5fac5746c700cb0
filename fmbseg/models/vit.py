"""Vision transformers of the model hub through transformers: DINOv2, DINOv2 with registers, DINOv3 and SigLIP 2.

The table of weights (``data/fetch.py``) has the family, shape and repository of each. Weights come from the hub's cache under
their own configuration; without weights (tests) the same shape is built from the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fmbseg.data import fetch

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Vit:
    """family: "dinov2", "dinov2_reg", "dinov3" or "siglip2"; shape: (width, layers, heads, hidden width of the MLP)."""

    family: str
    repository: str
    shape: tuple[int, int, int, int]

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation that the family's pixels are normalised with."""
        return HALF if self.family == "siglip2" else IMAGENET


VITS = {w.name: Vit(w.vit[0], w.repository, tuple(w.vit[1:])) for w in fetch.TABLE if w.vit}


def _classes(family: str) -> tuple[type, type]:
    """(configuration, model) of a family. SigLIP 2 of a fixed size is SigLIP's architecture; only its NaFlex kind is another."""
    import transformers as hub

    return {
        "dinov2": lambda: (hub.Dinov2Config, hub.Dinov2Model),
        "dinov2_reg": lambda: (hub.Dinov2WithRegistersConfig, hub.Dinov2WithRegistersModel),
        "dinov3": lambda: (hub.DINOv3ViTConfig, hub.DINOv3ViTModel),
        "siglip2": lambda: (hub.SiglipVisionConfig, hub.SiglipVisionModel),
    }[family]()


def build(vit: Vit) -> nn.Module:
    """The architecture at its full size, randomly initialised."""
    width, layers, heads, hidden = vit.shape
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    if vit.family == "dinov3":
        shape |= {"intermediate_size": hidden, "num_register_tokens": 4, "patch_size": 16}
    elif vit.family == "siglip2":
        shape |= {"intermediate_size": hidden, "image_size": 512, "patch_size": 16}
    else:  # the giant's MLP is gated
        shape |= {"image_size": 518, "patch_size": 14, "use_swiglu_ffn": width == 1536}
    config, model = _classes(vit.family)
    return model(config(**shape))


def load(vit: Vit) -> nn.Module:
    """The pretrained model from the hub's cache on this machine; nothing is fetched."""
    return _classes(vit.family)[1].from_pretrained(vit.repository, local_files_only=True, dtype=torch.float32)


def patch_tokens(vit: Vit, model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, height, width) normalised pixels -> (B, N, width) patch tokens, class and register tokens left off."""
    if vit.family == "siglip2":  # neither kind of token; its position embedding has to be told to fit another size
        return model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    return model(pixel_values=pixels).last_hidden_state[:, 1 + getattr(model.config, "num_register_tokens", 0) :]
