"""Modules in the conventions of the Hugging Face hub: a folder with ``model.safetensors``, ``config.json`` and a model card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fmbseg import files
from fmbseg.data import fetch
from fmbseg.data.fetch import Weight
from fmbseg.errors import DataError, ParameterError
from fmbseg.models import clip

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"

LOADING = """    from fmbseg import Segmenter

    segmenter = Segmenter.from_pretrained("{name}")
    labels = segmenter.segment("photo.jpg", "cat, sofa, rug", background="wall, floor").labels"""


def write(module: Path, described: dict[str, Any], folder: str | Path, name: str, licence: str) -> Path:
    """Write a module's file as such a folder, less the paths of this machine in its metadata; returns the folder.

    described: its metadata, which is config.json too; name: what the card calls it; licence: as the hub spells it. A model card
    beside the module (NAME.md) is a part of the card. Raises ParameterError for the module's own folder, and where a README.md or
    config.json is there without a module.
    """
    folder, described = Path(folder), _without_paths(described)
    if (folder / WEIGHTS).exists() and (folder / WEIGHTS).samefile(module):
        raise ParameterError(f"{folder}: this module was loaded from there; give another folder")
    files.check_place(folder, folder=True, name="folder")
    for file in (folder / CONFIG, folder / CARD):
        if file.exists() and not (folder / WEIGHTS).exists():
            raise ParameterError(f"{file}: is there without a module, and that of this one would replace it; give another folder")
    files.write_tensors(folder / WEIGHTS, files.read_tensors(module)[0], {"fmbseg": json.dumps(described, allow_nan=False)})
    files.write_json(folder / CONFIG, described)
    own = module.with_suffix(".md")
    with files.atomic_path(folder / CARD) as part:
        part.write_text(card(described, name, licence) + (own.read_text(encoding="utf-8") if own.is_file() else ""), encoding="utf-8")
    return folder


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items()}
    is_path = isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value))
    return os.path.basename(value.rstrip(os.sep)) if is_path else value


def frozen(described: dict[str, Any]) -> list[Weight]:
    """The weights that a module needs beside its own: those of its encoder and its image-text model."""
    names = {part.strip() for part in f"{described['encoder']}+{described['clip']}".split("+")}
    if clip.LIT in names:  # its parts have their own names
        names |= {weight.name for weight in fetch.TABLE if "embedded" in weight.profiles and "image-text" in weight.use}
    return [weight for weight in fetch.TABLE if weight.name in names]


def card(described: dict[str, Any], name: str, licence: str) -> str:
    """The model card: what the module is, what it was trained on, how it is loaded, and whose weights it needs beside its own."""
    needed = frozen(described)
    losses = described.get("curve", {}).get("loss", [])
    rows = {
        "encoder, frozen": described["encoder"],
        "image-text model, frozen": described["clip"],
        "module": described["module"]["module"],
        "trained on": f"{described['collection']}: n = {described['images']} images, {len(described['classes'])} classes",
        "pre-aligned on": f"n = {described['prealigned']} images" if described.get("prealigned") else "",
        "loss": f"{losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last" if losses else "",
        "notes": "; ".join(described.get("notes", [])),
    }
    return "\n".join(
        [
            *("---", "library_name: fmbseg", "pipeline_tag: image-segmentation", f"license: {licence}", "---", "", f"# {name}", ""),
            "Segments any image into any words: the alignment module of *Annotation Free Semantic Segmentation with Vision Foundation",
            "Models*. It holds no weights of the encoder or the image-text model.",
            *("", LOADING.format(name=name), "", "| | |", "| --- | --- |"),
            *(f"| {what} | {value} |" for what, value in rows.items() if value),
            *("", "Needed beside it: `fmbseg fetch " + " ".join(weight.name for weight in needed) + "`" if needed else "", ""),
            *(f"- {weight.name}: {weight.licence}" for weight in needed),
            *("", ""),
        ]
    )


def find(name: str | Path, revision: str | None = None) -> Path:
    """The file of a module: the one given, that of such a folder, or that of a repository of the hub, "owner/name".

    revision: of the repository; none: its newest. Raises DataError where it is neither here nor reachable.
    """
    path = Path(name)
    if path.is_dir():
        return path / WEIGHTS
    owner, slash, repository = str(name).partition("/")
    if path.exists() or path.suffix == ".safetensors" or not (owner and slash and repository) or "/" in repository:
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(name), WEIGHTS, revision=revision))
    except Exception as error:  # the hub's client raises a dozen kinds for a network that is not there
        raise DataError(
            f"{name}: no file or folder here, and its {WEIGHTS} could not be had from the hub ({type(error).__name__});"
            " check the spelling and the network"
        ) from error


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload such a folder to a repository of the hub, which is made where it is not there; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a module of fmbseg"))
    except Exception as error:  # as in ``find``
        raise DataError(
            f"{repository}: could not be uploaded to the hub ({type(error).__name__}: {str(error).splitlines()[0]});"
            " check the network and: hf auth login"
        ) from error
