"""Frozen encoders by name, whose patches the alignment module aligns with text (Sec. 3.3).

The vision transformers of the model hub (DINOv2, DINOv2 with registers, DINOv3, SigLIP 2) come through transformers; the table of
weights (``data/fetch.py``) has the family, shape and repository of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fmbseg import files
from fmbseg.data import fetch, images
from fmbseg.data.images import normalise
from fmbseg.errors import ParameterError
from fmbseg.models.precision import Precision, autocast, precision_key
from fmbseg.params import check_device

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Encoder(nn.Module):
    """A frozen network with one feature vector a patch.

    width: dimensions of a patch; patch: its side in pixels; key: what its results depend on.
    """

    def __init__(self, key: str, width: int, patch: int):
        super().__init__()
        self.key, self.width, self.patch, self.precision = key, width, patch, "fp32"

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, height, width, 3) ``uint8`` -> (B, width, height // patch, width // patch)."""
        raise NotImplementedError

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patches of (B, height, width, 3) ``uint8`` images whose sides are multiples of the patch:
        (B, width, h, w) ``float32``. Raises ParameterError for other sides."""
        if pixels.shape[1] % self.patch or pixels.shape[2] % self.patch:
            raise ParameterError(
                f"{self.key}: input of {pixels.shape[2]} x {pixels.shape[1]} pixels; both sides must be multiples of {self.patch}"
            )
        with autocast(str(pixels.device), self.precision):
            return self.features(pixels).float()


@dataclass(frozen=True)
class Vit:
    """family: "dinov2", "dinov2_reg", "dinov3" or "siglip2"; shape: (width, layers, heads, hidden width of the MLP)."""

    family: str
    repository: str
    shape: tuple[int, int, int, int]

    def _classes(self) -> tuple[type, type]:
        """(configuration, model). SigLIP 2 of a fixed size has SigLIP's architecture; only its NaFlex variant has another."""
        import transformers as hub

        return {
            "dinov2": lambda: (hub.Dinov2Config, hub.Dinov2Model),
            "dinov2_reg": lambda: (hub.Dinov2WithRegistersConfig, hub.Dinov2WithRegistersModel),
            "dinov3": lambda: (hub.DINOv3ViTConfig, hub.DINOv3ViTModel),
            "siglip2": lambda: (hub.SiglipVisionConfig, hub.SiglipVisionModel),
        }[self.family]()

    def build(self) -> nn.Module:
        """The architecture at its full size, randomly initialised."""
        width, layers, heads, hidden = self.shape
        shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        if self.family == "dinov3":
            shape |= {"intermediate_size": hidden, "num_register_tokens": 4, "patch_size": 16}
        elif self.family == "siglip2":
            shape |= {"intermediate_size": hidden, "image_size": 512, "patch_size": 16}
        else:  # the giant's MLP is gated
            shape |= {"image_size": 518, "patch_size": 14, "use_swiglu_ffn": width == 1536}
        config, model = self._classes()
        return model(config(**shape))

    def load(self) -> nn.Module:
        """The pretrained model, with its own configuration, from the hub's cache on this machine; nothing is fetched."""
        return self._classes()[1].from_pretrained(self.repository, local_files_only=True, dtype=torch.float32)


VITS = {w.name: Vit(w.vit[0], w.repository, tuple(w.vit[1:])) for w in fetch.TABLE if w.vit}


class Transformer(Encoder):
    """A vision transformer of the hub: the patch tokens of its last layer, after its final norm."""

    def __init__(self, key: str, kind: Vit, model: nn.Module):
        super().__init__(key, model.config.hidden_size, model.config.patch_size)
        self.kind, self.model = kind, model

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.kind.family == "siglip2":  # it has patch tokens only; its position embedding must be told to fit another size
            tokens = self.model(pixel_values=normalise(pixels, *HALF), interpolate_pos_encoding=True).last_hidden_state
        else:
            prefix = 1 + getattr(self.model.config, "num_register_tokens", 0)
            tokens = self.model(pixel_values=normalise(pixels, *IMAGENET)).last_hidden_state[:, prefix:]
        grid = (pixels.shape[1] // self.patch, pixels.shape[2] // self.patch)
        return tokens.transpose(1, 2).unflatten(2, grid)


class FeaturePyramid(Encoder):
    """Feature maps of several stages of one network, scaled (bilinear) to the grid of stride ``patch`` and concatenated.

    stages: indices of the network's stages.
    """

    def __init__(self, key: str, network: nn.Module, stages: list[int], patch: int, mean: tuple, std: tuple):
        channels = [network.feature_info[stage]["num_chs"] for stage in stages]
        super().__init__(f"{key} stages {stages}", sum(channels), patch)
        self.network, self.stages, self.mean, self.std = network, stages, mean, std

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        x = normalise(pixels, self.mean, self.std)
        maps = self.network.forward_intermediates(x, indices=self.stages, intermediates_only=True)
        grid = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        return torch.cat([images.resize_map(m, grid) for m in maps], dim=1)


class SideBySide(Encoder):
    """Two or more encoders concatenated on the grid of the first."""

    def __init__(self, parts: list[Encoder]):
        super().__init__("+".join(p.key for p in parts), sum(p.width for p in parts), parts[0].patch)
        self.parts = nn.ModuleList(parts)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        grid = (pixels.shape[1] // self.patch, pixels.shape[2] // self.patch)
        return torch.cat([images.resize_map(p.features(pixels), grid) for p in self.parts], dim=1)


def _efficientnet(key: str, weights_here: bool) -> Encoder:
    import timm

    network = timm.create_model("tf_efficientnet_lite2", pretrained=False)
    if weights_here:
        network.load_state_dict(files.read_tensors(fetch.require("efficientnet_lite2") / "model.safetensors")[0])
    return FeaturePyramid(key, network, [2, 3, 4], 16, (127 / 255,) * 3, (128 / 255,) * 3)


def _mobile_sam(key: str, weights_here: bool) -> Encoder:
    from fmbseg.models.sam import build_mobile_sam, read_sam

    sam = read_sam("mobile_sam") if weights_here else build_mobile_sam()
    mean, std = ((value.flatten() / 255).tolist() for value in (sam.pixel_mean, sam.pixel_std))
    return FeaturePyramid(key, sam.image_encoder.trunk, [2, 3], 16, tuple(mean), tuple(std))


ENCODER_NAMES = ("efficientnet_lite2", "mobile_sam", *VITS)


def _build(name: str, key: str, weights_here: bool) -> Encoder:
    if name in VITS:
        return Transformer(key, VITS[name], VITS[name].load() if weights_here else VITS[name].build())
    return (_efficientnet if name == "efficientnet_lite2" else _mobile_sam)(key, weights_here)


def weights_key(name: str) -> str:
    """An encoder's name with a hash of its weights, without loading it. Raises WeightsError where they are not here."""
    parts = [part.strip() for part in name.split("+")]
    return "+".join(part if part.startswith("random:") else f"{part}@{fetch.key(part)}" for part in parts)


def load_encoder(name: str, device: str = "cpu", precision: Precision = "fp32") -> Encoder:
    """A frozen encoder by name, several joined by "+" (``efficientnet_lite2+mobile_sam``).

    ``random:NAME`` gives the architecture with random weights (tests).
    Raises ParameterError for an unknown name or device, WeightsError where weights are not here.
    """
    check_device(device)
    parts = []
    for part in name.split("+"):
        base = part.strip().removeprefix("random:")
        if base not in ENCODER_NAMES:
            raise ParameterError(
                f"encoder = {name!r}: no such encoder {base!r}; known are {', '.join(ENCODER_NAMES)}, and several joined by +"
            )
        here = base == part.strip()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts.append(_build(base, weights_key(part), here))
    encoder = parts[0] if len(parts) == 1 else SideBySide(parts)
    encoder.key, encoder.precision = precision_key(encoder.key, precision), precision
    return encoder.eval().requires_grad_(False).to(device)
