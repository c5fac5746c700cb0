"""Evaluation of every method on every benchmark, streamed: one image in memory at a time (Sec. 4.1, 4.2).

What an image contributes, its counts, is kept on disk, so an evaluation that was stopped goes on where it was.
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

from fmbseg import files
from fmbseg.data import images, label_spaces
from fmbseg.data.images import IGNORED
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.data.samples import Dataset, Sample
from fmbseg.errors import ParameterError
from fmbseg.models.clip import weights_key as clip_weights_key
from fmbseg.models.sam import weights_key as sam_weights_key
from fmbseg.params import EvaluateParams, FeatureParams, LabelParams, SegmentParams
from fmbseg.runs import cache, parallel, records, shards
from fmbseg.stage1 import pseudo_labels
from fmbseg.stage1.query_sam import class_similarity
from fmbseg.stage2.alignment import load as load_alignment
from fmbseg.stage2.metrics import Confusion
from fmbseg.stage2.segmenter import DenseClip, EmbeddedImage, Segmenter, label_map

STAGES = {"stage1.1": "1.1", "stage1.2": "1.2", "stage1": "both"}
GIVEN = "+labels"
"""Ending of a Stage 1 method that is given the image-level labels (of the truth) in place of detection."""
METHODS = {
    "dense": "dense zero-shot features of the sliding window (MaskCLIP style)",
    "dense_high_resolution": "dense zero-shot features of the overlapping crops, as Stage 1 sees them (Sec. 3.2)",
    "stage1.1": "Stage 1.1 alone, no training",
    "stage1.2": "Stage 1.2 alone, no training",
    "stage1": "Stage 1.1 and 1.2 combined, no training",
    "stage1.1+labels": "Stage 1.1 given the image's image-level labels",
    "stage1.2+labels": "Stage 1.2 given the image's image-level labels",
    "stage1+labels": "Stage 1.1 and 1.2 combined, given the image's image-level labels",
    "fmbseg": "FMbSeg: the aligned encoder",
}


def protocol_space(dataset: Dataset, params: SegmentParams) -> LabelSpace:
    """The benchmark's classes with the background rule of the protocol applied (ours: which stuff words).

    Raises ParameterError for a list of words that is empty or repeats one.
    """
    if params.background_words == "name":
        return dataset.space
    words = label_spaces.BACKGROUND_WORDS
    if params.background_words != "stuff":
        words = label_spaces.own_words(params.background_words, "background_words").names
    return dataset.space.with_background_words(words)


@functools.lru_cache(maxsize=32)  # the models behind them are shared
def _segmenter(method: str, module: str, written: int, params: EvaluateParams, device: str) -> Segmenter:
    if method == "fmbseg":
        return Segmenter.load(module, device, params, params.templates)
    side = params.window if "vit" in params.clip.lower() and not params.clip.startswith("random:") else None
    clip = cache.load_clip(params.clip, device, side, params.precision)
    return Segmenter(DenseClip(clip, params.path, params.dense_enlarge), clip, params, params.templates)


def _stage1(sample: Sample, space: LabelSpace, params: LabelParams, device: str, given: bool) -> np.ndarray:
    """Stage 1 as a prediction: every background word is looked for by itself, then all of them are class 0.

    With a background, an unlabelled pixel is background; without, it stays unlabelled and counts as missed.
    given: the classes of the truth, less the background, take the place of detection (the semi-supervised variant).
    """
    words = [(word, k) for k, prompts in enumerate(space.prompts) for word in prompts]
    split = LabelSpace(space.name, tuple(w for w, _ in words), tuple((w,) for w, _ in words), label_spaces.palette(len(words)))
    present = None
    if given:
        classes = set(np.unique(sample.truth()).tolist()) - {IGNORED} - ({0} if space.background else set())
        present = tuple(i for i, (_, k) in enumerate(words) if k in classes)
    labels = pseudo_labels.label_picture(sample.image, split, params, device, present).labels
    table = np.full(256, 0 if space.background else IGNORED, dtype=np.uint8)
    table[: len(words)] = [k for _, k in words]
    return table[labels]


Columns = Sequence[tuple[Sample, LabelSpace]]
"""One image as the sample of several benchmarks, each with the benchmark's label space."""


def predict(method: str, columns: Columns, params: EvaluateParams, module: str, device: str) -> list[np.ndarray]:
    """(height, width) ``uint8`` label maps of one image, one a column; models see the image once."""
    path, spaces = columns[0][0].image, [space for _, space in columns]
    stage, given = STAGES.get(method.removesuffix(GIVEN)), method.endswith(GIVEN)
    if stage:
        staged = params.model_copy(update={"stages": stage})
        return [_stage1(sample, space, staged, device, given) for sample, space in columns]
    if method == "dense_high_resolution":
        features = cache.clip_features(path, params, device)
        similar = [class_similarity(features, cache.texts_of(space, params, device)) for space in spaces]
        return [label_map(one, features.size, interpolation=params.interpolation) for one in similar]
    aligned = method == "fmbseg"
    written = Path(module).stat().st_mtime_ns if aligned and Path(module).is_file() else 0  # a module trained anew is read anew
    segmenter = _segmenter(method, module, written, params, device)
    embedded = segmenter.aligned(_patches(path, segmenter)) if aligned else segmenter.embed(images.read_image(path))
    return [segmenter.label(embedded, segmenter.texts(space)) for space in spaces]


def _patches(path: Path, segmenter: Segmenter) -> EmbeddedImage:
    """The frozen encoder's patches of an image's windows, kept for the next module."""
    key = (path, segmenter.embedder.encoder.key, segmenter.params)
    if key not in _last:
        _last.clear()
        _last[key] = segmenter.through_windows(images.read_image(path), segmenter.embedder.encode)
    return _last[key]


_last: dict[tuple, EmbeddedImage] = {}


@dataclass(frozen=True)
class Task:
    """One image and the columns it belongs to: (index of the data set, its name, sample)."""

    image: Path
    columns: tuple[tuple[int, str, Sample], ...]

    def __str__(self) -> str:
        return str(self.image)


def _count(
    task: Task, runs: tuple[tuple[str, str, str], ...], spaces: tuple[LabelSpace, ...], params: EvaluateParams, device: str
) -> list[list[np.ndarray]]:
    """The image's own counts, for every run and each of its columns, from disk where they are there.

    runs: (method, module, key of all that its predictions depend on) each. Counts are as ``Confusion.nonzero`` gives them.
    """
    columns = [(sample, spaces[i]) for i, _, sample in task.columns]
    sources = [(name, space.prompts) for (_, name, _), (_, space) in zip(task.columns, columns)]
    counted = []
    for method, module, content in runs:
        store = files.Store(files.home() / "cache" / "counts", ".safetensors", "nonzero", content, sources)

        def make(target: Path, method: str = method, module: str = module) -> None:
            tensors = {}
            for i, ((sample, space), prediction) in enumerate(zip(columns, predict(method, columns, params, module, device))):
                counts = Confusion(len(space))
                counts.add(sample.truth(), prediction)
                tensors[str(i)] = torch.from_numpy(counts.nonzero())
            files.write_tensors(target, tensors)

        tensors = files.read_tensors(store.get(task.image, make))[0]
        counted.append([tensors[str(i)].numpy() for i in range(len(columns))])
    return counted


def method_key(method: str, params: EvaluateParams, module: str, device: str) -> str:
    """What a method's predictions depend on: parameters, weights and, for FMbSeg, the trained module."""
    if method not in METHODS:
        raise ParameterError(f"method {method!r}: unknown; known are {', '.join(METHODS)}")
    weights = [clip_weights_key(params.clip)]
    if method.removesuffix(GIVEN) in STAGES:
        weights.append(sam_weights_key(params.sam))
        used = params.content(LabelParams) | {"reference": None if method.endswith(GIVEN) else cache.vote_content(params, device)}
    elif method == "dense_high_resolution":
        used = params.content(FeatureParams) | {"interpolation": params.interpolation, "templates": params.templates}
    elif method == "dense":
        used = params.content(SegmentParams, FeatureParams) | {"templates": params.templates, "dense_enlarge": params.dense_enlarge}
    else:
        weights.append(load_alignment(module)[1]["key"])
        used = params.content(SegmentParams) | {"templates": params.templates}
    return files.digest(method, used, weights)


def evaluate(
    method: str, datasets: Sequence[Dataset], params: EvaluateParams, module: str = "", device: str = "cpu", workers: int = 1
) -> list[records.Record]:
    """One method on several benchmarks: one record each. Images that benchmarks share go through the models once.

    module: the trained module's file, for "fmbseg". An image that fails is told, left out and counted in the record.
    """
    return evaluate_modules(method, [module], datasets, params, device, workers)[0]


def evaluate_modules(
    method: str, modules: Sequence[str], datasets: Sequence[Dataset], params: EvaluateParams, device: str = "cpu", workers: int = 1
) -> list[list[records.Record]]:
    """``evaluate`` for several modules of one encoder: one list each. The encoder sees every image once for all of them."""
    return [[part.record for part in parts] for parts in evaluate_parts(method, modules, datasets, params, device, workers)]


def evaluate_parts(
    method: str,
    modules: Sequence[str],
    datasets: Sequence[Dataset],
    params: EvaluateParams,
    device: str = "cpu",
    workers: int = 1,
    shard: int = 0,
    num_shards: int = 1,
) -> list[list[shards.Part]]:
    """``evaluate_modules`` on every ``num_shards``-th image from ``shard``, with the confusion matrices behind the records.

    Raises ParameterError for a shard that is none of 0..num_shards-1.
    """
    started = time.perf_counter()
    params = EvaluateParams(**params.part(EvaluateParams))  # what a notebook has beside does not matter here
    if method in STAGES:
        cache.prepare_votes(params, device, workers)  # before the keys, which name the images it finds
    runs = tuple((method, module, method_key(method, params, module, device)) for module in modules)
    spaces = tuple(protocol_space(d, params) for d in datasets)
    chosen = [parallel.spread(dataset.samples, params.eval_limit) for dataset in datasets]
    columns: dict[Path, list[tuple[int, str, Sample]]] = {}
    for i, samples in enumerate(chosen):
        for sample in samples:
            columns.setdefault(sample.image, []).append((i, datasets[i].name, sample))
    tasks = parallel.shard([Task(image, tuple(found)) for image, found in columns.items()], shard, num_shards)
    counts = [[Confusion(len(space)) for space in spaces] for _ in runs]
    numbers = [0] * len(datasets)

    def take(task: Task, counted: list[list[np.ndarray]]) -> None:
        for c, (i, _, _) in enumerate(task.columns):
            numbers[i] += 1
            for of_run, pairs in zip(counts, counted):
                of_run[i].add_nonzero(pairs[c])

    count = partial(_count, runs=runs, spaces=spaces, params=params, device=device)
    parallel.each(count, tasks, f"{method} on {', '.join(d.name for d in datasets)}", workers, take)
    seconds = (time.perf_counter() - started) / len(runs)
    made: list[list[shards.Part]] = []
    for (_, module, content), of_run in zip(runs, counts):
        made.append([])
        for i, (dataset, space, confusion) in enumerate(zip(datasets, spaces, of_run)):
            failed = sum(column == i for task in tasks for column, _, _ in task.columns) - numbers[i]
            record = records.of_evaluation(method, dataset, space, confusion, numbers[i], failed, params, module, seconds)
            key = files.digest(content, dataset.name, space.prompts, [sample.name for sample in chosen[i]])
            made[-1].append(shards.Part(record, confusion, shard, num_shards, len(chosen[i]), key))
    return made
