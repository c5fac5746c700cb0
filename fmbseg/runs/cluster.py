"""Work on a cluster, image by image, with Ray Data. Needs the optional extra: pip install "fmbseg[ray]".

Ray joins the cluster that RAY_ADDRESS names, or starts workers on this machine. Every machine must see the images, the
results and FMBSEG_HOME under the same paths. The files are the same as those of a run on one machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fmbseg import files
from fmbseg.errors import ParameterError
from fmbseg.runs import parallel
from fmbseg.runs.parallel import Failure

ITEMS_A_TASK = 16


class Worker:
    """One worker. It keeps the models that its first item loads."""

    def __init__(self, function: Callable[[Any], Any], home: str, here: str):
        os.environ["FMBSEG_HOME"] = home
        if Path(here).is_dir():  # where relative paths of images start
            os.chdir(here)
        torch.set_num_threads(1)
        self.function = function

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Work on the item of a row. Returns its name and the reason of its failure, "" where it did not fail."""
        outcome = parallel.guarded(self.function, row["item"])
        return {"item": str(row["item"]), "reason": outcome.reason if isinstance(outcome, Failure) else ""}


def require() -> ModuleType:
    """Ray. Raises ParameterError where it is not installed."""
    try:
        import ray
    except ImportError:
        raise ParameterError('engine ray: Ray is not installed; run: pip install -c constraints.txt "fmbseg[ray]"') from None
    return ray


def each(function: Callable[[Any], Any], items: Sequence[Any], workers: int, gpus: float) -> list[Failure]:
    """``function`` on every item, by ``workers`` Ray workers of one CPU and ``gpus`` GPUs each (0.5: two workers share one).

    What the function returns is dropped: it keeps its result on disk. Returns the failures.
    Raises ParameterError where Ray is not installed or the cluster has too few CPUs or GPUs.
    """
    ray = require()
    if not items:
        return []
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use to its makers
        ray.init()
    try:
        _check(ray.cluster_resources(), workers, gpus)
        blocks = max(-(-len(items) // ITEMS_A_TASK), min(workers, len(items)))
        data = ray.data.from_items([{"item": item} for item in items], override_num_blocks=blocks)
        given = {"function": function, "home": str(files.home()), "here": str(Path.cwd())}
        work = ray.data.ActorPoolStrategy(size=workers)
        done = data.map(Worker, fn_constructor_kwargs=given, compute=work, num_cpus=1, num_gpus=gpus).take_all()
    finally:
        if started:
            ray.shutdown()
    failures = sorted((Failure(row["item"], row["reason"]) for row in done if row["reason"]), key=lambda failure: failure.item)
    for failure in failures:
        parallel.leave_out(failure)
    return failures


def _check(here: dict[str, float], workers: int, gpus: float) -> None:
    for what, wanted in (("CPU", workers), ("GPU", workers * gpus)):
        if wanted > here.get(what, 0):
            raise ParameterError(
                f"workers = {workers}: the Ray cluster has {here.get(what, 0):g} {what}s and they want {wanted:g};"
                " give fewer workers or less of --gpus-per-worker"
            )
