"""One loop over many images: progress, several processes, shards, and failures that stop nothing else."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from fmbseg.errors import FmbsegError, ParameterError, WorkerLost
from fmbseg.stage2 import distributed

T = TypeVar("T")

EXPECTED = (FmbsegError, MemoryError, torch.OutOfMemoryError)
"""Errors that are one item's and stop no other; any other error is a bug and stops the run."""


@dataclass(frozen=True)
class Failure:
    """An item whose work failed, and why, in one sentence."""

    item: str
    reason: str


def shard(items: Sequence[T], index: int, count: int) -> list[T]:
    """Every ``count``-th item from ``index``: the shards of 0..count-1 hold each item once.

    Raises ParameterError for an index that is none of them.
    """
    if not 0 <= index < count:
        raise ParameterError(f"shard = {index}, num_shards = {count}: shards are numbered 0 to {max(count - 1, 0)}")
    return list(items[index::count])


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """``limit`` items evenly spread over all of them, in order; all of them when there are no more."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def progress(total: int, title: str, unit: str = "image") -> tqdm:
    """A progress bar; of several processes (torchrun) the first alone shows one. Plain tqdm: the notebook kind freezes under papermill."""
    return tqdm(total=total, desc=title, unit=unit, mininterval=2.0, disable=distributed.rank() > 0)


@dataclass(frozen=True)
class Done:
    """results: (item, what the function returned) in the order of the items; failures: the others."""

    results: list[tuple[Any, Any]]
    failures: list[Failure]


_TAKEN = object()


def each(
    function: Callable[[T], Any], items: Sequence[T], title: str, workers: int = 1, take: Callable[[T, Any], None] | None = None
) -> Done:
    """``function`` on every item.

    take: is given every item with its result as it comes, in any order; then no result is kept, and memory does not
    grow with the items.

    With several workers, each is a process of one thread (two of one thread beat one of two on a CPU), so the
    function and its items must be importable and picklable.
    An item that raises an EXPECTED error (one of our own, or memory that ran out) is a failure; any other stops the run.
    """
    outcomes: list[Any] = [None] * len(items)

    def settle(i: int, outcome: Any) -> None:
        if take is not None and not isinstance(outcome, Failure):
            take(items[i], outcome)
            outcome = _TAKEN
        outcomes[i] = outcome
        bar.update()

    with progress(len(items), title) as bar:
        if workers == 1 or len(items) < 2:
            for i, item in enumerate(items):
                settle(i, _guarded(function, item))
        else:
            pool = _working_pool(workers)
            try:
                futures = {pool.submit(_guarded, function, item): i for i, item in enumerate(items)}
                for future in as_completed(futures):
                    settle(futures.pop(future), future.result())
            except BrokenProcessPool as error:
                release()
                raise WorkerLost(
                    "a worker process was ended from outside, most likely for want of memory;"
                    " run again with fewer workers (--set workers=1): what was computed is kept"
                ) from error
            except BaseException:  # also a stopped cell
                release()
                raise
    failures = [o for o in outcomes if isinstance(o, Failure)]
    for failure in failures:
        tqdm.write(f"left out {failure.item}: {failure.reason}")
    return Done([(i, o) for i, o in zip(items, outcomes) if o is not _TAKEN and not isinstance(o, Failure)], failures)


def _guarded(function: Callable[[T], Any], item: T) -> Any:
    try:
        return function(item)
    except EXPECTED as error:
        return Failure(str(item), reason(error))


def reason(error: BaseException) -> str:
    """An error as one line."""
    return " ".join(str(error).split()) or type(error).__name__


_kept: list[Any] = []
"""Surroundings and worker processes of the last call, kept for the next: they hold the imports and models they loaded."""


def _working_pool(workers: int) -> ProcessPoolExecutor:
    source = max(path.stat().st_mtime_ns for path in Path(__file__).parent.rglob("*.py"))  # edited since: begun anew
    surroundings = (workers, os.getcwd(), tuple(sorted(os.environ.items())), source)
    if _kept and _kept[0] == surroundings:
        try:
            _kept[1].submit(int).result()
            return _kept[1]
        except BrokenProcessPool:  # a worker was lost since the last call
            pass
    release()
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker)
    _kept[:] = [surroundings, pool]
    return pool


def release() -> None:
    """End the worker processes and free what they hold; work under way is dropped (files are written whole or not at all)."""
    if _kept:
        pool = _kept[1]
        _kept.clear()
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker() -> None:
    """One thread, no interrupt of its own (the parent stops it), and an end when the parent is gone, however it went."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
