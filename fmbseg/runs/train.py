"""Training over a collection: encode, train, write the module with what made it (Sec. 3.3, 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch.utils.data import Dataset

from fmbseg import files
from fmbseg.data import collections, fetch
from fmbseg.data.samples import Sample
from fmbseg.errors import DataError
from fmbseg.params import AlignParams, FeatureParams, LabelParams, ModuleParams, PatchParams, PrealignParams, RunParams
from fmbseg.runs import cache, modules, parallel, records
from fmbseg.runs.cache import Models
from fmbseg.runs.label import LabelStore
from fmbseg.stage2 import distributed, training
from fmbseg.stage2 import prealign as prealignment
from fmbseg.stage2.patches import patch_labels
from fmbseg.stage2.training import TrainResult


class PatchDataset(Dataset):
    """The images of a collection as ``stage2.train`` takes them: patches from the cache, labels kept in memory (1 KB an image)."""

    def __init__(self, samples: Sequence[Sample], store: LabelStore, params: AlignParams):
        self.samples, self.params, self.models = samples, params, Models.of(params)
        self.width, *grid = self.patches(0).shape
        self.labels = [patch_labels(store.read(s), tuple(grid), params.min_labelled).short() for s in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | None) -> tuple[torch.Tensor, ...]:
        patches, labels = self.patches(index or 0), self.labels[index or 0].long()
        item = (patches, torch.full_like(labels, -1) if index is None else labels)
        if not self.params.dense_weight:
            return item
        target = dense_target(self.samples[index or 0].image, self.models, self.params, tuple(labels.shape))
        return *item, torch.zeros_like(target) if index is None else target

    def patches(self, index: int) -> torch.Tensor:
        """(width, h, w) fp16 encoder patches of one image."""
        return cache.encoder_patches(self.samples[index].image, self.models, self.params)

    def classes(self) -> tuple[int, ...]:
        """Indices of the classes that label any patch, sorted: the K classes of the loss."""
        found = {int(k) for labels in self.labels for k in labels.unique()}
        return tuple(sorted(found - {-1}))


def dense_target(path: Path, models: Models, params: RunParams, grid: tuple[int, int]) -> torch.Tensor:
    """(D, h, w) unit-norm dense CLIP features of an image file on the encoder's grid."""
    return prealignment.dense_target(cache.clip_features(path, models, params).map, grid)


def prealign(params: RunParams) -> Path:
    """Pre-align a module (``stage2.prealign``) on the collection, of which ``prealign_limit`` bounds the images; returns its file.

    It is read where it is there already. Under torchrun only the first process makes it.
    """
    path = prealigned_path(params)
    if distributed.rank() == 0:
        samples = parallel.evenly_spaced(collections.load_collection(params.collection, params.data_root), params.prealign_limit)
        models = Models.of(params)
        key = files.digest(
            cache.VERSIONS,
            params.content(PatchParams, ModuleParams, PrealignParams, FeatureParams),
            params.seed,
            [files.sha256_of(sample.image) for sample in samples],
            [models.clip.key, models.encoder.key],
        )
        if _read(path, key) is None:
            both = partial(_dense_and_patches, models=models, params=params)
            samples = [sample for sample, _ in parallel.each(both, samples, "dense map and encoder patches", params.workers).results]
            if not samples:
                raise DataError(f"{params.collection}: no image could be encoded for pre-alignment; the reasons are told above")
            paths = [sample.image for sample in samples]
            width, *grid = cache.encoder_patches(paths[0], models, params).shape
            some = parallel.evenly_spaced(paths, params.standardise_images)
            patches = (cache.encoder_patches(one, models, params) for one in some)
            out = len(cache.clip_features(paths[0], models, params).map)
            fresh = training.new_module(patches, width, out, params, params.seed)
            items = (
                (cache.encoder_patches(one, models, params), dense_target(one, models, params, tuple(grid)))
                for one in parallel.progress_over(paths, "pre-alignment")
            )
            made = prealignment.prealign(fresh, items, params)
            described = {"key": key, "images": len(samples), "prealigned": len(samples), "classes": [], "indices": [], "curve": {}}
            modules.save(path, made, _made_with(params) | described)
    parallel.wait()
    return path


def prealigned_path(params: RunParams) -> Path:
    """Where the pre-aligned module of these parameters lies, one for every kind of module, encoder and seed."""
    return module_path(params, records.file_name(f"prealigned-{params.module}-{params.encoder}-{params.seed}"))


def _dense_and_patches(sample: Sample, models: Models, params: RunParams) -> None:
    cache.clip_features(sample.image, models, params)
    cache.encoder_patches(sample.image, models, params)


def prepare(samples: Sequence[Sample], params: RunParams) -> list[Sample]:
    """Encode every image once, on disk, in several processes; returns those that could be encoded, in order.

    Under torchrun each rank encodes its share, and all wait for each other.
    """
    work = partial(_encode, models=Models.of(params), params=params)
    parallel.each(work, parallel.split_by_rank(samples), "encoder patches", params.workers)
    parallel.wait()
    kept = cache.encoder_cache(Models.of(params), params)
    return [sample for sample in samples if kept.path(sample.image).is_file()]


def _encode(sample: Sample, models: Models, params: AlignParams) -> None:
    cache.encoder_patches(sample.image, models, params)


def fit(samples: Sequence[Sample], store: LabelStore, params: RunParams, path: Path, initial: Path | None = None) -> TrainResult:
    """Encode and train, and write the module; where ``path`` holds the one of the same inputs already, it is read.

    initial: a trained module to go on from; none: a fresh one, or the pre-aligned one (``prealign``). Images without a pseudo label are left out. Under torchrun every rank
    trains and only the first writes.
    """
    samples = [sample for sample in samples if store.has(sample)]
    if not samples:
        raise DataError(f"{store.folder}: no image has a pseudo label; run notebook 03 or fmbseg label first")
    if params.prealign and initial is None:
        initial = prealign(params)
    key = _key(samples, store, params, initial)
    if (made := _read(path, key)) is not None:
        print(f"read {path}: trained before on the same pseudo labels with the same parameters")
        return made
    samples = prepare(samples, params)
    if params.device != "cpu":
        parallel.release()  # idle workers would keep their models on the device
    data, models = PatchDataset(samples, store, params), Models.of(params)
    classes = data.classes()
    if not classes:
        raise DataError(f"{store.folder}: no patch is labelled; lower min_votes or min_labelled, or give more images or other words")
    texts = models.texts(store.space).prototypes()
    if initial:
        start = modules.load(initial)[0]
    else:
        some = parallel.evenly_spaced(range(len(data)), params.standardise_images)
        start = training.new_module((data.patches(i) for i in some), data.width, texts.shape[1], params, params.seed)
    total = params.epochs * -(-len(data) // params.images_per_batch)
    with parallel.progress(total, "training", "step") as bar:

        def tell(row: dict[str, float] | None) -> None:
            if row:
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            bar.update()

        result = training.train(data, classes, texts[list(classes)], start, params, params.seed, params.device, tell)
    if distributed.rank() == 0:
        described = _description(key, result, data, store, params)
        started = modules.load(initial)[1] if initial else {}
        modules.save(path, result.alignment, described | {"prealigned": started.get("prealigned", 0)})
    return result


def _key(samples: Sequence[Sample], store: LabelStore, params: RunParams, initial: Path | None) -> str:
    """Of everything that the module depends on: images and label maps by their bytes, models, words, parameters."""
    several = [distributed.size(), params.negatives] if distributed.size() > 1 else []
    return files.digest(
        cache.VERSIONS,
        params.content(AlignParams, FeatureParams) if params.dense_weight else params.content(AlignParams),
        params.seed,
        [(files.sha256_of(s.image), files.sha256_of(store.path(s))) for s in samples],
        [store.space.names, store.space.prompts, params.templates, params.text_average],
        [Models.of(params).clip.key, Models.of(params).encoder.key],
        files.sha256_of(initial) if initial else "",
        several,
    )


def _read(path: Path, key: str) -> TrainResult | None:
    """The module of that key; None where there is another, none, or a damaged file, which is then made anew."""
    try:
        made, described = modules.load(path)
        if described["key"] != key:
            return None
        return TrainResult(made, pd.DataFrame(described["curve"]).to_dict("records"), tuple(described["indices"]), described["seconds"])
    except (DataError, KeyError):
        return None


def _description(key: str, result: TrainResult, data: PatchDataset, store: LabelStore, params: RunParams) -> dict:
    return _made_with(params) | {
        "key": key,
        "classes": [store.space.names[k] for k in result.classes],
        "indices": result.classes,
        "images": len(data),
        "curve": pd.DataFrame(result.steps).to_dict("list"),
        "seconds": round(result.seconds, 1),
    }


def _made_with(params: RunParams) -> dict:
    """What every module's file says: the models that it belongs to, and the parameters, weights and notes of its training."""
    return {
        "encoder": params.encoder,
        "clip": params.clip,
        "crop_input": params.crop_input,
        "templates": params.templates,
        "text_average": params.text_average,
        "collection": params.collection,
        "parameters": params.part(LabelParams) | params.part(AlignParams) | {"seed": params.seed},
        "weights": records.used_weights(params) | {"encoder": Models.of(params).encoder.key},
        "notes": records.notes_of(params),
        "seconds": 0.0,
    }


def train(samples: Sequence[Sample], store: LabelStore, params: RunParams, path: Path | None = None) -> TrainResult:
    """Train a module (``fit``) and write the record of it: the profile's among its results, another beside its file."""
    own = path is not None and path != module_path(params)
    path = path or module_path(params)
    result = fit(samples, store, params, path)
    if distributed.rank() == 0:
        folder, name = (path.parent, path.stem) if own else (records.results_folder(params) / "records", "train")
        records.of_training(params, result, path).write(folder, name)
    return result


def module_path(params: RunParams, name: str = "alignment") -> Path:
    """Where a module of this profile lies."""
    return modules.place(params.profile, name)


def encoders() -> pd.DataFrame:
    """Every frozen encoder by name: its source, size and licence, and the command that brings it where it is not here."""
    rows = []
    for weight in fetch.TABLE:
        if "encoder" in weight.use:
            here = fetch.is_here(weight)
            rows.append((weight.name, here, weight.source, weight.megabytes, weight.licence, "" if here else f"fmbseg fetch {weight.name}"))
    return pd.DataFrame(rows, columns=["encoder", "here", "source", "MB", "licence", "command"]).set_index("encoder")
