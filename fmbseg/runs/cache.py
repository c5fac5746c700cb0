"""Disk cache of the results of Stage 1 and of the frozen encoder for each image, and the models of a run.

Each function wraps one function of the method: it reads the image's file under ``home()/cache``, or computes and writes it. A
key covers the image's bytes, the models' weights, the parameters and the version of the step, but not batch sizes.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pycocotools import mask as rle

from fmbseg import files
from fmbseg.data import collections, images
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.errors import DataError
from fmbseg.models import clip as clip_models
from fmbseg.models import encoders
from fmbseg.models import sam as sam_models
from fmbseg.models.clip import ImageText
from fmbseg.models.encoders import Encoder
from fmbseg.models.sam import AutomaticMask, SamSegmenter
from fmbseg.models.texts import ClassTexts, class_texts
from fmbseg.params import DetectParams, FeatureParams, LabelParams, MaskParams, PatchParams, QueryParams, RunParams
from fmbseg.runs import parallel
from fmbseg.stage1 import detection, features, label_masks, query_sam
from fmbseg.stage1.detection import Detected, Scale
from fmbseg.stage1.features import ImageFeatures
from fmbseg.stage1.query_sam import QueryMask
from fmbseg.stage1.windows import Window
from fmbseg.stage2.distributed import rank

T = TypeVar("T")

VERSIONS = {"clip": 3, "sam": 3, "votes": 2, "queries": 3, "masks": 3, "encoder": 2, "labels": 4, "counts": 3, "module": 3}
"""Version of each product on disk: raise it when the code of its step computes something else."""

MADE_FROM = {
    "votes": ["clip"],
    "queries": ["clip", "sam", "votes"],
    "masks": ["sam"],
    "labels": ["queries", "masks"],
    "module": ["encoder", "clip"],
}
"""The products that a product is made from: when the version of one rises, it is made again."""


def versions(product: str) -> dict[str, int]:
    """The versions of a product and of all products that it is made from, which are part of its key."""
    found = {product: VERSIONS[product]}
    for part in MADE_FROM.get(product, []):
        found |= versions(part)
    return found


# ---------------------------------------------------------------- models


@dataclass(frozen=True)
class Models:
    """The frozen models of a run, by name; each is loaded when first asked for, once a process.

    It holds names only, so it can be sent to worker processes.
    """

    clip_name: str
    crop_input: int | None
    sam_name: str
    encoder_name: str
    precision: str
    templates: str
    text_average: str
    device: str

    @classmethod
    def of(cls, params: RunParams) -> Models:
        """The models that the parameters name. Parameters that do not exist in their schema get a default."""
        names = {"clip": "", "crop_input": None, "sam": "", "encoder": "", "precision": "fp32", "templates": "one"}
        names |= {"text_average": "unit", "device": "cpu"}
        return cls(*(getattr(params, name, default) for name, default in names.items()))

    @property
    def clip(self) -> ImageText:
        return _kept_clip(self.clip_name, self.device, self.crop_input, self.precision)

    @property
    def sam(self) -> SamSegmenter:
        return _kept_sam(self.sam_name, self.device, self.precision)

    @property
    def encoder(self) -> Encoder:
        return _kept_encoder(self.encoder_name, self.device, self.precision)

    def texts(self, space: LabelSpace) -> ClassTexts:
        """Text features of a label space, kept in memory for the next call."""
        return _texts(self, space.prompts, space.names)


_kept_clip = functools.lru_cache(maxsize=2)(clip_models.load_clip)
_kept_sam = functools.lru_cache(maxsize=1)(sam_models.load_sam)
_kept_encoder = functools.lru_cache(maxsize=1)(encoders.load_encoder)


@functools.lru_cache(maxsize=8)
def _texts(models: Models, prompts: tuple, names: tuple) -> ClassTexts:
    space = LabelSpace("", names, prompts, np.zeros((len(names), 3), np.uint8))
    return class_texts(models.clip, space, models.templates, models.text_average)


# ---------------------------------------------------------------- files


class Cache:
    """The files of one product, one an image, under a key of everything that changes their content.

    product: a name of VERSIONS; content: what JSON can hold.
    """

    def __init__(self, product: str, suffix: str, *content: Any):
        self.folder, self.suffix = files.home() / "cache" / product, suffix
        self.content = (versions(product), *content)

    def path(self, image: str | Path) -> Path:
        """The path of the product of this image file, whether it is there or not."""
        key = files.digest(files.sha256_of(image), *self.content)
        rest = f"-{key}{self.suffix}"
        stem = os.fsencode(Path(image).stem[:80]).decode(errors="ignore")  # safetensors writes no name that is not UTF-8
        return self.folder / f"{files.short_name(stem, files.WHOLE_NAME - len(rest))}{rest}"

    def read(self, image: Path, make: Callable[[], T], write: Callable[[Path, T], Any], load: Callable[[Path], T], keep: bool = True) -> T:
        """The image's product, ``load``ed from its file. Where that is missing or damaged, ``make`` and ``write`` come first.

        Without ``keep`` no file is read or written; the product of the last image is kept in memory.
        """
        path = self.path(image)
        if not keep:
            if _last.get(self.folder.name, (None,))[0] != path:
                _last[self.folder.name] = path, make()
            return _last[self.folder.name][1]
        if (found := kept(path, load)) is None:
            write(path, make())
            found = load(path)
        return found


_last: dict[str, tuple[Path, Any]] = {}


def image(path: Path) -> np.ndarray:
    """The (height, width, 3) RGB ``uint8`` image of a file; the last few are kept in memory, so do not write to it."""
    status = path.stat()
    return _image(path, status.st_size, status.st_mtime_ns)


def reader(device: str) -> Callable[[Any], Any] | None:
    """The function with which ``parallel.each`` reads images ahead of models on a GPU; None on a CPU."""
    return (lambda item: image(getattr(item, "image", item))) if parallel.on_gpu(device) else None


@functools.lru_cache(maxsize=2 * parallel.AHEAD)
def _image(path: Path, size: int, changed: int) -> np.ndarray:
    return images.read_image(path)


def kept(path: Path, load: Callable[[Path], T]) -> T | None:
    """``load(path)``, or None where the file is missing, truncated or not written by this package."""
    try:
        return load(path)
    except (DataError, KeyError, IndexError, TypeError, ValueError):
        return None


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """A (height, width) bool mask as COCO run-length encoding, for JSON."""
    coded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(n) for n in coded["size"]], "counts": coded["counts"].decode("ascii")}


def decode_rle(coded: dict[str, Any]) -> np.ndarray:
    """COCO run-length encoding -> (height, width) bool."""
    return rle.decode({"size": coded["size"], "counts": coded["counts"].encode("ascii")}).astype(bool)


# ---------------------------------------------------------------- Stage 1


def clip_features(path: Path, models: Models, params: FeatureParams) -> ImageFeatures:
    """High-resolution CLIP features of one image (``stage1.features.extract``), kept in fp16."""

    def write(target: Path, made: ImageFeatures) -> None:
        crops = [[c.top, c.left, c.height, c.width] for c in made.crops]
        tensors = {"map": made.map.half(), "tokens": made.tokens.half()}
        files.write_tensors(target, tensors, {"image": json.dumps({"size": made.size, "crops": crops})})

    def load(target: Path) -> ImageFeatures:
        tensors, metadata = files.read_tensors(target)
        image = json.loads(metadata["image"])
        crops = tuple(Window(*c) for c in image["crops"])
        return ImageFeatures(tuple(image["size"]), tensors["map"].float(), tensors["tokens"].float(), crops)

    here = Cache("clip", ".safetensors", models.clip.key, params.content(FeatureParams))
    return here.read(path, lambda: features.extract(image(path), models.clip, params), write, load, params.keep_features)


def queries(path: Path, space: LabelSpace, models: Models, params: LabelParams, given: Sequence[int] | None = None) -> list[QueryMask]:
    """Detected classes of one image with Stage 1.1's masks. given: image-level labels in place of detection."""
    content = params.content(FeatureParams, DetectParams, QueryParams)
    content |= {"reference_images": vote_content(params) if given is None else None}

    def make() -> list[QueryMask]:
        found, texts = clip_features(path, models, params), models.texts(space)
        detected = detection.detect(found, texts, params, vote_scale(texts, params)) if given is None else detection.given(given, texts)
        pixels = _set_image(path, models, params) if detected else image(path)
        return query_sam.query_masks(pixels, found, detected, texts, models.sam, params)

    def write(target: Path, made: list[QueryMask]) -> None:
        files.write_json(target, [_query_row(q) for q in made])

    here = Cache("queries", ".json", models.clip.key, models.sam.key, content, space.names, space.prompts, given)
    return here.read(path, make, write, lambda target: [_query_mask(row) for row in files.read_json(target)], params.keep_features)


def _query_row(query: QueryMask) -> dict[str, Any]:
    return {
        "index": query.detected.index,
        "name": query.detected.name,
        "votes": query.detected.votes,
        "points": query.points.tolist(),
        "masks": [encode_rle(mask) for mask in query.masks],
        "scores": query.scores.tolist(),
        "chosen": encode_rle(query.chosen),
    }


def _query_mask(row: dict[str, Any]) -> QueryMask:
    return QueryMask(
        Detected(row["index"], row["name"], row["votes"]),
        np.array(row["points"], dtype=np.float32),
        np.stack([decode_rle(mask) for mask in row["masks"]]),
        np.array(row["scores"]),
        decode_rle(row["chosen"]),
    )


def automatic_masks(path: Path, models: Models, params: LabelParams) -> list[AutomaticMask]:
    """Stage 1.2's unlabelled masks of one image; they do not depend on any word."""

    def make() -> list[AutomaticMask]:
        return label_masks.automatic_masks(_set_image(path, models, params), models.sam, params)

    def write(target: Path, found: list[AutomaticMask]) -> None:
        rows = [{"mask": encode_rle(m.mask), "predicted_iou": m.predicted_iou, "stability": m.stability, "point": m.point} for m in found]
        files.write_json(target, rows)

    def load(target: Path) -> list[AutomaticMask]:
        return [
            AutomaticMask(decode_rle(row["mask"]), row["predicted_iou"], row["stability"], tuple(row["point"]))
            for row in files.read_json(target)
        ]

    return Cache("masks", ".json", models.sam.key, params.content(MaskParams)).read(path, make, write, load, params.keep_features)


def regions(path: Path, models: Models, params: RunParams) -> list[np.ndarray]:
    """The (height, width) bool masks that vote at test time, by the parameter ``regions``; an empty list where it is off."""
    return [one.mask for one in automatic_masks(path, models, params)] if params.regions == "sam" else []


def _set_image(path: Path, models: Models, params: QueryParams) -> np.ndarray:
    """Set an image for SAM, with its embedding read from or written to disk if ``keep_embeddings``; returns the image."""
    pixels, segmenter = image(path), models.sam
    if not params.keep_embeddings:
        segmenter.set_image(pixels)
        return pixels
    place = Cache("sam", ".safetensors", segmenter.key).path(path)
    if (embedding := kept(place, lambda target: files.read_tensors(target)[0]["embedding"])) is not None:
        segmenter.set_image(pixels, embedding)
    else:
        segmenter.set_image(pixels)
        files.write_tensors(place, {"embedding": segmenter.embedding})
    return pixels


# ---------------------------------------------------------------- votes standardised over a collection (ours)


def prepare_votes(params: LabelParams, workers: int | None = None) -> None:
    """Write, for all workers, the class tokens of the reference images, over whose crops votes are standardised (ours).

    Reference images are evenly spread over the whole collection, whatever its ``limit``. A collection with fewer than
    ``reference_images`` images has none. Under torchrun only the first process computes them.
    workers: None: those of the run's parameters, or 1.
    """
    if not params.reference_images:
        return
    if rank() == 0:
        found, path = collections.load_collection(params.collection, params.data_root), _reference_path(params)
        chosen = parallel.evenly_spaced(found, params.reference_images) if len(found) >= params.reference_images else []
        if not chosen:
            also = "" if params.min_margin is None else f", and masks of every margin stay (min_margin = {params.min_margin})"
            print(f"votes are not standardised{also}: {len(found)} images are fewer than reference_images = {params.reference_images}")
        content = [files.sha256_of(sample.image) for sample in chosen]
        found = kept(path, _reference)
        if found is None or found[1] != content:
            work = functools.partial(_crop_tokens, models=Models.of(params), params=FeatureParams(**params.part(FeatureParams)))
            paths = [sample.image for sample in chosen]
            several = workers or getattr(params, "workers", 1)
            title, read = "CLIP features of the votes' reference", reader(params.device if isinstance(params, RunParams) else "cpu")
            tokens = [result for _, result in parallel.each(work, paths, title, several, read=read).results]
            if chosen and not tokens:
                raise DataError(f"reference_images: none of {len(chosen)} can be read; give other images, or set it to 0")
            files.write_tensors(path, {"tokens": torch.cat(tokens or [torch.zeros(0, 1)])}, {"images": json.dumps(content)})
    parallel.wait()


def _crop_tokens(path: Path, models: Models, params: FeatureParams) -> torch.Tensor:
    return clip_features(path, models, params).tokens


def _reference_path(params: LabelParams) -> Path:
    folder = Path(params.collection).expanduser()
    source = [str(folder.resolve()) if folder.is_dir() else params.collection, params.data_root, params.reference_images]
    key = files.digest(versions("votes"), *source, clip_models.weights_key(params.clip), params.content(FeatureParams))
    return files.home() / "cache" / "votes" / f"{key}.safetensors"


def _reference(path: Path) -> tuple[torch.Tensor, list[str]]:
    tensors, metadata = files.read_tensors(path)
    return tensors["tokens"], json.loads(metadata["images"])


def _prepared(params: LabelParams) -> tuple[torch.Tensor, list[str]]:
    path = _reference_path(params)
    if (found := kept(path, _reference)) is None:
        prepare_votes(params)
        found = _reference(path)
    return found


def vote_content(params: LabelParams) -> list[str]:
    """What votes depend on besides the parameters: the hashes of the reference images."""
    return _prepared(params)[1] if params.reference_images else []


def vote_scale(texts: ClassTexts, params: LabelParams) -> Scale | None:
    """The scale that standardises the votes of crops; None where they are not standardised."""
    tokens = _prepared(params)[0] if params.reference_images else ()
    return Scale.of(tokens, texts) if len(tokens) else None


# ---------------------------------------------------------------- Stage 2


def encoder_cache(models: Models, params: PatchParams) -> Cache:
    """The cache of the encoder's patches."""
    return Cache("encoder", ".safetensors", models.encoder.key, _side(models.encoder, params))


def _side(encoder: Encoder, params: PatchParams) -> int:
    return params.image_size // encoder.patch * encoder.patch


def encoder_pixels(path: Path, models: Models, params: PatchParams) -> torch.Tensor:
    """(side, side, 3) ``uint8``: one image scaled to the encoder's square input."""
    side = _side(models.encoder, params)
    return torch.from_numpy(images.resize(image(path), (side, side)))


def encode(pixels: torch.Tensor, models: Models) -> torch.Tensor:
    """(B, width, h, w) fp16 patches of (B, side, side, 3) ``uint8`` pixels, on the models' device."""
    return models.encoder.encode(pixels.to(models.device, non_blocking=True)).half()


def encoder_patches(path: Path, models: Models, params: PatchParams) -> torch.Tensor:
    """(width, h, w) fp16 patches of one image scaled to the encoder's square input."""
    return encoder_cache(models, params).read(
        path,
        lambda: encode(encoder_pixels(path, models, params)[None], models)[0].cpu(),
        lambda target, made: files.write_tensors(target, {"patches": made}),
        lambda target: files.read_tensors(target)[0]["patches"],
        params.keep_features,
    )
