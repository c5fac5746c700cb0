"""Training on a collection: encode, train, and write the module with a description of its training (Sec. 3.3, 4.1)."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset

from fmbseg import files
from fmbseg.data.images import IGNORED
from fmbseg.data.samples import Sample
from fmbseg.errors import DataError, FmbsegError, ParameterError
from fmbseg.params import AlignParams, FeatureParams, LabelParams, ModuleParams, Params, PatchParams, PrealignParams, RunParams
from fmbseg.runs import cache, label, modules, parallel, records
from fmbseg.runs.cache import Models
from fmbseg.runs.label import LabelStore
from fmbseg.stage2 import distributed, training
from fmbseg.stage2 import prealign as prealignment
from fmbseg.stage2.cleaning import clean_labels
from fmbseg.stage2.training import TrainResult, TrainState, patch_labels

CURVE_ROWS = 2000
"""Most rows of the loss curve, evenly spread, in a module's file, whose header has to stay small."""


class PatchDataset(Dataset):
    """The images of a collection for ``stage2.training.train``: patches from the cache, labels in memory (1 KB an image).

    Without ``keep_features`` an item has the encoder's input, (side, side, 3) ``uint8``, in place of patches: ``encode`` makes them.
    """

    def __init__(self, samples: Sequence[Sample], store: LabelStore, params: AlignParams):
        if params.dense_weight and not params.keep_features:
            raise ParameterError("dense_weight: its targets are read from kept features; set keep_features=true, or dense_weight=0")
        self.samples, self.params, self.models = samples, params, Models.of(params)
        self.width, *grid = self.patches(0).shape
        self.labels = [patch_labels(store.read(s), tuple(grid), params.min_labelled).short() for s in samples]
        if params.clean != "none":
            self.labels = clean_labels(map(self.patches, range(len(samples))), self.labels, params)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | None) -> tuple[torch.Tensor, ...]:
        of_image = self.patches if self.params.keep_features else self.pixels
        patches, labels = of_image(index or 0), self.labels[index or 0].long()
        item = (patches, torch.full_like(labels, IGNORED) if index is None else labels)
        if not self.params.dense_weight:
            return item
        target = dense_target(self.samples[index or 0].image, self.models, self.params, tuple(labels.shape))
        return *item, torch.zeros_like(target) if index is None else target

    def patches(self, index: int) -> torch.Tensor:
        """(width, h, w) fp16 encoder patches of one image."""
        return cache.encoder_patches(self.samples[index].image, self.models, self.params)

    def pixels(self, index: int) -> torch.Tensor:
        return cache.encoder_pixels(self.samples[index].image, self.models, self.params)

    def encode(self, batch: torch.Tensor) -> torch.Tensor:
        """(B, width, h, w) patches on the device, from a batch of the items' first parts."""
        if not self.params.keep_features:
            parts = batch.split(self.params.images_per_pass or len(batch))
            batch = torch.cat([cache.encode(part, self.models) for part in parts])
        return batch.to(self.params.device, non_blocking=True).float()

    def classes(self) -> tuple[int, ...]:
        """Sorted indices of the classes that label at least one patch: the K classes of the loss."""
        found = {int(k) for labels in self.labels for k in labels.unique()}
        return tuple(sorted(found - {IGNORED}))


def dense_target(path: Path, models: Models, params: RunParams, grid: tuple[int, int]) -> torch.Tensor:
    """(D, h, w) unit-norm dense CLIP features of an image file on the encoder's grid."""
    return prealignment.dense_target(cache.clip_features(path, models, params).map, grid)


def prealign(params: RunParams) -> Path:
    """Pre-align a module (``stage2.prealign``) on ``prealign_limit`` images of the collection; returns its file.

    A file of the same inputs is not made again. Under torchrun only the first process makes it.
    """
    path = prealigned_path(params)
    if distributed.rank() == 0:
        samples = label.collection(params.model_copy(update={"limit": params.prealign_limit}))
        models = Models.of(params)
        key = _key(params, (PatchParams, ModuleParams, PrealignParams, FeatureParams), samples)
        if _read(path, key) is None:
            if params.keep_features:
                both, read = partial(_dense_and_patches, models=models, params=params), cache.reader(params.device)
                done = parallel.each(both, samples, "dense map and encoder patches", params.workers, read=read)
                samples = [sample for sample, _ in done.results]
            if not samples:
                raise DataError(f"{params.collection}: no image could be encoded for pre-alignment; the reasons are told above")
            paths = [sample.image for sample in samples]
            width, *grid = cache.encoder_patches(paths[0], models, params).shape
            some = parallel.evenly_spaced(paths, params.standardise_images)
            patches = (cache.encoder_patches(one, models, params) for one in some)
            out = len(cache.clip_features(paths[0], models, params).map)
            fresh = training.new_module(patches, width, out, params, params.seed)

            def pair(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
                return cache.encoder_patches(path, models, params), dense_target(path, models, params, tuple(grid))

            made = prealignment.prealign(fresh, parallel.whole(pair, parallel.progress_over(paths, "pre-alignment")), params)
            described = {"key": key, "images": len(samples), "prealigned": len(samples), "classes": [], "indices": [], "curve": {}}
            modules.save(path, made, _made_with(params, sam=False) | described)
    parallel.wait()
    return path


def prealigned_path(params: RunParams) -> Path:
    """The file of the pre-aligned module of these parameters; there is one for each kind of module, encoder and seed."""
    return module_path(params, records.file_name(f"prealigned-{params.module}-{params.encoder}-{params.seed}"))


def _dense_and_patches(sample: Sample, models: Models, params: RunParams) -> None:
    cache.clip_features(sample.image, models, params)
    cache.encoder_patches(sample.image, models, params)


def prepare(samples: Sequence[Sample], params: RunParams) -> list[Sample]:
    """Encode every image once, on disk, in several processes; returns, in order, those that could be encoded.

    Without ``keep_features`` images are encoded during the training, and all are returned. Under torchrun each rank encodes its
    share and waits for the others.
    """
    if not params.keep_features:
        return list(samples)
    work = partial(_encode, models=Models.of(params), params=params)
    parallel.each(work, parallel.split_by_rank(samples), "encoder patches", params.workers, read=cache.reader(params.device))
    parallel.wait()
    kept = cache.encoder_cache(Models.of(params), params)
    return [sample for sample in samples if kept.path(sample.image).is_file()]


def _encode(sample: Sample, models: Models, params: AlignParams) -> None:
    cache.encoder_patches(sample.image, models, params)


def fit(samples: Sequence[Sample], store: LabelStore, params: RunParams, path: Path, initial: Path | None = None) -> TrainResult:
    """Encode, train, and write the module and its record. Where ``path`` holds the module of the same inputs, it is only read.

    initial: a trained module to begin with; None: a new one, or the pre-aligned one (``prealign``). Images without a pseudo
    label are left out. A training that was stopped goes on from its checkpoint and ends with the same file.
    Under torchrun every rank trains and only the first writes. Raises DataError where nothing is labelled, and TrainingError,
    with nothing written but the checkpoint, where the module cannot be used.
    """
    samples = [sample for sample in samples if store.has(sample)]
    if not samples:
        raise DataError(f"{store.folder}: no image has a pseudo label; run notebook 03 or fmbseg label first")
    if params.prealign and initial is None:
        initial = prealign(params)
    words = [store.space.names, store.space.prompts, params.templates, params.text_average]
    several = [distributed.size(), params.negatives] if distributed.size() > 1 else []
    maps = [store.sha256(sample) for sample in samples]
    schemas = (AlignParams, FeatureParams) if params.dense_weight else (AlignParams,)
    on_cuda = ["deterministic"] if params.deterministic and params.device.startswith("cuda") else []
    notes = [store.notes] if store.notes else []  # such as corrected masks, which the module's file has to tell
    key = _key(params, schemas, samples, maps, words, files.sha256_of(initial) if initial else "", several, *on_cuda, *notes)
    if (made := _read(path, key)) is not None:
        print(f"read {path}: trained before on the same labels with the same parameters")
        modules.checkpoint(path).unlink(missing_ok=True)
        return made
    state = modules.load_state(modules.checkpoint(path), key)
    samples = prepare(samples, params)
    if params.device != "cpu":
        parallel.release()  # idle workers would keep their models on the device
    data, models = PatchDataset(samples, store, params), Models.of(params)
    classes = data.classes()
    if not classes:
        raise DataError(
            f"{store.folder}: no patch is labelled; lower min_margin, min_votes or min_labelled, or give more images or other words"
        )
    texts = models.texts(store.space).prototypes()
    if initial:
        start = modules.load(initial)[0]
    else:
        some = parallel.evenly_spaced(range(len(data)), params.standardise_images)
        start = training.new_module((data.patches(i) for i in some), data.width, texts.shape[1], params, params.seed)
    total = params.epochs * -(-len(data) // params.images_per_batch)
    keeper = _Checkpoint(modules.checkpoint(path), key, params.checkpoint_seconds)
    with parallel.progress(total, "training", "step", state.done if state else 0) as bar, deterministic(params):

        def tell(row: dict[str, float] | None) -> None:
            if row:
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            bar.update()

        try:
            result = training.train(
                data,
                classes,
                texts[list(classes)],
                start,
                params,
                params.seed,
                device=params.device,
                on_step=tell,
                state=state,
                on_state=keeper.after_batch,
                encode=data.encode,
                workers=params.workers if parallel.on_gpu(params.device) else 0,
            )
        except FmbsegError:
            with suppress(FmbsegError):
                if bar.n < total:
                    keeper.write()  # the last good state
            raise
    if initial and params.start_share:
        result = dataclasses.replace(result, alignment=prealignment.average(start, result.alignment, params.start_share))
    if distributed.rank() == 0:
        described = _description(key, result, data, store, params)
        started = modules.load(initial)[1] if initial else {}
        in_use = path == module_path(params)
        if len(result.steps) > CURVE_ROWS:
            with files.atomic_path(_curve(path)) as part:
                pd.DataFrame(result.steps).to_csv(part, index=False)
        modules.save(path, result.alignment, described | {"prealigned": started.get("prealigned", 0)}, keep_former=in_use)
        records.of_training(params, result, path).write(path.parent, path.stem)
        modules.checkpoint(path).unlink(missing_ok=True)
    return result


class _Checkpoint:
    """Writes a training's state every ``seconds`` seconds; under torchrun only the first process does."""

    def __init__(self, path: Path, key: str, seconds: float):
        self.path, self.key, self.seconds, self.written, self.take = path, key, seconds, time.monotonic(), None

    def after_batch(self, take: Callable[[], TrainState]) -> None:
        self.take = take
        if time.monotonic() - self.written >= self.seconds:
            self.write()

    def write(self) -> None:
        if distributed.rank() == 0 and self.take:
            modules.save_state(self.path, self.take(), self.key)
            self.written = time.monotonic()


@contextmanager
def deterministic(params: RunParams) -> Iterator[None]:
    """On CUDA, with the parameter ``deterministic``: only operations that give the same result each time; attention is computed in full.

    Raises ParameterError where CUBLAS_WORKSPACE_CONFIG is not set; cuBLAS reads it when the process first uses CUDA.
    """
    if not (params.deterministic and params.device.startswith("cuda")):
        yield
        return
    if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        raise ParameterError("deterministic: cuBLAS needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment; set it and run again")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def _key(params: RunParams, schemas: Sequence[type[Params]], samples: Sequence[Sample], *more: Any) -> str:
    """A key of everything that a module depends on: versions, parameters, hashes of the images, models, and ``more``."""
    models = Models.of(params)
    images = [files.sha256_of(sample.image) for sample in samples]
    return files.digest(
        cache.versions("module"), params.content(*schemas), params.seed, images, [models.clip.key, models.encoder.key], *more
    )


def _read(path: Path, key: str) -> TrainResult | None:
    """The module with this key; None where the file is missing, damaged or another module's: then it is trained."""
    try:
        made, described = modules.load(path)
        if described["key"] != key:
            return None
        steps = pd.DataFrame(described["curve"]).to_dict("records")
        if len(steps) == CURVE_ROWS and _curve(path).is_file():
            whole = cache.kept(_curve(path), lambda file: pd.read_csv(file).to_dict("records"))
            if whole and whole[-1].keys() == steps[-1].keys() and math.isclose(whole[-1]["loss"], steps[-1]["loss"]):
                steps = whole
        return TrainResult(made, steps, tuple(described["indices"]), modules.seconds(path), described["images"])
    except (DataError, KeyError):
        return None


def _curve(path: Path) -> Path:
    """The file of the whole loss curve of a module, where the module's own file holds only a part."""
    return path.with_name(f"{path.stem}.curve.csv")


def _description(key: str, result: TrainResult, data: PatchDataset, store: LabelStore, params: RunParams) -> dict:
    made = _made_with(params)
    return made | {
        "notes": [*made["notes"], *store.notes],
        "key": key,
        "classes": [store.space.names[k] for k in result.classes],
        "indices": result.classes,
        "images": len(data),
        "curve": pd.DataFrame(parallel.evenly_spaced(result.steps[:-1], CURVE_ROWS - 1) + result.steps[-1:]).to_dict("list"),
    }


def _made_with(params: RunParams, sam: bool = True) -> dict:
    """The description in every module's file: the models that it belongs to, and the parameters, weights and notes of its training."""
    return {
        "encoder": params.encoder,
        "clip": params.clip,
        "crop_input": params.crop_input,
        "templates": params.templates,
        "text_average": params.text_average,
        "collection": params.collection,
        "parameters": params.part(LabelParams) | params.part(AlignParams) | {"seed": params.seed},
        "weights": records.used_weights(params, sam) | {"encoder": Models.of(params).encoder.key},
        "notes": records.notes_of(params),
    }


def train(samples: Sequence[Sample], store: LabelStore, params: RunParams, path: Path | None = None) -> TrainResult:
    """Train a module (``fit``). Its record is written beside its file; that of the profile's own module also among the results."""
    path = path or module_path(params)
    result = fit(samples, store, params, path)
    if distributed.rank() == 0 and path == module_path(params):
        record = records.of_training(params, result, path)
        records.keep([dataclasses.replace(record, failed=len(samples) - record.images)], params)
    return result


def module_path(params: RunParams, name: str = "alignment") -> Path:
    """The file of a module of this profile."""
    return modules.place(params.profile, name)
