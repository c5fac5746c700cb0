"""Numeric precision of the frozen models: decided here and nowhere else."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import nn

Precision = Literal["fp32", "bf16"]


def autocast(device: str, precision: Precision) -> torch.autocast:
    """Context in which matrix products run at this precision; "fp32" changes nothing."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


def lower(module: nn.Module, device: str, precision: Precision) -> None:
    """Make a module of another package run at this precision; what it returns stays ``float32``."""
    if precision == "fp32":
        return
    forward = module.forward

    @functools.wraps(forward)
    def lowered(*args, **kwargs):
        with autocast(device, precision):
            out = forward(*args, **kwargs)
        return tuple(o.float() for o in out) if isinstance(out, tuple) else out.float()

    module.forward = lowered


def precision_key(name: str, precision: Precision) -> str:
    """A model's key for caches and records, which names its precision unless that is float32."""
    return name if precision == "fp32" else f"{name} {precision}"
