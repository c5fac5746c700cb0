"""What a profile costs: FLOPs counted on its architectures (no weights, no images), and time, memory and disk computed from them.

    python benchmarks/costs.py                       the tables of docs/costs.md
    python benchmarks/costs.py paper --set precision=bf16

Counted: matrix products and convolutions of one image of 640 x 480. Not counted: reading images, element-wise work, the
suppression and coding of masks. Times are the FLOPs over an ASSUMED share of the processor's data-sheet rate: a computation,
not a measurement.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fmbseg import cli, profiles
from fmbseg.data import fetch, images
from fmbseg.models.clip import LIT, ImageText, load_clip
from fmbseg.models.encoders import Encoder, load_encoder
from fmbseg.models.sam import SCALED_PIXELS, load_sam
from fmbseg.params import ModuleParams
from fmbseg.schemas import EvaluateRun
from fmbseg.stage1 import features, windows
from fmbseg.stage2 import alignment
from fmbseg.stage2.losses import BLOCK

from throughput import random_weights  # isort: skip

T = TypeVar("T")
HEIGHT, WIDTH = 480, 640  # COCO's commonest size
LABEL = 20_000  # bytes of a pseudo label on disk: assumed; Stage 1.1 alone takes 5,600 in the embedded profile
DETECTED = 5  # classes of an image that Stage 1.1 queries: assumed
SIZES = {"paper": 118_287, "base": 20_000, "embedded": 128, "smoke": 6}  # training images


@dataclass(frozen=True)
class Machine:
    """peak: FLOP/s of the data sheet by precision; used: the share of it that is assumed to be reached."""

    name: str
    peak: dict[str, float]
    used: float

    def seconds(self, flops: float, precision: str) -> float:
        return flops / (self.peak[precision] * self.used)


MACHINES = (
    Machine("2 cores", {"fp32": 0.19e12, "bf16": 0.19e12}, 0.2),  # 2 x 3 GHz x 32 FLOP a cycle (two AVX2 multiply-adds)
    Machine("one 24 GB GPU", {"fp32": 35e12, "bf16": 71e12}, 0.4),  # GeForce RTX 3090
    Machine("one 80 GB GPU", {"fp32": 19.5e12, "bf16": 312e12}, 0.4),  # A100, no TF32
)


class Memory(TorchDispatchMode):
    """The most bytes of tensors, made inside, that were alive at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive | given:  # views of what was given, such as parameters, are not made here
                    self.alive.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Count:
    """FLOPs of one run and the bytes alive at its peak, the model's own parameters apart."""

    flops: float
    memory: int


def count(function: Callable[[], object]) -> Count:
    """FLOPs and memory of a function of tensors on the meta device: shapes only, nothing is computed."""
    with FlopCounterMode(display=False) as flops:
        function()
    with Memory() as memory:
        function()
    return Count(flops.get_total_flops(), memory.peak)


def parameters(*models: nn.Module) -> int:
    return sum(p.numel() for model in models for p in model.parameters())


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def params_of(profile: str, settings: dict) -> EvaluateRun:
    loaded = profiles.load("evaluate", profile, settings)
    return random_weights(loaded.model_copy(update={"device": "cpu"}))


def crops_of(clip, p: EvaluateRun) -> int:
    """How many crops the image gives."""
    cell, side, stride = features.crop_grid(clip, p)
    height, width = images.target_size(HEIGHT, WIDTH, p.short_side, p.long_limit, cell)
    return len(windows.windows(height // cell, width // cell, side, stride))


def built(load: Callable[[str], T]) -> T:
    """A model made on the meta device: nothing is drawn at random and nothing takes memory."""
    try:
        with torch.device("meta"):
            return load("meta")
    except RuntimeError:  # a network of timm, which reads values while it is built; those are small
        return load("cpu")


def models(p: EvaluateRun) -> tuple[ImageText, nn.Module, Encoder]:
    """The three frozen models with shapes only. The stand-in has no random weights: its real ones are read, then left."""
    clip = load_clip(p.clip, "cpu", p.crop_input) if p.clip == LIT else built(lambda device: load_clip(p.clip, device, p.crop_input))
    sam = built(lambda device: load_sam(p.sam, device).model)
    encoder = built(lambda device: load_encoder(p.encoder, device))
    clip.model.to("meta")
    clip.device = "meta"
    return clip, sam.to("meta"), encoder.to("meta")


def cost(profile: str, settings: dict) -> dict:
    """FLOPs an image of each step, parameters, memory and disk of a profile."""
    p = params_of(profile, settings)
    clip, sam, encoder = models(p)
    crops, side = crops_of(clip, p), p.crop_input or clip.image_size
    with torch.no_grad():
        dimensions = clip._encode(empty(1, 3, side, side), p.path, p.residual).tokens.shape[1]
        crop = count(lambda: clip._encode(empty(1, 3, side, side), p.path, p.residual))

    size, width = sam.image_encoder.img_size, sam.prompt_encoder.embed_dim
    grid, points = size // 16, p.points_per_side**2
    prompts = {"image_embeddings": empty(1, width, grid, grid), "image_pe": empty(1, width, grid, grid), "multimask_output": True}

    def decode(batch: int) -> Count:
        given = {"sparse_prompt_embeddings": empty(batch, 2, width), "dense_prompt_embeddings": empty(batch, width, grid, grid)}
        return count(lambda: sam.mask_decoder(**prompts, **given))

    with torch.no_grad():
        embed, one, many = count(lambda: sam.image_encoder(empty(1, 3, size, size))), decode(1), decode(p.points_per_batch)
    masks = min(p.points_per_batch * 3 * HEIGHT * WIDTH, SCALED_PIXELS) * 4  # masks that are scaled at once

    square, window = (n // encoder.patch * encoder.patch for n in (p.image_size, p.window))
    with torch.no_grad():
        encode = count(lambda: encoder.features(empty(1, square, square, 3)))
        encode_window = count(lambda: encoder.features(empty(1, window, window, 3)))
    module = alignment.Alignment(encoder.width, dimensions, ModuleParams(**p.part(ModuleParams))).to("meta")
    patches, batch = square // encoder.patch, p.images_per_batch
    step = count(lambda: module(empty(batch, encoder.width, patches, patches)).sum().backward())
    n = batch * patches**2  # at most: all of them labelled
    products_of_patches = 3 * 2 * n * n * dimensions  # z z' forward, and twice as much backward
    with torch.no_grad():
        align = count(lambda: module(empty(1, encoder.width, window // encoder.patch, window // encoder.patch)))
    places = len(windows.windows(*images.target_size(HEIGHT, WIDTH, p.segment_short_side, p.segment_long_limit), p.window, p.window_stride))

    cell = features.crop_grid(clip, p)[0]
    height, width_ = (side // cell for side in images.target_size(HEIGHT, WIDTH, p.short_side, p.long_limit, cell))
    kept = 2 * ((height * width_ + crops) * dimensions + patches**2 * encoder.width) if p.keep_features else 0  # fp16
    kept += 2 * width * grid**2 if p.keep_embeddings else 0

    weights = 4 * parameters(clip.model, sam)
    trained = 4 * 4 * parameters(module)  # weights, gradients, two moments
    return {
        "precision": p.precision,
        "epochs": p.epochs,
        "crops": crops,
        "parameters": {
            "clip": parameters(clip.model),
            "sam": parameters(sam),
            "encoder": parameters(encoder),
            "module": parameters(module),
        },
        "flops": {
            "CLIP features": crops * crop.flops,
            "SAM embedding": embed.flops,
            "Stage 1.1 decoding": DETECTED * one.flops,
            "automatic masks": points * many.flops / p.points_per_batch if p.stages != "1.1" else 0,
            "encoder patches": encode.flops,
            "training, an epoch": (step.flops + products_of_patches) / batch,
            "segmentation": places * (encode_window.flops + align.flops),
        },
        "memory": {
            "labels": weights + max(p.crop_batch * crop.memory, embed.memory, many.memory + masks),
            "training": 4 * parameters(encoder) + trained + step.memory + 4 * 3 * (BLOCK + n * dimensions),  # Eq. 1, blockwise
            "segmentation": 4 * parameters(encoder, module) + encode_window.memory,
        },
        "disk": {
            "weights and images": 1e6 * sum(weight.megabytes for weight in fetch.TABLE if profile in weight.profiles),
            "kept of images": SIZES[profile] * kept,
            "pseudo labels": SIZES[profile] * LABEL,
        },
    }


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1g} s"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="FLOPs, time, memory and disk of profiles, computed.")
    parser.add_argument("profiles", nargs="*", default=list(SIZES), help=f"of {', '.join(SIZES)} (default: all)")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="any parameter; may be given again")
    options = parser.parse_args(arguments)
    made = {profile: cost(profile, cli.settings(options.set)) for profile in options.profiles}

    print("| profile | images | parameters: CLIP, SAM, encoder, module | crops an image |\n| --- | --- | --- | --- |")
    for profile, c in made.items():
        print(f"| {profile} | {SIZES[profile]:,} | {', '.join(f'{n / 1e6:.1f} M' for n in c['parameters'].values())} | {c['crops']} |")
    names = list(next(iter(made.values()))["flops"])
    print(f"\n| GFLOPs an image | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}")
    for profile, c in made.items():
        values = [f"{c['flops'][name] / 1e9:,.4g}" for name in names]
        print(f"| {profile} | {' | '.join(values)} |")
    print("\n| computed, not measured | on | label all | encode all | train | segment an image | memory: label, train, segment |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for profile, c in made.items():
        f, images_ = c["flops"], SIZES[profile]
        label = sum(f[name] for name in names[:4]) * images_
        work = (label, f["encoder patches"] * images_, f["training, an epoch"] * images_ * c["epochs"], f["segmentation"])
        memory = ", ".join(f"{m / 1e9:.1f} GB" for m in c["memory"].values())
        for machine in MACHINES:
            frozen = [c["precision"], c["precision"], "fp32", c["precision"]]  # the module trains in fp32
            times = " | ".join(duration(machine.seconds(w, q)) for w, q in zip(work, frozen))
            print(f"| {profile}, {c['precision']} | {machine.name} | {times} | {memory} |")
    print("\n| disk, GB, computed | fetched | features, patches, embeddings | pseudo labels |\n| --- | --- | --- | --- |")
    for profile, c in made.items():
        print(f"| {profile} | {' | '.join(f'{b / 1e9:.1f}' for b in c['disk'].values())} |")


if __name__ == "__main__":
    main()
