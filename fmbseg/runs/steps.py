"""The steps as the notebooks and the command line run them: over whole collections, from one set of parameters.

Each reads what earlier steps left on disk, makes what is missing and says where its results lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from fmbseg import files
from fmbseg.data import collections, fetch, label_spaces
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.data.samples import Dataset, Sample
from fmbseg.errors import DataError, WeightsError
from fmbseg.models.texts import ClassTexts
from fmbseg.params import AlignParams, CollectionParams, LabelParams, RunParams
from fmbseg.runs import cache, cluster, evaluate, parallel, records, shards
from fmbseg.schemas import EvaluateRun, TrainRun
from fmbseg.stage1 import pseudo_labels
from fmbseg.stage1.pseudo_labels import LabelStore
from fmbseg.stage2 import alignment, distributed, training
from fmbseg.stage2.training import TrainResult


def results_folder(params: RunParams) -> Path:
    """Where this profile's records, tables and figures go (made if it is not there)."""
    folder = Path(params.results_dir).expanduser()
    folder = (folder if folder.is_absolute() else files.project_root() / folder) / params.profile
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def figure_path(params: RunParams, name: str) -> Path:
    return results_folder(params) / "figures" / f"{name}.png"


def collection(params: CollectionParams) -> list[Sample]:
    """The unlabelled images that the parameters name, evenly spread where there is a limit."""
    found = collections.load_collection(params.collection, params.data_root)
    return parallel.spread(found, params.limit)


def words(params: LabelParams) -> tuple[LabelSpace, ClassTexts]:
    """The training vocabulary and its text features."""
    space = label_spaces.vocabulary(params.vocabulary)
    return space, cache.texts_of(space, params, getattr(params, "device", "cpu"))


def _features(sample: Sample, params: LabelParams) -> None:
    cache.clip_features(sample.image, params, params.device)


def make_features(samples: list[Sample], params: RunParams) -> list[parallel.Failure]:
    """High-resolution CLIP features of every image, on disk."""
    return parallel.each(partial(_features, params=params), samples, "CLIP features", params.workers).failures


def _queries(sample: Sample, params: LabelParams, space: LabelSpace) -> None:
    cache.queries(sample.image, space, params, params.device)


def make_queries(samples: list[Sample], params: RunParams) -> list[parallel.Failure]:
    """Detected classes and Stage 1.1's masks of every image, on disk."""
    work = partial(_queries, params=params, space=label_spaces.vocabulary(params.vocabulary))
    cache.prepare_votes(params, params.device, params.workers)
    return parallel.each(work, samples, "Stage 1.1", params.workers).failures


def query_table(samples: list[Sample], params: LabelParams, space: LabelSpace) -> pd.DataFrame:
    """One row a mask of Stage 1.1: image, class, votes, SAM's confidence, share of the image."""
    rows = [
        {"image": s.name, "class": q.detected.name, "votes": q.detected.votes, "confidence": q.scores.max(), "share": q.chosen.mean()}
        for s in samples
        for q in cache.queries(s.image, space, params, params.device)
    ]
    return pd.DataFrame(rows, columns=["image", "class", "votes", "confidence", "share"])


def label_folder(params: LabelParams) -> Path:
    """Where the pseudo labels of these parameters lie: another folder for every other set of them."""
    return files.home() / "labels" / files.digest(pseudo_labels.content(params))


def label(
    samples: list[Sample], params: RunParams, folder: Path | None = None, engine: str = "processes", gpus: float | None = None
) -> tuple[LabelStore, list[parallel.Failure]]:
    """Pseudo labels of both stages for every image, on disk; resumable. Returns the store and what failed, with reasons.

    engine: "processes" of this machine, or "ray": the workers of a Ray cluster, with ``gpus`` GPUs each (none: one on cuda).
    """
    space = label_spaces.vocabulary(params.vocabulary)
    if engine == "ray":
        cluster.require()
    cache.prepare_votes(params, params.device, params.workers)
    folder = folder or label_folder(params)
    if engine == "ray":
        gpus = float(params.device.startswith("cuda")) if gpus is None else gpus
        return cluster.label_collection(samples, folder, space, params, params.device, params.workers, gpus)
    return pseudo_labels.label_collection(samples, folder, space, params, params.device, params.workers)


def make_labels(samples: list[Sample], params: RunParams, folder: Path | None = None) -> LabelStore:
    """The store of ``label``, for steps that go on with what succeeded."""
    return label(samples, params, folder)[0]


def label_table(samples: list[Sample], store: LabelStore) -> pd.DataFrame:
    """One row a class that the pseudo labels hold: images and share of all pixels."""
    counts, pictures, pixels = torch.zeros(256), torch.zeros(256), 0
    for sample in samples:
        one = torch.from_numpy(store.read(sample)).flatten().long().bincount(minlength=256)
        counts, pictures, pixels = counts + one, pictures + (one > 0), pixels + int(one.sum())
    names = store.space.names
    frame = pd.DataFrame({"class": names, "images": pictures[: len(names)].int(), "share": (counts[: len(names)] / pixels).numpy()})
    return frame[frame["images"] > 0].sort_values("share", ascending=False).reset_index(drop=True)


def module_path(params: RunParams, name: str = "alignment") -> Path:
    """Where a module of this profile lies."""
    return alignment.place(params.profile, name)


def fit(samples: list[Sample], store: LabelStore, params: TrainRun, path: Path, initial: Path | None = None) -> TrainResult:
    """Encode and train, and write the module; where ``path`` holds the one of the same inputs already, it is read.

    initial: a trained module to go on from. Images without a pseudo label are left out. Under torchrun every rank
    trains and the first alone writes.
    """
    samples = [sample for sample in samples if store.has(sample)]
    if not samples:
        raise DataError(f"{store.folder}: no image has a pseudo label; run notebook 03 or fmbseg label first")
    start, origin = alignment.load(initial) if initial else (None, {"key": ""})
    several = [distributed.size(), params.negatives] if distributed.size() > 1 else []
    content = [params.content(AlignParams), params.seed, [files.image_sha256(s.image) for s in samples], origin["key"], *several]
    key = files.digest(store.key, cache.encoder_of(params, params.device).key, *content)
    if path.is_file():
        made, described = alignment.load(path)
        if described["key"] == key:
            print(f"read {path}: trained before on the same pseudo labels with the same parameters")
            return TrainResult(made, pd.DataFrame(described["curve"]).to_dict("records"), tuple(described["indices"]), described["seconds"])
    training.prepare(samples, params, params.device, params.workers)
    if params.device != "cpu":
        parallel.release()  # idle workers would keep their models on the device
    _, texts = words(params)
    result = training.train(samples, store, texts, params, params.seed, params.device, start)
    if distributed.rank() == 0:
        described = {
            "key": key,
            "encoder": params.encoder,
            "clip": params.clip,
            "crop_input": params.crop_input,
            "templates": params.templates,
            "classes": [store.space.names[k] for k in result.classes],
            "indices": result.classes,
            "images": len(samples),
            "curve": pd.DataFrame(result.steps).to_dict("list"),
            "seconds": round(result.seconds, 1),
            "notes": records.notes_of(params),
        }
        alignment.save(path, result.alignment, described)
    return result


def train(samples: list[Sample], store: LabelStore, params: TrainRun, path: Path | None = None) -> TrainResult:
    """Train a module (``fit``) and write the record of it: the profile's among its results, another beside its file."""
    own = path is not None and path != module_path(params)
    path = path or module_path(params)
    result = fit(samples, store, params, path)
    if distributed.rank() == 0:
        folder, name = (path.parent, path.stem) if own else (results_folder(params) / "records", "train")
        records.of_training(params, result, path).write(folder, name)
    return result


def encoders() -> pd.DataFrame:
    """Every frozen encoder by name: its source, size and licence, and the command that brings it where it is not here."""
    rows = []
    for weight in fetch.TABLE:
        if "encoder" in weight.use:
            here = fetch.is_here(weight)
            rows.append((weight.name, here, weight.source, weight.megabytes, weight.licence, "" if here else f"fmbseg fetch {weight.name}"))
    return pd.DataFrame(rows, columns=["encoder", "here", "source", "MB", "licence", "command"]).set_index("encoder")


def benchmarks(params: EvaluateRun) -> list[Dataset]:
    """The benchmarks that the parameters name and that are here; each that is not is told with its reason."""
    found = []
    for name in params.benchmarks:
        try:
            found.append(benchmarks.load_benchmark(name, params.data_root))
        except (DataError, WeightsError) as error:
            print(f"left out {error}")
    if not found:
        raise DataError(f"none of {', '.join(params.benchmarks)} is here; set data_root, or run: fmbseg fetch")
    return found


def evaluate(found: list[Dataset], params: EvaluateRun, module: Path | None = None) -> pd.DataFrame:
    """Every method on every benchmark; writes one record each and returns them as a frame.

    Of several shards, it writes this one's counts in place of records, to be merged, and returns what they alone say.
    """
    made = []
    for method in params.methods:
        path = str(module or module_path(params))
        made += evaluate.evaluate_parts(method, [path], found, params, params.device, params.workers, params.shard, params.num_shards)[0]
    if params.num_shards > 1:
        for part in made:
            part.write(shard_folder(params))
        return records.frame([part.noted for part in made]).dropna(axis=1, how="all")
    return _write_records([part.record for part in made], params)


def shard_folder(params: RunParams) -> Path:
    """Where the shards of this profile's evaluations are written."""
    return results_folder(params) / "shards"


def merge(params: EvaluateRun, folders: Sequence[str | Path] = ()) -> pd.DataFrame:
    """The records of evaluations whose shards lie under these folders (none: this profile's), written and as a frame."""
    return _write_records(shards.merge(shards.read_folders(folders or [shard_folder(params)])), params)


def _write_records(made: Sequence[records.Record], params: RunParams) -> pd.DataFrame:
    folder = results_folder(params) / "records"
    for record in made:
        record.write(folder)
    return records.load(folder).query("kind == 'evaluate'").dropna(axis=1, how="all")
