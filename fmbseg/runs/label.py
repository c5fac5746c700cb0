"""Stage 1 over a collection: pseudo labels on disk, resumable, in several processes or on a Ray cluster."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fmbseg import files
from fmbseg.data import collections, images, label_spaces
from fmbseg.data.images import IGNORED
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.data.samples import Sample
from fmbseg.errors import DataError, ImageError
from fmbseg.models import clip, sam
from fmbseg.params import CollectionParams, LabelParams, RunParams
from fmbseg.runs import cache, cluster, packs, parallel
from fmbseg.runs.cache import Models
from fmbseg.runs.packs import Member, Packs
from fmbseg.runs.parallel import Failure
from fmbseg.stage1 import pseudo_labels
from fmbseg.stage1.pseudo_labels import PseudoLabel


def collection(params: CollectionParams) -> list[Sample]:
    """The unlabelled images that the parameters name; with a limit, an evenly spread part of them."""
    found = collections.load_collection(params.collection, params.data_root, getattr(params, "benchmarks", ()))
    return parallel.evenly_spaced(found, params.limit)


def make_features(samples: Sequence[Sample], params: RunParams) -> list[Failure]:
    """High-resolution CLIP features of every image, on disk (notebook 01)."""
    work = partial(_features, models=Models.of(params), params=params)
    return parallel.each(work, samples, "CLIP features", params.workers, read=cache.reader(params.device)).failures


def _features(sample: Sample, models: Models, params: RunParams) -> None:
    cache.clip_features(sample.image, models, params)


def make_queries(samples: Sequence[Sample], params: LabelParams) -> list[Failure]:
    """Detected classes and Stage 1.1's masks of every image, on disk (notebook 02).

    Where Stage 1.2 is used too, its automatic masks are made in the same pass, so that SAM's encoder runs once an image.
    """
    cache.prepare_votes(params)
    work = partial(_queries, space=label_spaces.vocabulary(params.vocabulary, params.words), models=Models.of(params), params=params)
    return parallel.each(work, samples, "Stage 1.1", params.workers, read=cache.reader(params.device)).failures


def _queries(sample: Sample, space: LabelSpace, models: Models, params: LabelParams) -> None:
    if cache.queries(sample.image, space, models, params) and params.stages != "1.1":
        cache.automatic_masks(sample.image, models, params)


def query_table(samples: Sequence[Sample], params: LabelParams) -> pd.DataFrame:
    """One row a mask of Stage 1.1: image, class, votes, SAM's confidence, share of the image."""
    space, models = label_spaces.vocabulary(params.vocabulary, params.words), Models.of(params)
    columns = ["image", "class", "votes", "confidence", "share"]
    rows = [
        (sample.name, q.detected.name, q.detected.votes, q.scores.max(), q.chosen.mean())
        for sample in samples
        for q in cache.queries(sample.image, space, models, params)
    ]
    return pd.DataFrame(rows, columns=columns)


def label_cached(path: Path, space: LabelSpace, models: Models, params: LabelParams, given: Sequence[int] | None = None) -> PseudoLabel:
    """``stage1.label_image`` of an image file, with every part read from the cache or made and kept there.

    space: the vocabulary; given: image-level labels in place of detection.
    """
    queries = cache.queries(path, space, models, params, given)
    automatic = cache.automatic_masks(path, models, params) if params.stages != "1.1" and queries else []
    found = cache.clip_features(path, models, params)
    texts = models.texts(space)
    scale = cache.vote_scale(texts, params) if params.min_margin is not None else None
    return pseudo_labels.assemble(queries, automatic, found, texts, params, scale)


def content(params: LabelParams) -> dict[str, Any]:
    """All that pseudo labels depend on besides the image and the words: parameters, weights, versions of the steps, and the
    hashes of the votes' reference images and of the file of image-level names. It holds no path."""
    names = files.sha256_of(params.image_level_names) if params.image_level_names else ""
    weights = [clip.weights_key(params.clip), sam.weights_key(params.sam)]
    values = {name: value for name, value in params.content(LabelParams).items() if name != "vocabulary"}
    return values | {
        "weights": weights,
        "versions": cache.versions("labels"),
        "reference": cache.vote_content(params),
        "image_level_names": names,
    }


def given_labels(sample: Sample, space: LabelSpace, params: LabelParams) -> tuple[int, ...] | None:
    """Classes that ``image_level_names`` gives an image, without names outside the vocabulary; None where it is not set."""
    if not params.image_level_names:
        return None
    names = _image_level_names(params.image_level_names, files.sha256_of(params.image_level_names))
    if sample.image.stem not in names:
        raise DataError(f"{sample}: has no entry in {params.image_level_names}; add its names, or an empty list")
    classes = {label_spaces.normal(word): k for k, words in enumerate(space.prompts) for word in (space.names[k], *words)}
    given = {label_spaces.normal(str(name)) for name in names[sample.image.stem]}
    return tuple(sorted({classes[name] for name in given if name in classes}))


@functools.lru_cache(maxsize=4)
def _image_level_names(path: str, sha256: str) -> dict[str, list[str]]:
    names = files.read_json(path)
    if not isinstance(names, dict) or not all(isinstance(v, list) for v in names.values()):
        raise DataError(f'{path}: not a file of image-level names; give JSON such as {{"file stem": ["cat", "sofa"], ...}}')
    return names


class LabelStore:
    """A folder of pseudo labels: NAME.png (``images.write_label_map``) and NAME.json for each image, and one labels.json.

    labels.json holds the vocabulary and every parameter; a folder made with others is refused, never mixed. The reason why an
    image failed is in failed/NAME.json until it succeeds. NAME is the sample's name, cut where it is too long for a file.
    ``pack`` moves both files of many images into a tar file under packed/, from which they are read as before.
    notes: notes for the records of a module that is trained on them.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, folder: str | Path, space: LabelSpace, params: LabelParams):
        self.folder, self.failed, self.space = Path(folder), Path(folder) / "failed", space
        self.packs = Packs(Path(folder) / "packed")
        header = {"vocabulary": list(space.names), "prompts": [list(p) for p in space.prompts], "parameters": content(params)}
        self.key = files.digest(header)
        path = self.folder / "labels.json"
        key = cache.kept(path, lambda header: files.read_json(header)["key"])
        if key not in (None, self.key):
            raise DataError(f"{folder}: holds pseudo labels made with other words or parameters; give another folder or delete this one")
        if key is None:
            files.write_json(path, {"key": self.key, **header})

    def path(self, sample: Sample) -> Path:
        return self.folder / f"{_name(sample)}.png"

    def _record(self, sample: Sample) -> Path:
        return self.folder / f"{_name(sample)}.json"

    def _said(self, sample: Sample, *names: str) -> list | None:
        """The values of these names in the image's record; None where it is missing or damaged."""
        return cache.kept(self._record(sample), lambda record: [self._described(record)[name] for name in names])

    def _described(self, record: Path) -> dict[str, Any]:
        packed = None if record.is_file() else self.packs.read(record.name)
        return files.read_json(record) if packed is None else json.load(packed)

    def _failed(self, sample: Sample) -> Path:
        return self.failed / f"{_name(sample)}.json"

    def has(self, sample: Sample) -> bool:
        """Whether this image has a complete pseudo label, made with these words and parameters."""
        if self._said(sample, "key", "sha256") != [self.key, files.sha256_of(sample.image)]:
            return False
        try:
            return bool(self.read(sample).size)
        except (DataError, ImageError):
            return False

    def pack(self, samples: Sequence[Sample]) -> None:
        """Move the labels of these images into one tar file, except those that are in one already."""
        if loose := [path for s in samples for path in (self._record(s), self.path(s)) if path.is_file()]:
            self.packs.add(loose)

    def check_images(self, samples: Sequence[Sample]) -> None:
        """Raise DataError where the folder holds the label of another image under the name of one of these."""
        for sample in samples:
            if (said := self._said(sample, "image", "sha256")) is None:
                continue
            image, sha256 = said
            if Path(image).absolute() != sample.image.absolute() and sha256 != files.sha256_of(sample.image):
                raise DataError(
                    f"{self.folder}: holds the label of {image} under the name of {sample.image}; give each collection a folder of its own"
                )

    def write(self, sample: Sample, label: PseudoLabel) -> None:
        """Write the label map and then the record, so that an image with a record is complete."""
        images.write_label_map(self.path(sample), label.labels, self.space.palette)
        present = np.unique(label.labels[label.labels != IGNORED])
        files.write_json(
            self._record(sample),
            {
                "image": str(sample.image),
                "key": self.key,
                "sha256": files.sha256_of(sample.image),
                "detected": [{"name": d.name, "votes": d.votes} for d in label.detected],
                "classes": [self.space.names[k] for k in present],
                "coverage": float((label.labels != IGNORED).mean()),
            },
        )

    def fail(self, sample: Sample, reason: str) -> None:
        files.write_json(self._failed(sample), {"image": str(sample.image), "reason": reason})

    def reason(self, sample: Sample) -> str:
        """Why an image has no pseudo label."""
        return cache.kept(self._failed(sample), lambda failed: files.read_json(failed)["reason"]) or "has no pseudo label yet"

    def succeed(self, sample: Sample) -> None:
        if (failed := self._failed(sample)).is_file():
            failed.unlink()

    def coverage(self, sample: Sample) -> float | None:
        """The labelled share of an image; None where it has no pseudo label."""
        return (self._said(sample, "coverage") or [None])[0]

    def read(self, sample: Sample) -> np.ndarray:
        """(height, width) class indices, IGNORED where unlabelled."""
        return images.read_mask(self._map(sample))

    def sha256(self, sample: Sample) -> str:
        """The hash of the file of the label map."""
        found = self._map(sample)
        return files.sha256_of(found) if isinstance(found, Path) else hashlib.sha256(found.getbuffer()).hexdigest()

    def _map(self, sample: Sample) -> Path | Member:
        path = self.path(sample)
        if (found := path if path.is_file() else self.packs.read(path.name)) is None:
            raise DataError(f"{sample.name}: has no pseudo label in {self.folder}; run Stage 1 (notebook 03 or fmbseg label) first")
        return found


def _name(sample: Sample) -> str:
    return files.short_name(sample.name, files.WHOLE_NAME - len(".json"))


def label_folder(params: LabelParams) -> Path:
    """The folder of the pseudo labels of these parameters; other parameters, words or images have another one.

    A word file counts by its words, not by its path; images count by their folder.
    """
    folder = Path(params.collection).expanduser()
    images_of = str(folder.resolve()) if folder.is_dir() else f"{params.collection} {params.data_root}"
    return (
        files.home() / "labels" / files.digest(content(params), label_spaces.vocabulary(params.vocabulary, params.words).prompts, images_of)
    )


def label(
    samples: Sequence[Sample], params: LabelParams, folder: Path | None = None, engine: str = "processes", gpus: float | None = None
) -> tuple[LabelStore, list[Failure]]:
    """Pseudo labels of both stages for every image, on disk; resumable. Returns the store and what failed, with reasons.

    folder: where to write; None: into the cache, where the files of every ``packs.PACK`` images go into one tar file.
    engine: "processes" of this machine, or "ray": the workers of a Ray cluster, with ``gpus`` GPUs each (None: one on cuda).
    Raises ParameterError or DataError, before any work, for a folder that cannot be written, is inside the folder of images, or
    holds the labels of other images of the same names.
    """
    if engine == "ray":
        cluster.require()
    space = label_spaces.vocabulary(params.vocabulary, params.words)
    own, folder = folder is not None, Path(folder or label_folder(params))
    if not (folder / "labels.json").is_file():  # else it may be whole, and read-only
        files.check_place(folder, folder=True, name="--out" if own else "FMBSEG_HOME")
    collection = Path(params.collection).expanduser()
    if collection.is_dir() and folder.resolve().is_relative_to(collection.resolve()):
        raise DataError(f"{folder}: lies in {collection}, and its label maps would be taken for images; give a folder outside")
    cache.prepare_votes(params)
    store = LabelStore(folder, space, params)
    if own:
        store.check_images(samples)
    work = partial(label_one, store=store, models=Models.of(params), params=params)
    if engine == "ray":
        gpus = float(params.device.startswith("cuda")) if gpus is None else gpus
        return store, cluster.each(work, samples, params.workers, gpus)
    of_image = cache.reader(params.device)
    read = of_image and (lambda sample: store.has(sample) or of_image(sample))
    loose: list[Sample] = []

    def pack(sample: Sample, _: None) -> None:
        loose.extend([sample] if not own and store.path(sample).is_file() else [])
        if len(loose) == packs.PACK:
            store.pack(loose)
            loose.clear()

    return store, parallel.each(work, samples, "pseudo labels", params.workers, pack, read).failures


def label_one(sample: Sample, store: LabelStore, models: Models, params: LabelParams) -> None:
    """Pseudo labels of one image in a store, where it has none yet. A failure is kept there and raised."""
    try:
        if not store.has(sample):
            store.write(sample, label_cached(sample.image, store.space, models, params, given_labels(sample, store.space, params)))
    except Exception as error:
        if parallel.is_expected(error):
            store.fail(sample, parallel.reason(error))
        raise
    store.succeed(sample)


def label_table(samples: Sequence[Sample], store: LabelStore) -> pd.DataFrame:
    """One row for each class in the pseudo labels: number of images, and share of all pixels."""
    counts, holding, pixels = np.zeros(len(store.space)), np.zeros(len(store.space), dtype=int), 0
    for sample in samples:
        labels = store.read(sample)
        one = images.class_pixels(labels, len(store.space))
        counts, holding, pixels = counts + one, holding + (one > 0), pixels + labels.size
    frame = pd.DataFrame({"class": store.space.names, "images": holding, "share": counts / pixels})
    return frame[frame["images"] > 0].sort_values("share", ascending=False).reset_index(drop=True)
