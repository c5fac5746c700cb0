"""Files on disk: where they are, how they are written completely or not at all, and their names and keys."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import tempfile
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmbseg.errors import DataError, ParameterError, StorageError

if TYPE_CHECKING:
    import torch


def home() -> Path:
    """Folder of everything that is fetched or cached: ``$FMBSEG_HOME``, else ``~/.cache/fmbseg``.

    Raises ParameterError where neither is known.
    """
    given = os.environ.get("FMBSEG_HOME") or "~/.cache/fmbseg"
    try:
        return Path(given).expanduser().absolute()
    except RuntimeError:
        raise ParameterError(f"{given}: this user has no home folder; set FMBSEG_HOME to a folder for weights and caches") from None


def checkout() -> Path | None:
    """The clone of the project around the working folder: the nearest folder that holds ``notebooks/`` and ``params/``."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "params").is_dir() and (folder / "notebooks").is_dir():
            return folder
    return None


def project_root() -> Path:
    """``checkout()`` for steps that need the notebooks. Raises DataError outside a clone."""
    if (found := checkout()) is None:
        raise DataError(
            f"{Path.cwd()}: neither this folder nor one above it holds notebooks/ and params/;"
            " run this command inside a clone of the project"
        )
    return found


def working_root() -> Path:
    """The folder that a relative ``results_dir`` starts from: the clone around the working folder, else the working folder."""
    return checkout() or Path.cwd()


ASSETS = Path(__file__).parent / "assets"
"""Data files of the package: tables, word lists, the weights of the stand-in and of the shipped module."""


@functools.cache
def asset(name: str) -> Any:
    """The content of a JSON or YAML file of ASSETS, read once; do not change it."""
    import yaml

    text = (ASSETS / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else yaml.safe_load(text)


CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTDIR, errno.EISDIR, errno.EIO}
"""Error numbers of the operating system that mean that a place cannot be written."""


def _storage_error(path: Path, error: OSError) -> StorageError:
    remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "give a place that can be written"
    return StorageError(f"{path}: cannot be written ({error.strerror or error}); {remedy}, then run again: what was written is kept")


@contextmanager
def atomic_path(path: str | Path):
    """Yield a temporary path beside ``path`` and rename it to ``path`` at the end; on an error it is removed.

    So a killed run leaves only complete files. Raises StorageError where the place cannot be written or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".part")
    except OSError as error:
        raise _storage_error(path, error) from error
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o666 & ~_umask())
        os.replace(part, path)
    except OSError as error:
        if error.errno in CANNOT_WRITE and error.filename in (None, name):  # not an error of a file that was read meanwhile
            raise _storage_error(path, error) from error
        raise
    finally:
        part.unlink(missing_ok=True)


def check_place(path: str | Path, folder: bool, name: str) -> None:
    """Raise ParameterError, before any work, where a folder or a file could not be written at ``path``; nothing is left there.

    name: the option or parameter that gave the path.
    """
    path = Path(path).absolute()
    if path.exists() and path.is_dir() != folder:
        wanted, there = ("folder", "file") if folder else ("file", "folder")
        raise ParameterError(f"{name} {path}: is a {there}, and a {wanted} is to be written there; give another path")
    place = path if folder and path.exists() else next(above for above in path.parents if above.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".fmbseg."):
            pass
    except OSError as error:
        raise ParameterError(f"{name} {path}: cannot be written ({error.strerror}); give a place that can be written") from error


LONGEST_NAME = 200
"""Bytes of a file's name without its suffix."""

WHOLE_NAME = 255
"""Bytes of a file's name that file systems allow."""


def distinct_names(paths: Sequence[Path], taken: Collection[str] = ()) -> list[Path]:
    """A name for each of several relative paths: without the suffix where that tells them apart, else with it, else with a key.

    No two names are the same after "/" becomes "__", even on a file system that ignores case or changes the spelling of letters.
    Parts that are too long for file systems are cut and get a key. taken: names, in lower case, that are not given.
    """
    level = [0] * len(paths)
    names = [_spelled(path, 0) for path in paths]
    while True:
        alike = [folded("__".join(name.parts)) for name in names]
        times = Counter(alike)
        again = [k for k, one in enumerate(alike) if level[k] < 2 and (times[one] > 1 or one in taken)]
        if not again:
            return names
        for k in again:
            level[k] += 1
            names[k] = _spelled(paths[k], level[k])


def _spelled(path: Path, level: int) -> Path:
    spelling = path.with_suffix("") if level == 0 else path if level == 1 else path.with_name(f"{path.name}-{digest(str(path))[:8]}")
    return Path(*map(short_name, spelling.parts))


def flat_names(paths: Sequence[Path], taken: Collection[str] = ()) -> list[str]:
    """``distinct_names`` in one folder: "/" becomes "__"."""
    return [short_name("__".join(name.parts)) for name in distinct_names(paths, taken)]


def folded(name: str) -> str:
    """A name as a file system sees it that ignores case and Unicode spelling."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def short_name(text: str, limit: int = LONGEST_NAME) -> str:
    """A name of at most ``limit`` bytes of UTF-8, different for different texts: a longer text is cut and gets a hash of the whole."""
    coded = text.encode(errors="surrogateescape")
    return text if len(coded) <= limit else coded[: limit - 17].decode(errors="ignore") + "-" + digest(text)


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, value: Any) -> Path:
    """Write a value as indented JSON, atomically. Raises DataError for a number that is not finite."""
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise DataError(
            f"{path}: a number to be written there is not finite ({error}); nothing was written, so look at its input"
        ) from error
    with atomic_path(path) as part:
        part.write_text(text + "\n", encoding="utf-8", errors="surrogateescape")  # file names need not be UTF-8
    return Path(path)


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises DataError when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8", errors="surrogateescape"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); delete it and run its step again") from error


RESULT_SUFFIXES = (".json", ".labels.png", ".overlay.png", ".margin.png")
"""Suffixes of the files that ``fmbseg segment`` writes for an image."""

TILED_SUFFIXES = (*(".json", ".labels.tif", ".margin.tif"), *(".overlay.png", ".margin.png"))
"""What it writes of an image that is segmented in tiles; the PNGs are of a reduced size."""

VIDEO_SUFFIXES = (".json", ".overlay.mp4")
"""What it writes of a video, beside a folder of label maps."""

ALL_SUFFIXES = tuple(dict.fromkeys((*RESULT_SUFFIXES, *TILED_SUFFIXES, *VIDEO_SUFFIXES)))


def is_result(path: Path) -> bool:
    """Whether ``fmbseg segment`` wrote this image or video, beside a JSON; such images are never inputs."""
    stem = next((path.name.removesuffix(suffix) for suffix in ALL_SUFFIXES if path.name.endswith(suffix)), None)
    beside = (path.with_name(f"{stem}.json"), Path(f"{path.absolute().parent}.json"))  # the other: of a video's frames
    return stem is not None and any(result(file) for file in beside)


def result(path: Path) -> dict[str, Any]:
    """The content of a JSON that ``fmbseg segment`` wrote for an image; empty for any other file."""
    try:
        described = read_json(path)
    except DataError:
        return {}
    return described if isinstance(described, dict) and {"image", "height", "width", "classes"} <= described.keys() else {}


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write named tensors as safetensors, atomically.

    metadata: one text and its name; safetensors would write several in random order.
    """
    import safetensors.torch

    with atomic_path(path) as part:
        try:
            safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, metadata=dict(metadata or {}))
        except safetensors.SafetensorError as error:  # safetensors' error for a full disk
            raise _storage_error(Path(path), OSError(errno.ENOSPC, str(error))) from error
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


def is_whole(path: str | Path) -> bool:
    """Whether a safetensors file is there and as long as its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(*parts: Any) -> str:
    """A short key of anything that JSON can hold; the same content gives the same key on any machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


SETTLED_NS = 2 * 10**9
"""A hash is kept only of a file that did not change for so many nanoseconds before: changes within one tick of a file system's
clock, two seconds at most, look alike."""


def sha256_of(path: str | Path) -> str:
    """``file_sha256`` of an image or another small file, which is read again only when it has changed.

    Path, inode, size and the times at which bytes and status changed decide, in later processes too: ``home()/hashes.txt`` keeps the
    hashes, and may be deleted. Bytes that have to be verified are hashed by ``file_sha256``. Raises DataError.
    """
    path, kept = Path(path), _kept_hashes(home() / "hashes.txt")
    try:
        if found := kept.find(_seen(path, path.stat())):
            return found
        began = time.time_ns()
        with open(path, "rb") as stream:
            status = os.fstat(stream.fileno())
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); put it back or leave it out") from error
    if began - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS:
        # a file system without fractions of seconds may be an image of fixed times: only this process trusts them
        kept.add(_seen(path, status), found, lasting=status.st_ctime_ns % 10**9 != 0)
    return found


def _seen(path: Path, status: os.stat_result) -> str:
    """A key of a file as it is now; no program can set the time of its status back."""
    now = (os.fsencode(path.absolute()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return hashlib.sha256(repr(now).encode()).hexdigest()[:32]


class _Hashes:
    """Lines "KEY HASH CHECKSUM", which several processes append to one file; a line that was cut off or mixed is not taken."""

    def __init__(self, path: Path):
        self.path, self.end, self.found = path, 0, {}

    def find(self, key: str) -> str | None:
        """The hash under a key; lines that other processes have added are read where it is not known yet."""
        if key not in self.found:
            with suppress(OSError), open(self.path, "rb") as stream:
                start = stream.seek(self.end if os.fstat(stream.fileno()).st_size >= self.end else 0)
                *lines, _ = stream.read().split(b"\n")  # the last one may not be whole yet
                self.end = start + sum(len(line) + 1 for line in lines)
                self.found |= {line[:32].decode(): line[33:97].decode() for line in lines if _line(line[:97]) == line + b"\n"}
        return self.found.get(key)

    def add(self, key: str, found: str, lasting: bool) -> None:
        """Keep a hash; lasting: in the file too, where it can be written."""
        self.found[key] = found
        if lasting:
            with suppress(OSError), open(self.path, "ab", buffering=0) as stream:
                stream.write(_line(f"{key} {found}".encode()))


def _line(said: bytes) -> bytes:
    return said + b" %08x\n" % zlib.crc32(said)


_kept_hashes = functools.cache(_Hashes)
