"""Labelling a large collection on a cluster with Ray Data (Stage 1). Needs the optional extra: pip install "fmbseg[ray]".

Ray joins the cluster that RAY_ADDRESS names, or starts workers on this machine. Every machine must see the images, the
label folder and FMBSEG_HOME under the same paths. Files are those of the serial run.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fmbseg import files
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.data.samples import Sample
from fmbseg.errors import ParameterError
from fmbseg.params import LabelParams
from fmbseg.runs import cache, parallel
from fmbseg.stage1 import pseudo_labels
from fmbseg.stage1.pseudo_labels import LabelStore

PICTURES_A_TASK = 16


class Labeller:
    """One worker: loads the models once, then labels image after image."""

    def __init__(self, home: str, here: str, folder: str, space: LabelSpace, params: LabelParams, device: str):
        os.environ["FMBSEG_HOME"] = home
        if Path(here).is_dir():  # where relative paths of images start
            os.chdir(here)
        torch.set_num_threads(1)
        self.folder, self.space, self.params, self.device = Path(folder), space, params, device
        cache.clip_of(params, device), cache.sam_of(params, device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """row: a sample's name and image. Returns the image and the reason of its failure, "" where there is none."""
        sample = Sample(row["name"], Path(row["image"]))
        try:
            pseudo_labels.label_one(sample, self.folder, self.space, self.params, self.device)
        except parallel.EXPECTED as error:
            return {"image": row["image"], "reason": parallel.reason(error)}
        return {"image": row["image"], "reason": ""}


def require() -> ModuleType:
    """Ray. Raises ParameterError where it is not installed."""
    try:
        import ray
    except ImportError:
        raise ParameterError('engine ray: Ray is not installed; run: pip install -c constraints.txt "fmbseg[ray]"') from None
    return ray


def label_collection(
    samples: list[Sample], folder: str | Path, space: LabelSpace, params: LabelParams, device: str, workers: int, gpus: float
) -> tuple[LabelStore, list[parallel.Failure]]:
    """As ``pseudo_labels.label_collection``, by ``workers`` Ray workers of one CPU and ``gpus`` GPUs each (a half: two share one).

    Raises ParameterError where Ray is not installed or the cluster has not so many CPUs or GPUs.
    """
    ray = require()
    store = LabelStore(folder, space, params)
    rows = [{"name": s.name, "image": str(s.image)} for s in samples]
    if not rows:
        return store, []
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use to its makers
        ray.init()
    try:
        _check(ray.cluster_resources(), workers, gpus)
        paths = {"home": files.home(), "here": Path.cwd(), "folder": store.folder.absolute()}
        given = {name: str(path) for name, path in paths.items()} | {"space": space, "params": params, "device": device}
        blocks = max(-(-len(rows) // PICTURES_A_TASK), min(workers, len(rows)))
        data = ray.data.from_items(rows, override_num_blocks=blocks)
        work = ray.data.ActorPoolStrategy(size=workers)
        done = data.map(Labeller, fn_constructor_kwargs=given, compute=work, num_cpus=1, num_gpus=gpus).take_all()
    finally:
        if started:
            ray.shutdown()
    failures = [parallel.Failure(row["image"], row["reason"]) for row in done if row["reason"]]
    return store, sorted(failures, key=lambda failure: failure.item)


def _check(here: dict[str, float], workers: int, gpus: float) -> None:
    for what, wanted in (("CPU", workers), ("GPU", workers * gpus)):
        if wanted > here.get(what, 0):
            raise ParameterError(
                f"workers = {workers}: the Ray cluster has {here.get(what, 0):g} {what}s and they want {wanted:g};"
                " give fewer workers or less of --gpus-per-worker"
            )
