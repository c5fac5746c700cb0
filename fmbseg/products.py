"""What each step keeps of each picture on disk, made once and read ever after.

Everything lies under ``home()/cache``, one file a picture, under a key that covers the picture's bytes, the weights
and the parameters. Functions are given a path and make what is missing; they run in worker processes.
"""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle

from fmbseg import datasets, detect, features, images, jobs, stage1_masks, stage1_query, storage
from fmbseg.backbones.clip import ImageText, load_clip
from fmbseg.backbones.encoder import Encoder, load_encoder
from fmbseg.backbones.sam import AutomaticMask, SamSegmenter, load_sam
from fmbseg.detect import Detected
from fmbseg.errors import DataError, ImageError
from fmbseg.features import ImageFeatures
from fmbseg.params import DetectParams, FeatureParams, LabelParams, MaskParams, PatchParams, QueryParams
from fmbseg.stage1_query import QueryMask
from fmbseg.storage import Store
from fmbseg.vocabulary import ClassTexts, LabelSpace, class_texts
from fmbseg.windows import Window


def encode_rle(mask: np.ndarray) -> dict:
    """A (height, width) bool mask as COCO run-length encoding that JSON can hold."""
    coded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(n) for n in coded["size"]], "counts": coded["counts"].decode("ascii")}


def decode_rle(coded: dict) -> np.ndarray:
    """COCO run-length encoding -> (height, width) bool."""
    return rle.decode({"size": coded["size"], "counts": coded["counts"].encode("ascii")}).astype(bool)


def _store(product: str, suffix: str, *content) -> Store:
    return Store(storage.home() / "cache" / product, suffix, product, *content)


def clip_of(params: FeatureParams, device: str = "cpu") -> ImageText:
    return load_clip(params.clip, device, params.crop_input, params.precision)


def sam_of(params: QueryParams, device: str = "cpu") -> SamSegmenter:
    return load_sam(params.sam, device, params.precision)


def encoder_of(params: PatchParams, device: str = "cpu") -> Encoder:
    return load_encoder(params.encoder, device, params.precision)


@functools.lru_cache(maxsize=8)
def _texts(clip: ImageText, prompts: tuple, names: tuple, templates: str) -> ClassTexts:
    space = LabelSpace("", names, prompts, np.zeros((len(names), 3), np.uint8))
    return class_texts(clip, space, templates)


def texts_of(space: LabelSpace, params: LabelParams, device: str = "cpu") -> ClassTexts:
    """Text features of a label space, kept in memory for the next call."""
    return _texts(clip_of(params, device), space.prompts, space.names, params.templates)


def clip_features(path: Path, params: FeatureParams, device: str = "cpu") -> ImageFeatures:
    """High-resolution CLIP features of one picture, kept in fp16."""
    clip = clip_of(params, device)

    def make(target: Path) -> None:
        made = features.extract(images.read_image(path), clip, params)
        crops = [[c.top, c.left, c.height, c.width] for c in made.crops]
        tensors = {"map": made.map.half(), "tokens": made.tokens.half()}
        storage.write_tensors(target, tensors, {"size": json.dumps(made.size), "crops": json.dumps(crops)})

    tensors, metadata = storage.read_tensors(_store("clip", ".safetensors", clip.key, params.content(FeatureParams)).get(path, make))
    crops = tuple(Window(*c) for c in json.loads(metadata["crops"]))
    return ImageFeatures(tuple(json.loads(metadata["size"])), tensors["map"].float(), tensors["tokens"].float(), crops)


@functools.lru_cache(maxsize=8)
def _reference(photographs: str, data_root: str, count: int, changed: int) -> tuple[Path, ...]:
    found = datasets.load_collection(photographs, data_root)
    return tuple(sample.image for sample in jobs.spread(found, count)) if len(found) >= count else ()


def vote_reference(params: LabelParams) -> tuple[Path, ...]:
    """The photographs over whose crops votes are standardised: evenly spread over the collection, whatever its ``limit``.

    None where it holds fewer than ``vote_reference``: too few to tell a word's spread.
    """
    if not params.vote_reference:
        return ()
    folder = Path(params.photographs).expanduser()
    changed = folder.stat().st_mtime_ns if folder.is_dir() else 0  # listed anew when photographs come or go
    return _reference(params.photographs, params.data_root, params.vote_reference, changed)


def vote_content(params: LabelParams) -> list[str]:
    """What a vote depends on beside the parameters: the reference photographs, by their bytes."""
    return [storage.image_sha256(path) for path in vote_reference(params)]


@functools.lru_cache(maxsize=4)
def _tokens(paths: tuple[Path, ...], params: FeatureParams, device: str) -> torch.Tensor:
    found = []
    for path in paths:
        with contextlib.suppress(ImageError):  # told where the picture itself is labelled
            found.append(clip_features(path, params, device).tokens)
    if not found:
        raise DataError(f"vote_reference: none of {len(paths)} photographs can be read; give others, or set vote_reference to 0")
    return torch.cat(found)


def vote_unit(texts: ClassTexts, params: LabelParams, device: str = "cpu") -> torch.Tensor | None:
    """(K,) the unit in which crops vote (``detect.spread``), from features that are made where they are missing; none if not asked for."""
    paths = vote_reference(params)
    return detect.spread(_tokens(paths, FeatureParams(**params.part(FeatureParams)), device), texts) if paths else None


def _set_image(sam: SamSegmenter, path: Path, params: QueryParams) -> np.ndarray:
    """Set a picture, with its embedding kept on disk if so wished; returns it."""
    image = images.read_image(path)
    sam.set_image(image, _store("sam", ".safetensors", sam.key).path(path) if params.keep_embeddings else None)
    return image


def queries(
    path: Path, space: LabelSpace, params: LabelParams, device: str = "cpu", given: tuple[int, ...] | None = None
) -> list[QueryMask]:
    """Detected classes of one picture with Stage 1.1's masks. given: image-level labels in place of detection."""
    clip, sam = clip_of(params, device), sam_of(params, device)
    content = params.content(FeatureParams, DetectParams, QueryParams) | {"vote_reference": vote_content(params)}

    def make(target: Path) -> None:
        found_features, texts = clip_features(path, params, device), texts_of(space, params, device)
        if given is None:
            found = detect.detect(found_features, texts, params, vote_unit(texts, params, device))
        else:
            found = detect.given(list(given), texts)
        image = _set_image(sam, path, params) if found else images.read_image(path)
        masks = stage1_query.query_masks(image, found_features, found, texts, sam, params)
        storage.write_json(
            target,
            [
                {
                    "index": q.detected.index,
                    "name": q.detected.name,
                    "votes": q.detected.votes,
                    "points": q.points.tolist(),
                    "masks": [encode_rle(m) for m in q.masks],
                    "scores": q.scores.tolist(),
                    "chosen": encode_rle(q.chosen),
                }
                for q in masks
            ],
        )

    store = _store("queries", ".json", clip.key, sam.key, content, space.names, space.prompts, given)
    return [
        QueryMask(
            Detected(r["index"], r["name"], r["votes"]),
            np.array(r["points"], dtype=np.float32),
            np.stack([decode_rle(m) for m in r["masks"]]),
            np.array(r["scores"]),
            decode_rle(r["chosen"]),
        )
        for r in storage.read_json(store.get(path, make))
    ]


def automatic_masks(path: Path, params: LabelParams, device: str = "cpu") -> list[AutomaticMask]:
    """Stage 1.2's unlabelled masks of one picture; they do not depend on any word."""
    sam = sam_of(params, device)

    def make(target: Path) -> None:
        image = _set_image(sam, path, params)
        found = stage1_masks.automatic_masks(image, sam, params)
        storage.write_json(
            target,
            [{"mask": encode_rle(m.mask), "predicted_iou": m.predicted_iou, "stability": m.stability, "point": m.point} for m in found],
        )

    store = _store("masks", ".json", sam.key, params.content(MaskParams))
    return [
        AutomaticMask(decode_rle(r["mask"]), r["predicted_iou"], r["stability"], tuple(r["point"]))
        for r in storage.read_json(store.get(path, make))
    ]


def encoder_patches(path: Path, params: PatchParams, device: str = "cpu") -> torch.Tensor:
    """(width, h, w) patches of one picture squashed to the encoder's square input, kept in fp16."""
    encoder = encoder_of(params, device)
    side = params.image_size // encoder.patch * encoder.patch

    def make(target: Path) -> None:
        pixels = torch.from_numpy(images.resize(images.read_image(path), (side, side)))[None].to(device)
        storage.write_tensors(target, {"patches": encoder.encode(pixels)[0].half()})

    return storage.read_tensors(_store("encoder", ".safetensors", encoder.key, side).get(path, make))[0]["patches"]
