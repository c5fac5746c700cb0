"""Embedded checkpoints, read once without unpickling code and kept as safetensors under the names we load them by."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from fmbseg import storage
from fmbseg.errors import WeightsError


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise WeightsError(f"{path.name}: not a plain checkpoint of tensors (damaged, or it holds code); it was not loaded") from error


def mobile_sam(checkpoint: Path, target: Path) -> None:
    """MobileSAM's names -> timm's TinyViT inside ``segment_anything.modeling.Sam``."""
    state = {}
    for name, tensor in _load(checkpoint).items():
        head, _, rest = name.partition("image_encoder.")
        if head == "" and rest:
            name = _tiny_vit_name(rest)
            if name is None:
                continue
            name = f"image_encoder.{name}"
        state[name] = tensor
    storage.write_tensors(target, state)


def _tiny_vit_name(name: str) -> str | None:
    """timm's name of a tensor of MobileSAM's image encoder; None for its unused classifier."""
    parts = name.replace(".c.", ".conv.").split(".")
    if parts[0] in ("head", "norm_head"):
        return None
    if parts[0] == "neck":
        return name
    if parts[0] == "patch_embed":
        parts[1:3] = {"0": ["conv1"], "2": ["conv2"]}[parts[2]]
    elif parts[0] == "layers":
        stage = int(parts[1]) + (parts[2] == "downsample")  # timm counts a downsampling to the stage after it
        parts[:2] = ["stages", str(stage)]
    return ".".join(["trunk", *parts])


def efficientnet_lite2(checkpoint: Path, target: Path) -> None:
    """EfficientNet-Lite2's tensors stand in the order of timm's own state dict; every shape is checked."""
    import timm

    names = timm.create_model("tf_efficientnet_lite2", pretrained=False).state_dict()
    tensors = _load(checkpoint)
    if len(names) != len(tensors) or any(a.shape != b.shape for a, b in zip(names.values(), tensors.values())):
        raise WeightsError(f"{checkpoint.name}: its tensors do not fit timm's tf_efficientnet_lite2; it was not converted")
    storage.write_tensors(target, dict(zip(names, tensors.values())))


def plain(checkpoint: Path, target: Path) -> None:
    """A checkpoint whose names are already those we load it by."""
    storage.write_tensors(target, _load(checkpoint))


CONVERSIONS = {
    "mobile_sam.pt": mobile_sam,
    "efficientnet-lite2-9656183e.pth": efficientnet_lite2,
}


def convert_folder(folder: Path) -> None:
    """Replace a pickled checkpoint in a folder by ``model.safetensors``."""
    for checkpoint in [*folder.glob("*.pt"), *folder.glob("*.pth")]:
        CONVERSIONS.get(checkpoint.name, plain)(checkpoint, folder / "model.safetensors")
        checkpoint.unlink()
