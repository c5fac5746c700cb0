"""What each step keeps of each image on disk, made once and read ever after.

Everything lies under ``home()/cache``, one file an image, under a key that covers the image's bytes, the weights,
the parameters and, for votes, the images they are standardised over. Functions are given a path and make what is missing; they run in worker processes.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle

from fmbseg import files
from fmbseg.data import collections, images
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.data.samples import Sample
from fmbseg.errors import DataError
from fmbseg.files import Store
from fmbseg.models.clip import ImageText, load_clip, weights_key
from fmbseg.models.encoders import Encoder, load_encoder
from fmbseg.models.sam import AutomaticMask, SamSegmenter, load_sam
from fmbseg.models.texts import ClassTexts, class_texts
from fmbseg.params import DetectParams, FeatureParams, LabelParams, MaskParams, PatchParams, QueryParams
from fmbseg.runs import parallel
from fmbseg.stage1 import detection, features, label_masks, query_sam
from fmbseg.stage1.detection import Detected, Scale
from fmbseg.stage1.features import ImageFeatures
from fmbseg.stage1.query_sam import QueryMask
from fmbseg.stage1.windows import Window
from fmbseg.stage2 import distributed


def encode_rle(mask: np.ndarray) -> dict:
    """A (height, width) bool mask as COCO run-length encoding that JSON can hold."""
    coded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(n) for n in coded["size"]], "counts": coded["counts"].decode("ascii")}


def decode_rle(coded: dict) -> np.ndarray:
    """COCO run-length encoding -> (height, width) bool."""
    return rle.decode({"size": coded["size"], "counts": coded["counts"].encode("ascii")}).astype(bool)


def _store(product: str, suffix: str, *content) -> Store:
    return Store(files.home() / "cache" / product, suffix, product, *content)


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
    """High-resolution CLIP features of one image, kept in fp16."""
    clip = clip_of(params, device)

    def make(target: Path) -> None:
        made = features.extract(images.read_image(path), clip, params)
        crops = [[c.top, c.left, c.height, c.width] for c in made.crops]
        tensors = {"map": made.map.half(), "tokens": made.tokens.half()}
        files.write_tensors(target, tensors, {"size": json.dumps(made.size), "crops": json.dumps(crops)})

    tensors, metadata = files.read_tensors(_store("clip", ".safetensors", clip.key, params.content(FeatureParams)).get(path, make))
    crops = tuple(Window(*c) for c in json.loads(metadata["crops"]))
    return ImageFeatures(tuple(json.loads(metadata["size"])), tensors["map"].float(), tensors["tokens"].float(), crops)


def _reference_path(params: LabelParams) -> Path:
    folder = Path(params.collection).expanduser()
    source = [str(folder.resolve()) if folder.is_dir() else params.collection, params.data_root, params.reference_images]
    key = files.digest(*source, weights_key(params.clip), params.content(FeatureParams))
    return files.home() / "cache" / "votes" / f"{key}.safetensors"


def _crop_tokens(sample: Sample, params: FeatureParams, device: str) -> torch.Tensor:
    return clip_features(sample.image, params, device).tokens


def prepare_votes(params: LabelParams, device: str = "cpu", workers: int = 1) -> None:
    """Class tokens of the images over whose crops votes are standardised, on disk for all workers (ours).

    They are listed anew, evenly spread over the collection whatever its ``limit``; of a collection that holds fewer than
    ``reference_images``, none are taken. Under torchrun the first rank alone makes them.
    """
    if not params.reference_images:
        return
    if distributed.rank() == 0:
        found, path = collections.load_collection(params.collection, params.data_root), _reference_path(params)
        chosen = parallel.spread(found, params.reference_images) if len(found) >= params.reference_images else []
        if not chosen:
            print(f"votes are taken as they are: {len(found)} images, and reference_images = {params.reference_images}")
        content = [files.image_sha256(sample.image) for sample in chosen]
        if not path.is_file() or _reference(path)[1] != content:
            work = functools.partial(_crop_tokens, params=FeatureParams(**params.part(FeatureParams)), device=device)
            tokens = [result for _, result in parallel.each(work, chosen, "CLIP features of the votes' reference", workers).results]
            if chosen and not tokens:
                raise DataError(f"reference_images: none of {len(chosen)} can be read; give other images, or set it to 0")
            files.write_tensors(path, {"tokens": torch.cat(tokens or [torch.zeros(0, 1)])}, {"images": json.dumps(content)})
    distributed.wait()


def _reference(path: Path) -> tuple[torch.Tensor, list[str]]:
    tensors, metadata = files.read_tensors(path)
    return tensors["tokens"], json.loads(metadata["images"])


def _prepared(params: LabelParams, device: str) -> tuple[torch.Tensor, list[str]]:
    path = _reference_path(params)
    if not path.is_file():
        prepare_votes(params, device)
    return _reference(path)


def vote_content(params: LabelParams, device: str = "cpu") -> list[str]:
    """What votes depend on beside the parameters: the reference images, by their bytes."""
    return _prepared(params, device)[1] if params.reference_images else []


def vote_scale(texts: ClassTexts, params: LabelParams, device: str = "cpu") -> Scale | None:
    """The scale on which crops vote; none where votes are taken as they are."""
    tokens = _prepared(params, device)[0] if params.reference_images else ()
    return Scale.of(tokens, texts) if len(tokens) else None


def _set_image(sam: SamSegmenter, path: Path, params: QueryParams) -> np.ndarray:
    """Set an image, with its embedding kept on disk if so wished; returns it."""
    image = images.read_image(path)
    sam.set_image(image, _store("sam", ".safetensors", sam.key).path(path) if params.keep_embeddings else None)
    return image


def queries(
    path: Path, space: LabelSpace, params: LabelParams, device: str = "cpu", given: tuple[int, ...] | None = None
) -> list[QueryMask]:
    """Detected classes of one image with Stage 1.1's masks. given: image-level labels in place of detection."""
    clip, sam = clip_of(params, device), sam_of(params, device)
    content = params.content(FeatureParams, DetectParams, QueryParams)
    content |= {"reference_images": vote_content(params, device) if given is None else None}

    def make(target: Path) -> None:
        found_features, texts = clip_features(path, params, device), texts_of(space, params, device)
        if given is None:
            found = detection.detect(found_features, texts, params, vote_scale(texts, params, device))
        else:
            found = detection.given(list(given), texts)
        image = _set_image(sam, path, params) if found else images.read_image(path)
        masks = query_sam.query_masks(image, found_features, found, texts, sam, params)
        files.write_json(
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
        for r in files.read_json(store.get(path, make))
    ]


def automatic_masks(path: Path, params: LabelParams, device: str = "cpu") -> list[AutomaticMask]:
    """Stage 1.2's unlabelled masks of one image; they do not depend on any word."""
    sam = sam_of(params, device)

    def make(target: Path) -> None:
        image = _set_image(sam, path, params)
        found = label_masks.automatic_masks(image, sam, params)
        files.write_json(
            target,
            [{"mask": encode_rle(m.mask), "predicted_iou": m.predicted_iou, "stability": m.stability, "point": m.point} for m in found],
        )

    store = _store("masks", ".json", sam.key, params.content(MaskParams))
    return [
        AutomaticMask(decode_rle(r["mask"]), r["predicted_iou"], r["stability"], tuple(r["point"]))
        for r in files.read_json(store.get(path, make))
    ]


def encoder_patches(path: Path, params: PatchParams, device: str = "cpu") -> torch.Tensor:
    """(width, h, w) patches of one image squashed to the encoder's square input, kept in fp16."""
    encoder = encoder_of(params, device)
    side = params.image_size // encoder.patch * encoder.patch

    def make(target: Path) -> None:
        pixels = torch.from_numpy(images.resize(images.read_image(path), (side, side)))[None].to(device)
        files.write_tensors(target, {"patches": encoder.encode(pixels)[0].half()})

    return files.read_tensors(_store("encoder", ".safetensors", encoder.key, side).get(path, make))[0]["patches"]
