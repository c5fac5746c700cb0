"""Trained modules as files, with a description of their training; and the segmenter of such a file."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fmbseg import files
from fmbseg.data import images
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.errors import DataError
from fmbseg.params import ModuleParams, SegmentParams
from fmbseg.runs import cache, hub
from fmbseg.runs.cache import Models
from fmbseg.stage2 import segmenter
from fmbseg.stage2.alignment import Alignment
from fmbseg.stage2.segmenter import AlignedEncoder, Segmentation, Words
from fmbseg.stage2.training import TrainState


def place(profile: str = "embedded", name: str = "alignment") -> Path:
    """Where a module of a profile is kept."""
    return files.home() / "modules" / profile / f"{name}.safetensors"


SHIPPED = files.ASSETS / "fmbseg-embedded.safetensors"
"""The module that comes with the repository, for the encoder of the embedded profile. Its model card is beside it."""


def default(profile: str) -> Path:
    """The profile's own module where one was trained, else the one that comes with the repository."""
    own = place(profile)
    return own if own.is_file() or profile != "embedded" else SHIPPED


def save(path: str | Path, alignment: Alignment, metadata: dict[str, Any], keep_former: bool = False) -> Path:
    """Write a module and a description of its training (parameters, models, vocabulary, notes) as one safetensors file.

    keep_former: another module at that path is kept as NAME.previous.safetensors, and one line says so.
    """
    path = Path(path)
    described = {"width": alignment.width, "out": alignment.out, "module": alignment.params.part(ModuleParams)} | metadata
    with files.atomic_path(path) as part:
        files.write_tensors(part, alignment.state_dict(), {"fmbseg": json.dumps(described, allow_nan=False)})
        if keep_former and cache.kept(path, load) and files.file_sha256(path) != files.file_sha256(part):
            previous = path.with_name(f"{path.stem}.previous.safetensors")
            with files.atomic_path(previous) as copy:
                shutil.copyfile(path, copy)
            print(f"the module that was {path} is kept as {previous}")
    return path


def load(path: str | Path) -> tuple[Alignment, dict[str, Any]]:
    """Read a module and its metadata. Raises DataError when there is none, or the file is not one that ``save`` wrote."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no trained module there; run notebook 04 or: fmbseg train")
    try:
        tensors, metadata = files.read_tensors(path)
    except DataError as error:
        raise DataError(f"{path}: no alignment module, or a damaged one; give the file that training wrote, or train it again") from error
    if "fmbseg" not in metadata:
        raise DataError(f"{path}: not an alignment module of fmbseg; give the file that training wrote")
    try:
        described = json.loads(metadata["fmbseg"])
        alignment = Alignment(described["width"], described["out"], ModuleParams(**described["module"]))
        alignment.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: its description does not fit its tensors ({str(error).splitlines()[0]}); train it again") from error
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise DataError(f"{path}: its weights are not finite numbers; train it again with a lower learning_rate")
    return alignment.eval(), described


def seconds(path: Path) -> float:
    """Seconds that the training of a module took, from the record beside it; 0 without a record of this module."""
    try:
        record = files.read_json(path.with_suffix(".json"))
        return record["seconds"] if record["weights"]["module"] == files.sha256_of(path) else 0.0
    except (DataError, KeyError, TypeError):
        return 0.0


# ---------------------------------------------------------------- checkpoints of a training that is under way


def checkpoint(path: Path) -> Path:
    """The path of the checkpoint of a module's training, beside the module's file."""
    return path.with_name(f"{path.stem}.checkpoint.safetensors")


def save_state(path: Path, state: TrainState, key: str) -> None:
    """Write the state of a training. key: the key of the training, over all its inputs."""
    steps = pd.DataFrame(state.steps)
    tensors = {f"weights.{name}": tensor for name, tensor in state.weights.items()}
    tensors |= {f"optimiser.{name}": tensor for name, tensor in state.optimiser.items()}
    tensors |= {"generator": state.generator} | {f"steps.{name}": torch.from_numpy(steps[name].to_numpy(copy=True)) for name in steps}
    described = {"key": key, "done": state.done, "seconds": state.seconds, "columns": list(steps)}
    files.write_tensors(path, tensors, {"fmbseg": json.dumps(described, allow_nan=False)})


def load_state(path: Path, key: str) -> TrainState | None:
    """The state of the training with this key; None where the file is missing, damaged or of another training."""
    try:
        tensors, metadata = files.read_tensors(path)
        described = json.loads(metadata["fmbseg"])
        if described["key"] != key or not all(tensor.isfinite().all() for tensor in tensors.values()):
            return None
        parts: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "optimiser": {}, "steps": {}}
        for name, tensor in tensors.items():
            if name != "generator":
                part, rest = name.split(".", 1)
                parts[part][rest] = tensor
        steps = pd.DataFrame({name: parts["steps"][name].numpy() for name in described["columns"]}).to_dict("records")
        return TrainState(described["done"], parts["weights"], parts["optimiser"], tensors["generator"], steps, described["seconds"])
    except (DataError, KeyError, TypeError, ValueError):
        return None


class Segmenter(segmenter.Segmenter):
    """``stage2.Segmenter`` of a module's file: load once, ``segment(image, classes)`` as often as you like.

    path: the module's file; described: its metadata.
    """

    path: Path
    described: dict[str, Any]

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

        path: the module's file; None: the embedded profile's own, else the one that comes with the repository. templates,
        average: for the words at test time, as in ``class_texts``; None: those of the training. The frozen models stay in
        memory for the next module that uses them. Raises DataError where there is no module.
        """
        path = path or default("embedded")
        (module, described), params = load(path), params or SegmentParams()
        words = templates or described.get("templates", "one"), average or described.get("text_average", "unit")
        models = Models(described["clip"], described.get("crop_input"), "", described["encoder"], params.precision, *words, device)
        embedder = AlignedEncoder(models.encoder, module, f"fmbseg {files.sha256_of(path)[:16]}", device)
        made = cls(embedder, models.clip, params, *words)
        made.path, made.described = Path(path), described
        return made

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None, **options: Any) -> Segmenter:
        """``load`` of a folder that ``save_pretrained`` wrote, or of a repository of the hub, "owner/name" (``hub.find``)."""
        return cls.load(hub.find(name, revision), **options)

    def save_pretrained(self, folder: str | Path, name: str = "", licence: str = "apache-2.0") -> Path:
        """Write the module with its model card in the hub's conventions (``hub.write``); the frozen models are not in it.

        name: what the card loads; none: the folder's; licence: of the module, as the hub spells it.
        """
        return hub.write(self.path, self.described, folder, name or Path(folder).name, licence)

    def push_to_hub(self, repository: str, private: bool = False, licence: str = "apache-2.0") -> str:
        """``save_pretrained`` into a repository of the hub, "owner/name"; returns its address. Raises DataError where that fails."""
        with tempfile.TemporaryDirectory() as folder:
            return hub.push(self.save_pretrained(folder, repository, licence), repository, private)

    def segment(
        self,
        image: np.ndarray | str | Path,
        classes: Words | LabelSpace,
        background: Sequence[str] | str | None = None,
        masks: Sequence[np.ndarray] = (),
    ) -> Segmentation:
        """As ``stage2.Segmenter.segment``, also of an image file."""
        return super().segment(images.read_image(image) if isinstance(image, (str, Path)) else image, classes, background, masks)
