"""Trained modules as files: what made them travels with them; and the segmenter of such a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmbseg import files
from fmbseg.data import images
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.errors import DataError
from fmbseg.models.clip import load_clip
from fmbseg.models.encoders import load_encoder
from fmbseg.params import ModuleParams, SegmentParams
from fmbseg.stage2 import segmenter
from fmbseg.stage2.alignment import Alignment
from fmbseg.stage2.segmenter import AlignedEncoder, Segmentation


def place(profile: str = "embedded", name: str = "alignment") -> Path:
    """Where a module of a profile is kept."""
    return files.home() / "modules" / profile / f"{name}.safetensors"


SHIPPED = Path(__file__).parents[1] / "assets" / "fmbseg-embedded.safetensors"
"""The module that comes with the repository, for the embedded profile's encoder; its model card lies beside it."""


def default(profile: str) -> Path:
    """The profile's own module where one was trained, else the one that comes with the repository."""
    own = place(profile)
    return own if own.is_file() or profile != "embedded" else SHIPPED


def save(path: str | Path, alignment: Alignment, metadata: dict[str, Any]) -> Path:
    """Write a module and what made it (parameters, encoder, image-text model, vocabulary, notes) as one safetensors file."""
    described = {"width": alignment.width, "out": alignment.out, "module": alignment.params.part(ModuleParams)} | metadata
    return files.write_tensors(path, alignment.state_dict(), {"fmbseg": json.dumps(described)})


def load(path: str | Path) -> tuple[Alignment, dict[str, Any]]:
    """Read a module and its metadata. Raises DataError when there is none, or the file is not one that ``save`` wrote."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no trained module there; run notebook 04 or: fmbseg train")
    tensors, metadata = files.read_tensors(path)
    if "fmbseg" not in metadata:
        raise DataError(f"{path}: not an alignment module of fmbseg; give the file that training wrote")
    try:
        described = json.loads(metadata["fmbseg"])
        alignment = Alignment(described["width"], described["out"], ModuleParams(**described["module"]))
        alignment.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: its description does not fit its tensors ({str(error).splitlines()[0]}); train it again") from error
    return alignment.eval(), described


class Segmenter(segmenter.Segmenter):
    """``stage2.Segmenter`` of a module's file: load once, ``segment(image, classes)`` as often as you like."""

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        device: str = "cpu",
        params: SegmentParams | None = None,
        templates: str | None = None,
        average: str | None = None,
    ) -> Segmenter:
        """A trained module with the encoder and the image-text model that it was trained with.

        path: the module's file; none: the embedded profile's own, else the one that comes with the repository. templates,
        average: of the words at test time, as ``class_texts`` has them; none: what it was trained with. Raises DataError where there is no module.
        """
        path = path or default("embedded")
        module, described = load(path)
        params = params or SegmentParams()
        encoder = load_encoder(described["encoder"], device, params.precision)
        embedder = AlignedEncoder(encoder, module, f"fmbseg {files.sha256_of(path)[:16]}", device)
        clip = load_clip(described["clip"], device, described.get("crop_input"), params.precision)
        return cls(embedder, clip, params, templates or described.get("templates", "one"), average or described.get("text_average", "unit"))

    def segment(
        self, image: np.ndarray | str | Path, classes: Sequence[str] | str | LabelSpace, background: Sequence[str] | str | None = None
    ) -> Segmentation:
        """As ``stage2.Segmenter.segment``, also of an image file."""
        return super().segment(images.read_image(image) if isinstance(image, (str, Path)) else image, classes, background)
