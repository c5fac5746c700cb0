"""Frozen encoders by name: what the alignment module grounds in language (Sec. 3.3)."""

from __future__ import annotations

import torch
from torch import nn

from fmbseg import files
from fmbseg.data import fetch, images
from fmbseg.data.images import normalise
from fmbseg.errors import ParameterError
from fmbseg.models import vit
from fmbseg.models.precision import Precision, autocast
from fmbseg.models.precision import key as precision_key
from fmbseg.models.vit import VITS, Vit
from fmbseg.params import check_device


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


class Transformer(Encoder):
    """A vision transformer of the hub: its last layer's patch tokens, after its final norm."""

    def __init__(self, key: str, kind: Vit, model: nn.Module):
        super().__init__(key, model.config.hidden_size, model.config.patch_size)
        self.kind, self.model = kind, model

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        x = normalise(pixels, *self.kind.normalisation)
        tokens = vit.patch_tokens(self.kind, self.model, x)
        shape = (len(x), x.shape[2] // self.patch, x.shape[3] // self.patch, self.width)
        return tokens.reshape(shape).permute(0, 3, 1, 2)


class FeaturePyramid(Encoder):
    """Several feature maps of one convolutional network, side by side on the grid of stride ``patch``.

    stages: indices of the network's stages; each map is scaled to the grid, bilinear.
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
        return Transformer(key, VITS[name], (vit.load if weights_here else vit.build)(VITS[name]))
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
