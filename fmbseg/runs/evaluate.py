"""Evaluation of every method on every benchmark, streamed: one image in memory at a time (Sec. 4.1, 4.2).

The counts of every image are kept on disk, so a stopped evaluation continues where it stopped, and shards that share a cache
need no merging: the run without a shard reads their counts.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fmbseg import files
from fmbseg.data import benchmarks, label_spaces
from fmbseg.data.images import IGNORED
from fmbseg.data.label_spaces import Background, LabelSpace
from fmbseg.data.samples import Dataset, Sample
from fmbseg.errors import DataError, ImageError, ParameterError, WeightsError, tell
from fmbseg.models import clip, encoders, sam
from fmbseg.models.texts import ClassTexts
from fmbseg.params import (
    DetectParams,
    EvaluateParams,
    FeatureParams,
    LabelParams,
    MaskParams,
    QueryParams,
    RunParams,
    SegmentParams,
    TextParams,
)
from fmbseg.runs import cache, cluster, hub, label, modules, parallel, records, train
from fmbseg.runs.cache import Cache, Models
from fmbseg.runs.records import Record
from fmbseg.stage1.features import ImageFeatures
from fmbseg.stage1.query_sam import word_similarity
from fmbseg.stage2.metrics import Confusion
from fmbseg.stage2.segmenter import DenseClip, EmbeddedImage, Segmenter, label_map

STAGES = {"stage1.1": "1.1", "stage1.2": "1.2", "stage1": "both"}
GIVEN = "+labels"
"""Ending of a Stage 1 method that gets the image-level labels of the truth in place of detection."""
VOTE = "+sam"
"""Ending of a method on whose label maps SAM's masks vote (ours); ``regions: sam`` makes them vote for all methods."""
METHODS = {
    "dense": "dense zero-shot (MaskCLIP style), window",
    "dense+sam": "dense zero-shot, window; SAM's masks vote",
    "dense_high_resolution": "dense zero-shot, overlapping crops",
    "stage1.1": "Stage 1.1 alone",
    "stage1.2": "Stage 1.2 alone",
    "stage1": "Stage 1.1 + 1.2",
    "stage1.1+labels": "Stage 1.1 given image-level labels",
    "stage1.2+labels": "Stage 1.2 given image-level labels",
    "stage1+labels": "Stage 1.1 + 1.2 given image-level labels",
    "prealigned": "FMbSeg, pre-alignment alone",
    "fmbseg": "FMbSeg",
    "shipped": "FMbSeg, module of the repository",
    "shipped+sam": "FMbSeg, module of the repository; SAM's masks vote",
}
"""Every method and its row of Table 1."""
ALIGNED = ("prealigned", "fmbseg", "shipped")
"""Methods that use a trained module and the frozen encoder."""


@dataclass(frozen=True)
class Method:
    """A row to be measured. name: one of METHODS; module: the trained module's file, for those of ALIGNED."""

    name: str
    module: str = ""

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ParameterError(f"method {self.name!r}: unknown; known are {', '.join(METHODS)}")

    @property
    def stage(self) -> str | None:
        """The stages that it paints; None for a method without Stage 1."""
        return STAGES.get(self.name.removesuffix(GIVEN))

    @property
    def base(self) -> str:
        """Its name but for VOTE."""
        return self.name.removesuffix(VOTE)

    def applied(self, params: EvaluateParams) -> EvaluateParams:
        """The parameters with what the name sets."""
        return params.model_copy(update={"regions": "sam"}) if self.name.endswith(VOTE) else params

    def voted(self, params: EvaluateParams) -> bool:
        """Whether SAM's masks vote on its label maps."""
        return self.applied(params).regions == "sam" and self.base in ("dense", *ALIGNED)

    @functools.cached_property
    def described(self) -> dict[str, Any]:
        """The description of the training in the module's file; empty without a module."""
        return modules.load(self.module)[1] if self.module else {}

    def key(self, params: EvaluateParams) -> str:
        """A key of everything that its predictions depend on, except the image: parameters, weights and, for FMbSeg, the module's file."""
        params = self.applied(params)
        weights, versions = [clip.weights_key(params.clip)], cache.versions("clip")
        if self.stage:
            given = self.name.endswith(GIVEN)
            parts = [FeatureParams, QueryParams, *([] if given else [DetectParams]), *([] if self.stage == "1.1" else [MaskParams])]
            used = params.content(*parts) | {"overlap": params.overlap if self.stage == "both" else None}
            used["reference"] = None if given else cache.vote_content(params)
            weights.append(sam.weights_key(params.sam))
            versions = cache.versions("labels")
        elif self.name == "dense_high_resolution":
            used = params.content(FeatureParams) | {"interpolation": params.interpolation, "word_maximum": params.word_maximum}
        elif self.base == "dense":
            used = params.content(SegmentParams, FeatureParams) | {"dense_enlarge": params.dense_enlarge}
            if params.path == "guided":
                weights.append(encoders.weights_key(params.encoder))
                versions |= cache.versions("encoder")
            for crops_only in ("short_side", "long_limit", "crop_size", "crop_stride", "crop_input"):
                used.pop(crops_only)
        else:
            described, used = self.described, params.content(SegmentParams)
            weights = [files.sha256_of(self.module), clip.weights_key(described["clip"]), encoders.weights_key(described["encoder"])]
            versions = cache.versions("encoder")
        if self.voted(params):
            used, versions = used | params.content(MaskParams), versions | cache.versions("masks")
            weights.append(sam.weights_key(params.sam))
        used |= params.content(TextParams)
        for in_the_words in ("words", "background_words"):  # the counts' key has the words themselves
            used.pop(in_the_words, None)
        return files.digest(self.base, used, weights, versions)


def protocol_space(dataset: Dataset, params: EvaluateParams) -> LabelSpace:
    """The benchmark's classes with the prompt words and the background rule of the protocol (ours: which stuff words).

    Raises ParameterError for a list of words that is empty or repeats a word, and for one that does not have the benchmark.
    """
    space = dataset.space.worded(params.words)
    if isinstance(params.background_words, str):
        return space.with_background(label_spaces.background_rule(params.background_words, space.name))
    return space.with_background(Background(label_spaces.own_words(params.background_words, "background_words").names))


# ---------------------------------------------------------------- one image

Columns = Sequence[tuple[Sample, LabelSpace]]
"""One image as the sample of several benchmarks, each with the benchmark's label space."""


def predict(method: Method, columns: Columns, params: EvaluateParams, models: Models) -> list[np.ndarray]:
    """(height, width) ``int16`` label maps of one image, one a column; the models run once."""
    return [torch.as_tensor(labels).cpu().numpy() for labels in predict_on_device(method, columns, params, models, {})]


def predict_on_device(
    method: Method, columns: Columns, params: EvaluateParams, models: Models, seen: dict[str, EmbeddedImage]
) -> list[np.ndarray | torch.Tensor]:
    """``predict`` as tensors on the device of the model that made them (Stage 1 and overlapping crops: as arrays).

    seen: the frozen encoder's patches of this image, by encoder: read where another module's prediction put them, else filled.
    """
    path, spaces, params = columns[0][0].image, [space for _, space in columns], method.applied(params)
    if method.stage:
        staged = params.model_copy(update={"stages": method.stage, "min_margin": None})  # min_margin is for training only
        return [_stage1(sample, space, models, staged, method.name.endswith(GIVEN)) for sample, space in columns]
    if method.name == "dense_high_resolution":
        found = cache.clip_features(path, models, params)
        return [_of_crops(found, models.texts(space), space.rule, params) for space in spaces]
    if method.base == "dense":
        segmenter = _dense(models, params)
        embedded = segmenter.embed(cache.image(path))
    else:
        segmenter = _aligned(method.module, models, params)
        if segmenter.embedder.encoder.key not in seen:
            seen[segmenter.embedder.encoder.key] = segmenter.through_windows(cache.image(path), segmenter.embedder.encode)
        embedded = segmenter.aligned(seen[segmenter.embedder.encoder.key])
    masks = cache.regions(path, models, params)
    return [segmenter.label_tensor(embedded, segmenter.texts(space), space.rule, masks) for space in spaces]


def _of_crops(found: ImageFeatures, texts: ClassTexts, rule: Background, params: SegmentParams) -> np.ndarray:
    """The dense map of the overlapping crops as a prediction."""
    rows, owner = texts.rows(word_similarity(found, texts), rule.score, params.word_maximum == "after")
    return label_map(rows.permute(2, 0, 1), found.size, params.interpolation, owner, rule)


def _stage1(sample: Sample, space: LabelSpace, models: Models, params: LabelParams, given: bool) -> np.ndarray:
    """Stage 1 as a prediction: every background word is a class of its own in detection, then all of them become class 0.

    With a background, unlabelled pixels are background, whatever score or threshold its rule has; without, they stay
    unlabelled and count as missed. given: the classes of the truth, without the background, replace detection (the
    semi-supervised variant).
    """
    words = [(word, k) for k, prompts in enumerate(space.prompts) for word in prompts]
    split = LabelSpace(space.name, tuple(w for w, _ in words), tuple((w,) for w, _ in words), label_spaces.palette(len(words)))
    present = None
    if given:
        classes = set(np.unique(sample.truth()).tolist()) - {IGNORED} - ({0} if space.background else set())
        present = tuple(i for i, (_, k) in enumerate(words) if k in classes)
    labels = label.label_cached(sample.image, split, models, params, present).labels
    return np.array([k for _, k in words] + [0 if space.background else IGNORED], dtype=np.int16)[labels]  # the last is of IGNORED


@functools.lru_cache(maxsize=1)
def _dense(models: Models, params: EvaluateParams) -> Segmenter:
    image_text = models.clip
    if image_text.blocks is not None:  # a transformer's position embedding fits one size only
        image_text = dataclasses.replace(models, crop_input=params.window).clip
    guide = models.encoder if params.path == "guided" else None
    return Segmenter(
        DenseClip(image_text, params.path, params.dense_enlarge, params.residual, guide),
        image_text,
        params,
        params.templates,
        params.text_average,
    )


def _aligned(module: str, models: Models, params: EvaluateParams) -> Segmenter:
    """The segmenter of a module's file, with the encoder and the image-text model that it was trained with."""
    changed = Path(module).stat().st_mtime_ns if Path(module).is_file() else 0  # a module that was trained again is read again
    return _aligned_at(module, changed, models.device, params)


@functools.lru_cache(maxsize=16)  # small: the models are shared
def _aligned_at(module: str, changed: int, device: str, params: EvaluateParams) -> Segmenter:
    return modules.Segmenter.load(module, device, params, params.templates, params.text_average)


# ---------------------------------------------------------------- whole benchmarks


@dataclass(frozen=True)
class Task:
    """One image and its columns: (index of the data set, sample) of each."""

    image: Path
    columns: tuple[tuple[int, Sample], ...]

    def __str__(self) -> str:
        return str(self.image)


def _count(
    task: Task, methods: Sequence[tuple[Method, str]], spaces: Sequence[LabelSpace], params: EvaluateParams, models: Models
) -> list[list[np.ndarray]]:
    """The counts of one image for every method and each of its columns, read from disk where they are there.

    methods: with their keys. Counts are those of ``Confusion.nonzero``; their key covers the bytes of image and truth.
    """
    columns = [(sample, spaces[i]) for i, sample in task.columns]
    truths = [sample.truth() for sample, _ in columns]
    shas = [hashlib.sha256(truth.tobytes() + str(truth.shape).encode()).hexdigest() for truth in truths]
    seen: dict[str, EmbeddedImage] = {}
    counted = []
    for method, key in methods:
        caches = [
            Cache("counts", ".safetensors", key, space.prompts, space.background, *_rule(space), sha)
            for (_, space), sha in zip(columns, shas)
        ]
        paths = [one.path(task.image) for one in caches]
        pairs = [cache.kept(path, lambda one: files.read_tensors(one)[0]["counts"].numpy()) for path in paths]
        missing = [c for c, found in enumerate(pairs) if found is None]
        predictions = predict_on_device(method, [columns[c] for c in missing], params, models, seen) if missing else []
        for c, prediction in zip(missing, predictions):
            counts = Confusion(len(columns[c][1]))
            counts.add(truths[c], prediction)
            pairs[c] = counts.nonzero()
            files.write_tensors(paths[c], {"counts": torch.from_numpy(pairs[c])})
        counted.append(pairs)
    return counted


def _rule(space: LabelSpace) -> tuple[float, ...]:
    """The parameters of the background's rule besides its words; empty where it has words alone."""
    rule = space.rule
    return () if (rule.score, rule.threshold) == (None, 0.0) else (rule.score, rule.threshold, rule.scale)


def measure(
    methods: Sequence[Method],
    datasets: Sequence[Dataset],
    params: EvaluateParams,
    shard: int = 0,
    num_shards: int = 1,
    engine: str = "processes",
) -> list[list[Record]]:
    """Methods of one kind on several benchmarks: for each method a list of records, one a benchmark.

    Images that benchmarks share go through the models once, and several modules share the encoder's pass. An image that fails
    is left out with a message and counted in the record. params: device and workers count too, where they are those of a run.
    shard, num_shards: measure only every ``num_shards``-th image from ``shard``; the records say so. engine: "processes" or
    "ray". Raises ParameterError for an unknown method or shard.
    """
    started, models = time.perf_counter(), Models.of(params)
    device, workers = models.device, getattr(params, "workers", 1)
    params = EvaluateParams(**params.part(EvaluateParams))  # drop fields of the run
    if any(method.stage for method in methods):
        cache.prepare_votes(params, workers)  # first, because keys cover the reference images
    keyed = [(method, method.key(params)) for method in methods]
    spaces = [protocol_space(d, params) for d in datasets]
    columns: dict[Path, list[tuple[int, Sample]]] = {}
    for i, dataset in enumerate(datasets):
        for sample in parallel.evenly_spaced(dataset.samples, params.eval_limit):
            columns.setdefault(sample.image, []).append((i, sample))
    tasks = parallel.shard([Task(image, tuple(found)) for image, found in columns.items()], shard, num_shards)
    confusions = [[Confusion(len(space)) for space in spaces] for _ in methods]
    numbers = [0] * len(datasets)

    def take(task: Task, counted: list[list[np.ndarray]]) -> None:
        for c, (i, _) in enumerate(task.columns):
            numbers[i] += 1
            for of_method, pairs in zip(confusions, counted):
                of_method[i].add_nonzero(pairs[c])

    work = partial(_count, methods=keyed, spaces=spaces, params=params, models=models)
    if engine == "ray":
        cluster.each(work, tasks, workers, float(device.startswith("cuda")))
    title = f"{', '.join(dict.fromkeys(m.name for m in methods))} on {', '.join(d.name for d in datasets)}"
    parallel.each(work, tasks, title, workers if engine == "processes" else 1, take, cache.reader(device))
    for dataset, confusion in zip(datasets, confusions[0]):
        if absent := benchmarks.unseen(dataset, confusion.counts.sum(axis=1)):
            tell(absent)
    seconds = (time.perf_counter() - started) / len(methods)
    made = []
    for method, of_method in zip(methods, confusions):
        made.append([])
        for i, (dataset, space, confusion) in enumerate(zip(datasets, spaces, of_method)):
            failed = sum(column == i for task in tasks for column, _ in task.columns) - numbers[i]
            record = records.of_evaluation(method.name, dataset, space, method.applied(params), device, method.module, method.described)
            if method.voted(params):
                record = dataclasses.replace(record, weights=record.weights | {"sam": sam.weights_key(params.sam)})
            if num_shards > 1:
                note = f"shard {shard} of {num_shards} alone"
                record = dataclasses.replace(record, notes=[*record.notes, note])
            made[-1].append(records.counted(record, space.names, confusion, numbers[i], failed, seconds))
    return made


def find_benchmarks(names: Sequence[str], data_root: str = "") -> list[Dataset]:
    """The benchmarks of these names that are here; for the others the reason is printed. Raises DataError where none is here."""
    found = []
    for name in names:
        try:
            found.append(benchmarks.load_benchmark(name, data_root))
        except (DataError, ImageError, WeightsError) as error:
            parallel.leave_out(parallel.Failure(name, str(error)))
    if not found:
        raise DataError(f"none of {', '.join(names)} is here; set data_root, or run: fmbseg fetch")
    return found


def evaluate(found: Sequence[Dataset], params: RunParams, module: str | Path | None = None, engine: str = "processes") -> pd.DataFrame:
    """Measure every method on every benchmark, write one record each, and return the records as a frame.

    module: the trained module, as ``hub.find`` takes it; None: the profile's, and where none was trained "fmbseg" gives way to
    "shipped". With several shards it keeps this shard's counts and returns a frame of them, but writes no record.
    """
    names, path = list(params.methods), module or modules.default(params.profile)
    trained = any(name.removesuffix(VOTE) == "fmbseg" for name in names)
    if trained and path == modules.SHIPPED:
        tell = "no module of this profile was trained (fmbseg train, or notebook 04): in place of fmbseg stands shipped,"
        print(tell, "the module that comes with the repository")
        names = list(dict.fromkeys(name.replace("fmbseg", "shipped") for name in names))
    files_of = {"prealigned": train.prealigned_path(params), "fmbseg": hub.find(path) if trained else path, "shipped": modules.SHIPPED}
    methods = [Method(name, str(files_of.get(name.removesuffix(VOTE), ""))) for name in names]
    aligned = [method for method in methods if method.base in ALIGNED]  # together: they share the encoder's pass
    made: list[Record] = []
    for group in [[method] for method in methods if method not in aligned] + ([aligned] if aligned else []):
        for of_method in measure(group, found, params, params.shard, params.num_shards, engine):
            made += of_method
    if params.num_shards > 1:
        return records.frame(made).dropna(axis=1, how="all")
    return records.keep(made, params).dropna(axis=1, how="all")
