"""Evaluation of every method on every benchmark, streamed: one picture in memory at a time (Sec. 4.1, 4.2).

What a picture contributes, its counts, is kept on disk, so an evaluation that was stopped goes on where it was.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fmbseg import images, jobs, products, pseudo_labels, records, storage, vocabulary
from fmbseg.alignment import load as load_alignment
from fmbseg.datasets import Dataset, Sample
from fmbseg.errors import DataError, ParameterError
from fmbseg.images import IGNORED
from fmbseg.metrics import Confusion
from fmbseg.params import DetectParams, EvaluateParams, FeatureParams, LabelParams, SegmentParams
from fmbseg.segment import DenseClip, Segmenter, label_map
from fmbseg.stage1_query import class_similarity
from fmbseg.vocabulary import LabelSpace

STAGES = {"stage1.1": "1.1", "stage1.2": "1.2", "stage1": "both"}
METHODS = {
    "dense": "dense zero-shot features of the sliding window (MaskCLIP style)",
    "dense_high_resolution": "dense zero-shot features of the overlapping crops, as Stage 1 sees them (Sec. 3.2)",
    "stage1.1": "Stage 1.1 alone, no training",
    "stage1.2": "Stage 1.2 alone, no training",
    "stage1": "Stage 1.1 and 1.2 combined, no training",
    "fmbseg": "FMbSeg: the aligned encoder",
}


def protocol_space(dataset: Dataset, params: SegmentParams) -> LabelSpace:
    """The benchmark's classes with the background rule of the protocol applied (ours: which stuff words)."""
    if params.background_words == "stuff":
        return dataset.space.with_background_words(vocabulary.BACKGROUND_WORDS)
    return dataset.space


@functools.lru_cache(maxsize=2)
def _segmenter(method: str, module: str, params: EvaluateParams, device: str) -> Segmenter:
    if method == "fmbseg":
        return Segmenter.load(module, device, params)
    side = params.window if "vit" in params.clip.lower() and not params.clip.startswith("random:") else None
    clip = products.load_clip(params.clip, device, side, params.precision)
    return Segmenter(DenseClip(clip, params.path, params.dense_enlarge), clip, params, params.templates)


def _stage1(sample: Sample, space: LabelSpace, params: LabelParams, device: str) -> np.ndarray:
    """Stage 1 as a prediction: every background word is looked for by itself, then all of them are class 0.

    With a background, an unlabelled pixel is background; without, it stays unlabelled and counts as missed.
    """
    words = [(word, k) for k, prompts in enumerate(space.prompts) for word in prompts]
    split = LabelSpace(space.name, tuple(w for w, _ in words), tuple((w,) for w, _ in words), vocabulary.palette(len(words)))
    labels = pseudo_labels.label_picture(sample.image, split, params, device).labels
    table = np.full(256, 0 if space.background else IGNORED, dtype=np.uint8)
    table[: len(words)] = [k for _, k in words]
    return table[labels]


def predict(
    method: str, sample: Sample, spaces: Sequence[LabelSpace], params: EvaluateParams, module: str, device: str
) -> list[np.ndarray]:
    """(height, width) ``uint8`` label maps of one picture in several label spaces; models see the picture once."""
    if method in STAGES:
        staged = params.model_copy(update={"stages": STAGES[method]})
        return [_stage1(sample, space, staged, device) for space in spaces]
    if method == "dense_high_resolution":
        features = products.clip_features(sample.image, params, device)
        return [label_map(class_similarity(features, products.texts_of(space, params, device)), features.size) for space in spaces]
    segmenter = _segmenter(method, module, params, device)
    image = images.read_image(sample.image)
    embedded = segmenter.embed(image)
    return [label_map(segmenter.similarity(embedded, segmenter.texts(space)), image.shape[:2]) for space in spaces]


@dataclass(frozen=True)
class Task:
    """One picture and the columns it belongs to: (index of the data set, its name, sample)."""

    image: Path
    columns: tuple[tuple[int, str, Sample], ...]

    def __str__(self) -> str:
        return str(self.image)


def _count(
    task: Task, method: str, spaces: tuple[LabelSpace, ...], params: EvaluateParams, module: str, content: str, device: str
) -> list[Confusion]:
    """The picture's own confusion matrix for each of its columns, from disk where it is there."""
    own = [spaces[i] for i, _, _ in task.columns]
    sources = [(name, space.prompts) for (_, name, _), space in zip(task.columns, own)]
    store = storage.Store(storage.home() / "cache" / "counts", ".safetensors", content, sources)

    def make(target: Path) -> None:
        sample = task.columns[0][2]
        predictions = predict(method, sample, own, params, module, device)
        tensors = {}
        for i, ((_, _, column), space, prediction) in enumerate(zip(task.columns, own, predictions)):
            counts = Confusion(len(space))
            counts.add(column.truth(), prediction)
            tensors[str(i)] = torch.from_numpy(counts.counts)
        storage.write_tensors(target, tensors)

    tensors = storage.read_tensors(store.get(task.image, make))[0]
    return [Confusion(len(space), tensors[str(i)].numpy()) for i, space in enumerate(own)]


def method_key(method: str, params: EvaluateParams, module: str, device: str) -> str:
    """What a method's predictions depend on: parameters, weights and, for FMbSeg, the trained module."""
    if method not in METHODS:
        raise ParameterError(f"method {method!r}: unknown; known are {', '.join(METHODS)}")
    weights = [products.clip_of(params, device).key]
    if method in STAGES:
        weights.append(products.sam_of(params, device).key)
    used = params.content(*{"fmbseg": (SegmentParams,), "dense": (SegmentParams, FeatureParams, DetectParams)}.get(method, (LabelParams,)))
    used |= {"dense_enlarge": params.dense_enlarge} if method == "dense" else {}
    if method == "fmbseg":
        if not Path(module).is_file():
            raise DataError(f"{module}: no trained module there; run notebook 04 or: fmbseg train")
        weights.append(load_alignment(module)[1]["key"])
    return storage.digest(method, used, weights)


def evaluate(
    method: str, datasets: Sequence[Dataset], params: EvaluateParams, module: str = "", device: str = "cpu", workers: int = 1
) -> list[records.Record]:
    """One method on several benchmarks: one record each. Pictures that benchmarks share go through the models once.

    module: the trained module's file, for "fmbseg". A picture that fails is told, left out and counted in the record.
    """
    started = time.perf_counter()
    key = method_key(method, params, module, device)
    spaces = tuple(protocol_space(d, params) for d in datasets)
    columns: dict[Path, list[tuple[int, str, Sample]]] = {}
    for i, dataset in enumerate(datasets):
        for sample in jobs.spread(dataset.samples, params.eval_limit):
            columns.setdefault(sample.image, []).append((i, dataset.name, sample))
    tasks = [Task(image, tuple(found)) for image, found in columns.items()]
    count = partial(_count, method=method, spaces=spaces, params=params, module=module, content=key, device=device)
    counts = [Confusion(len(space)) for space in spaces]
    numbers = [0] * len(datasets)
    done = jobs.each(count, tasks, f"{method} on {', '.join(d.name for d in datasets)}", workers)
    for task, confusions in done.results:
        for (i, _, _), confusion in zip(task.columns, confusions):
            counts[i], numbers[i] = counts[i] + confusion, numbers[i] + 1
    seconds = time.perf_counter() - started
    return [
        records.of_evaluation(method, dataset, space, confusion, n, len(done.failures), params, module, seconds)
        for dataset, space, confusion, n in zip(datasets, spaces, counts, numbers)
    ]
