"""Files on disk: where they lie, how they are written whole or not at all, and what their keys cover."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmbseg.errors import DataError

if TYPE_CHECKING:
    import torch


def home() -> Path:
    """Folder of everything fetched or cached: ``$FMBSEG_HOME``, else ``~/.cache/fmbseg``."""
    return Path(os.environ.get("FMBSEG_HOME") or Path.home() / ".cache" / "fmbseg").expanduser().absolute()


def checkout() -> Path | None:
    """The clone of the project that the working folder lies in: the nearest folder that holds ``notebooks/`` and ``params/``."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "params").is_dir() and (folder / "notebooks").is_dir():
            return folder
    return None


def project_root() -> Path:
    """``checkout()`` for what needs the notebooks. Raises DataError outside a clone."""
    if (found := checkout()) is None:
        raise DataError(
            f"{Path.cwd()}: neither this folder nor one above it holds notebooks/ and params/;"
            " run this command inside a clone of the project"
        )
    return found


def working_root() -> Path:
    """What a relative ``results_dir`` is relative to: the clone that the working folder lies in, else the working folder."""
    return checkout() or Path.cwd()


@contextmanager
def atomic_path(path: str | Path):
    """Yield a temporary path beside ``path`` and rename it into place at the end; on an error nothing is left.

    A killed run therefore leaves only whole files.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o666 & ~_umask())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, value: Any) -> Path:
    """Write what JSON can hold, indented, keys in their order, atomically. Raises DataError for a number that is not finite."""
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=False, allow_nan=False)
    except ValueError as error:
        raise DataError(
            f"{path}: a number to be written there is not finite ({error}); nothing was written, so look at its input"
        ) from error
    with atomic_path(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
    return Path(path)


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises DataError when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); delete it and run its step again") from error


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write named tensors as safetensors, atomically; metadata: text beside them."""
    import safetensors.torch

    with atomic_path(path) as part:
        safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, metadata=dict(metadata or {}))
    return Path(path)


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file: (tensors, metadata). Raises DataError when it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; run the step that writes it first")
    try:
        with safe_open(path, framework="pt") as stream:
            return {key: stream.get_tensor(key) for key in stream.keys()}, dict(stream.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: damaged ({error}); delete it and run the step that writes it again") from error


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(*parts: Any) -> str:
    """A short key over anything JSON can hold: the same content gives the same key, on any machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def sha256_of(path: str | Path) -> str:
    """The hash of an image or another small file, read again only when the file has changed."""
    path = Path(path)
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); put it back or leave it out") from error
    return _sha256_at(str(path), status.st_size, status.st_mtime_ns)


@functools.cache
def _sha256_at(path: str, size: int, changed: int) -> str:
    return file_sha256(path)
