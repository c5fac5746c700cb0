"""Comparisons by the same run: variants of one parameter with several seeds (Sec. 4.4), the stages, fine-tuning (appendix)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fmbseg.data.samples import Dataset, Sample
from fmbseg.errors import ParameterError
from fmbseg.params import RunParams
from fmbseg.runs import evaluate, label, modules, records, train
from fmbseg.runs.evaluate import Method
from fmbseg.runs.label import LabelStore
from fmbseg.schemas import CompareRun, FineTuneRun, StagesRun

MEASURES = ["miou", "precision", "coverage"]


@dataclass(frozen=True)
class Run:
    """One training of a comparison: the variant's name, its parameters (seed among them) and its module's file."""

    variant: str
    params: RunParams
    path: Path


def plan(params: CompareRun, kind: str, variants: Mapping[str, Mapping[str, Any]] | None = None) -> list[Run]:
    """Every variant with every seed. kind: the comparison's name, "architecture", "loss" or "encoder"."""
    runs = []
    for name, settings in (params.variants if variants is None else variants).items():
        for seed in params.seeds:
            changed = params.model_copy(update={**settings, "seed": seed})
            runs.append(Run(name, changed, train.module_path(params, f"{kind}-{records.file_name(name)}-{seed}")))
    return runs


def compare(runs: Sequence[Run], kind: str, samples: list[Sample], store: LabelStore, found: Sequence[Dataset]) -> pd.DataFrame:
    """Train and evaluate every run on the same pseudo labels for the same number of steps: a row a run and benchmark.

    Each row is written as a record, in place of the run's earlier records of this comparison. A module that was trained before
    with the same inputs is not trained again.
    """
    trained = []
    for number, run in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {run.variant}, seed {run.params.seed}", flush=True)
        trained.append(train.fit(samples, store, run.params, run.path))
    params = runs[0].params
    measured = evaluate.measure([Method("fmbseg", str(r.path)) for r in runs], found, params)
    made = [
        dataclasses.replace(record, method=run.variant, seconds=result.seconds)
        for run, of_run, result in zip(runs, measured, trained)
        for record in of_run
    ]
    return records.keep(made, params, kind)


def curves(runs: Sequence[Run]) -> pd.DataFrame:
    """The loss of every step of every run: variant, seed, step, loss."""
    frames = []
    for run in runs:
        curve = modules.load(run.path)[1]["curve"]
        frames.append(pd.DataFrame({"variant": run.variant, "seed": run.params.seed, "step": curve["step"], "loss": curve["loss"]}))
    return pd.concat(frames, ignore_index=True)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread (sample standard deviation over the seeds) of the mIoU: a row a variant and benchmark."""
    grouped = frame.groupby(["dataset", "method"], sort=False)
    made = grouped.agg(mean=("miou", "mean"), spread=("miou", "std"), seeds=("miou", "size"), images=("images", "max"))
    return made.reset_index().rename(columns={"method": "variant"})


def paired(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Every variant minus the baseline, seed by seed: mean and spread of the difference, number of seeds where it is better, and p.

    p is that of the exact sign-flip test: the share of all 2^n choices of signs of the n differences whose mean is at least as
    far from zero as the one measured. It is at least 2 / 2^n: 0.25 with three seeds.
    """
    wide = frame.pivot(index=["dataset", "param.seed"], columns="method", values="miou")[list(dict.fromkeys(frame["method"]))]
    rows = []
    for variant in [name for name in wide.columns if name != baseline]:
        for dataset, difference in (wide[variant] - wide[baseline]).dropna().groupby("dataset", sort=False):
            flips = np.array(list(itertools.product((1, -1), repeat=len(difference)))) * difference.to_numpy()
            p = (abs(flips.mean(axis=1)) >= abs(difference.mean()) - 1e-9).mean()
            better = f"{int((difference > 0).sum())} of {len(difference)}"
            rows.append((dataset, variant, difference.mean(), difference.std(), better, p))
    return pd.DataFrame(rows, columns=["dataset", "variant", f"difference to {baseline}", "spread", "seeds better", "p"])


def encoder_runs(params: CompareRun, encoders: Sequence[str]) -> list[Run]:
    """One run an encoder, by its name, with the first seed."""
    first = params.model_copy(update={"seeds": params.seeds[:1]})
    return plan(first, "encoder", {name: {"encoder": name} for name in encoders})


def stages(samples: list[Sample], found: Sequence[Dataset], params: StagesRun) -> pd.DataFrame:
    """Stage 1.1, 1.2 and both, without and with image-level labels given, and FMbSeg trained on each.

    A row a method and benchmark, with mIoU, precision of the labelled pixels and coverage; records are written.
    The images to train on have image-level labels where ``image_level_names`` gives them.
    """
    made = []
    for method in [f"{name}{given}" for given in ("", evaluate.GIVEN) for name in evaluate.STAGES]:
        made += evaluate.measure([Method(method)], found, params)[0]
    plain = params.model_copy(update={"image_level_names": ""})
    for given, base in (("", plain), (evaluate.GIVEN, params)):
        if given and not params.image_level_names:
            continue
        for name, stage in evaluate.STAGES.items():
            staged = base.model_copy(update={"stages": stage})
            path = train.module_path(params, f"stages-{name}{given}")
            train.fit(samples, label.label(samples, staged)[0], staged, path)
            for record in evaluate.measure([Method("fmbseg", str(path))], found, staged)[0]:
                made.append(dataclasses.replace(record, method=f"fmbseg on {name}{given}"))
    return records.keep(made, params, "stages")


def stages_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The stage comparison side by side: index benchmark, pseudo labels and image-level labels; the measures of both uses.

    Empty cells could not be made: images without image-level names cannot train the variants that need them.
    """
    made = frame[["dataset", "method", *MEASURES]].copy()
    made["use"] = ["FMbSeg trained on them" if m.startswith("fmbseg on ") else "the pseudo labels" for m in made["method"]]
    base = made["method"].str.removeprefix("fmbseg on ")
    made["labels"] = base.str.removesuffix(evaluate.GIVEN).map({"stage1.1": "1.1", "stage1.2": "1.2", "stage1": "1.1 + 1.2"})
    made["image-level labels"] = ["given" if m.endswith(evaluate.GIVEN) else "detected" for m in base]
    wide = made.pivot(index=["dataset", "image-level labels", "labels"], columns="use", values=MEASURES)
    uses = ["the pseudo labels", "FMbSeg trained on them"]
    return wide.reorder_levels([1, 0], axis=1)[[(use, measure) for use in uses for measure in MEASURES]]


def fine_tune(found: Sequence[Dataset], params: FineTuneRun) -> pd.DataFrame:
    """The profile's module before and after further training on pseudo labels of the target's own images, without any label."""
    if not (params.target_collection and params.target_vocabulary):
        raise ParameterError("target_collection and target_vocabulary: not given; name unlabelled images of the target and its classes")
    before, after = train.module_path(params), train.module_path(params, "fine_tuned")
    changed = {
        "collection": params.target_collection,
        "vocabulary": params.target_vocabulary,
        "limit": params.target_limit,
        "epochs": params.fine_tune_epochs,
        "learning_rate": params.fine_tune_rate,
    }
    tuned = params.model_copy(update=changed)
    samples = label.collection(tuned)
    train.fit(samples, label.label(samples, tuned)[0], tuned, after, before)
    measured = evaluate.measure([Method("fmbseg", str(path)) for path in (before, after)], found, params)
    made = [dataclasses.replace(record, method=name) for name, of_one in zip(("before", "after"), measured) for record in of_one]
    return records.keep(made, params, "fine_tune")
