"""The steps as the notebooks and the command line run them: over whole collections, from one set of parameters.

Each reads what earlier steps left on disk, makes what is missing and says where its results lie.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd
import torch

from fmbseg import alignment, datasets, evaluation, jobs, products, pseudo_labels, records, storage, training, vocabulary
from fmbseg.datasets import Dataset, Sample
from fmbseg.errors import DataError, WeightsError
from fmbseg.params import CollectionParams, EvaluateNotebook, LabelParams, RunParams, TrainNotebook
from fmbseg.pseudo_labels import LabelStore
from fmbseg.training import TrainResult
from fmbseg.vocabulary import ClassTexts, LabelSpace


def results_folder(params: RunParams) -> Path:
    """Where this profile's records, tables and figures go (made if it is not there)."""
    folder = Path(params.results_dir).expanduser()
    folder = (folder if folder.is_absolute() else storage.project_root() / folder) / params.profile
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def figure_path(params: RunParams, name: str) -> Path:
    return results_folder(params) / "figures" / f"{name}.png"


def photographs(params: CollectionParams) -> list[Sample]:
    """The unlabelled photographs that the parameters name, evenly spread where there is a limit."""
    found = datasets.load_collection(params.photographs, getattr(params, "data_root", ""))
    return jobs.spread(found, params.limit)


def words(params: LabelParams) -> tuple[LabelSpace, ClassTexts]:
    """The training vocabulary and its text features."""
    space = vocabulary.vocabulary(params.vocabulary)
    return space, products.texts_of(space, params, getattr(params, "device", "cpu"))


def _features(sample: Sample, params: LabelParams) -> None:
    products.clip_features(sample.image, params, params.device)


def make_features(samples: list[Sample], params: RunParams) -> list[jobs.Failure]:
    """High-resolution CLIP features of every photograph, on disk."""
    return jobs.each(partial(_features, params=params), samples, "CLIP features", params.workers).failures


def _queries(sample: Sample, params: LabelParams, space: LabelSpace) -> None:
    products.queries(sample.image, space, params, params.device)


def make_queries(samples: list[Sample], params: RunParams) -> list[jobs.Failure]:
    """Detected classes and Stage 1.1's masks of every photograph, on disk."""
    work = partial(_queries, params=params, space=vocabulary.vocabulary(params.vocabulary))
    return jobs.each(work, samples, "Stage 1.1", params.workers).failures


def query_table(samples: list[Sample], params: LabelParams, space: LabelSpace) -> pd.DataFrame:
    """One row a mask of Stage 1.1: photograph, class, votes, SAM's confidence, share of the picture."""
    rows = [
        {"photograph": s.name, "class": q.detected.name, "votes": q.detected.votes, "confidence": q.scores.max(), "share": q.chosen.mean()}
        for s in samples
        for q in products.queries(s.image, space, params, params.device)
    ]
    return pd.DataFrame(rows, columns=["photograph", "class", "votes", "confidence", "share"])


def label_folder(params: LabelParams) -> Path:
    """Where the pseudo labels of these parameters lie: another folder for every other set of them."""
    return storage.home() / "labels" / storage.digest(params.content(LabelParams))


def make_labels(samples: list[Sample], params: RunParams, folder: Path | None = None) -> LabelStore:
    """Pseudo labels of both stages for every photograph, on disk; resumable."""
    space = vocabulary.vocabulary(params.vocabulary)
    store, _ = pseudo_labels.label_collection(samples, folder or label_folder(params), space, params, params.device, params.workers)
    return store


def label_table(samples: list[Sample], store: LabelStore) -> pd.DataFrame:
    """One row a class that the pseudo labels hold: photographs and share of all pixels."""
    counts, pictures, pixels = torch.zeros(256), torch.zeros(256), 0
    for sample in samples:
        one = torch.from_numpy(store.read(sample)).flatten().long().bincount(minlength=256)
        counts, pictures, pixels = counts + one, pictures + (one > 0), pixels + int(one.sum())
    names = store.space.names
    frame = pd.DataFrame({"class": names, "photographs": pictures[: len(names)].int(), "share": (counts[: len(names)] / pixels).numpy()})
    return frame[frame["photographs"] > 0].sort_values("share", ascending=False).reset_index(drop=True)


def module_path(params: RunParams) -> Path:
    """Where the module of this profile lies."""
    return storage.home() / "modules" / params.profile / "alignment.safetensors"


def train(samples: list[Sample], store: LabelStore, params: TrainNotebook, path: Path | None = None) -> TrainResult:
    """Encode, train, and write the module with its record. Photographs without a pseudo label are left out."""
    samples = [sample for sample in samples if store.has(sample)]
    if not samples:
        raise DataError(f"{store.folder}: no photograph has a pseudo label; run notebook 03 or fmbseg label first")
    training.prepare(samples, params, params.device, params.workers)
    _, texts = words(params)
    result = training.train(samples, store, texts, params, params.seed, params.device)
    path = path or module_path(params)
    key = storage.digest(store.key, params.content(training.AlignParams), params.seed, [storage.image_sha256(s.image) for s in samples])
    alignment.save(
        path,
        result.alignment,
        {
            "key": key,
            "encoder": params.encoder,
            "clip": params.clip,
            "crop_input": params.crop_input,
            "templates": params.templates,
            "classes": [store.space.names[k] for k in result.classes],
            "notes": records.notes_of(params),
        },
    )
    record = records.Record(
        "train",
        params.module,
        params.model_dump(),
        params.photographs,
        f"{len(samples)} unlabelled photographs",
        len(samples),
        seconds=round(result.seconds, 1),
        weights=records.used_weights(params, str(path)),
        notes=records.notes_of(params),
        protocol={"first_loss": result.steps[0]["loss"], "last_loss": result.steps[-1]["loss"], "steps": len(result.steps)},
    )
    record.write(results_folder(params) / "records", "train")
    return result


def benchmarks(params: EvaluateNotebook) -> list[Dataset]:
    """The benchmarks that the parameters name and that are here; each that is not is told with its reason."""
    found = []
    for name in params.benchmarks:
        try:
            found.append(datasets.load_benchmark(name, params.data_root))
        except (DataError, WeightsError) as error:
            print(f"left out {error}")
    if not found:
        raise DataError(f"none of {', '.join(params.benchmarks)} is here; set data_root, or run: fmbseg fetch")
    return found


def evaluate(found: list[Dataset], params: EvaluateNotebook, module: Path | None = None) -> pd.DataFrame:
    """Every method on every benchmark; writes one record each and returns them as a frame."""
    folder = results_folder(params) / "records"
    for method in params.methods:
        made = evaluation.evaluate(method, found, params, str(module or module_path(params)), params.device, params.workers)
        for record in made:
            record.write(folder)
    return records.load(folder).query("kind == 'evaluate'").dropna(axis=1, how="all")
