"""One loop over many images: progress, several processes, shards, and failures that do not stop the rest.

Under torchrun (``group``) each process labels and encodes its own share of the images, then all train together.
"""

from __future__ import annotations

import datetime
import os
import signal
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from joblib.externals.loky import get_reusable_executor, process_executor
from tqdm import tqdm

from fmbseg import files
from fmbseg.errors import DataError, FmbsegError, ImageError, ParameterError, WorkerLost
from fmbseg.stage2.distributed import rank, size

T = TypeVar("T")

EXPECTED = (ImageError, DataError, OSError, MemoryError, torch.OutOfMemoryError, struct.error, zlib.error, EOFError)
"""Exceptions that an item can cause by its bytes or its size: the item is left out and the others go on.

Our other errors (a parameter, weights, a full disk) would come again at every item, so they end the run. Anything else is a
bug: it ends the run and names the item.
"""

AHEAD = 4
"""How many images are read ahead of a GPU at most."""

IDLE_SECONDS = 300
"""How long worker processes and the models that they hold wait for more work."""

PATIENCE = datetime.timedelta(days=7)
"""How long a process of torchrun waits for the others' labelling; torchrun ends all when one fails."""


@dataclass(frozen=True)
class Failure:
    """An item whose work failed, and why, in one sentence."""

    item: str
    reason: str

    @property
    def why(self) -> str:
        """The reason without the item's name at its beginning."""
        return self.reason.removeprefix(f"{self.item}: ")


@dataclass(frozen=True)
class Done:
    """results: (item, what the function returned) in the order of the items; failures: the items that failed."""

    results: list[tuple[Any, Any]]
    failures: list[Failure]


def shard(items: Sequence[T], index: int, count: int) -> list[T]:
    """Every ``count``-th item from ``index``: the shards 0 to count - 1 together hold each item once.

    Raises ParameterError for another index.
    """
    if not 0 <= index < count:
        raise ParameterError(f"shard = {index}, num_shards = {count}: shards are numbered 0 to {max(count - 1, 0)}")
    return list(items[index::count])


def evenly_spaced(items: Sequence[T], limit: int | None) -> list[T]:
    """``limit`` items evenly spaced over all of them, in order; all of them when there are no more."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def progress(total: int | None, title: str, unit: str = "image", done: int = 0) -> tqdm:
    """A progress bar from ``done``, where there is anything to do; under torchrun only the first process shows one.

    tqdm's bar for notebooks freezes under papermill.
    """
    return tqdm(total=total, initial=done, desc=title, unit=unit, mininterval=2.0, disable=rank() > 0 or total == 0)


def progress_over(items: Sequence[T], title: str) -> Iterator[T]:
    """The items one after the other, under a progress bar."""
    with progress(len(items), title) as bar:
        for item in items:
            yield item
            bar.update()


_watched: list[dict[str, Failure]] = []


@contextmanager
def watch() -> Iterator[dict[str, Failure]]:
    """The items that any loop leaves out within the context: item -> its first failure."""
    _watched.append({})
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


def leave_out(failure: Failure) -> None:
    """Print that an item is left out, and why."""
    tqdm.write(f"left out {failure.item}: {failure.why}")
    for found in _watched:
        found.setdefault(failure.item, failure)


_TAKEN = object()


def on_gpu(device: str) -> bool:
    """Whether models run on a GPU. Then ``workers`` read ahead of one process, since several would each load all models."""
    return device != "cpu"


def whole(function: Callable[[T], Any], items: Iterable[T]) -> Iterator[Any]:
    """``function`` of one item after the other; an item that fails is left out with a message."""
    for item in items:
        if isinstance(outcome := guarded(function, item), Failure):
            leave_out(outcome)
        else:
            yield outcome


def _read_ahead(read: Callable[[T], Any], items: Sequence[T], threads: int) -> Iterator[T]:
    """The items in order, each after another thread has called ``read`` on it. Errors of ``read`` are left to the item's own turn."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        for item in (*items, *[None] * threads):
            if item is not None:
                waiting.append((item, pool.submit(read, item)))
            if waiting and (item is None or len(waiting) > threads):
                due, future = waiting.popleft()
                future.exception()
                yield due


def each(
    function: Callable[[T], Any],
    items: Sequence[T],
    title: str,
    workers: int = 1,
    take: Callable[[T, Any], None] | None = None,
    read: Callable[[T], Any] | None = None,
    unit: str = "image",
) -> Done:
    """``function`` on every item. An item that raises an EXPECTED error is a failure; any other error ends the run.

    read: called on the next items by ``workers`` threads (AHEAD at most), such as to read their images, while ``function`` works
    on one item in this process; None: ``function`` runs in ``workers`` processes of one thread each (on a CPU two of one thread
    are faster than one of two). They stay for the next call, with the models that they loaded.
    take: called with every item and its result as it comes, in any order. Results are then not kept, so memory does not grow
    with the number of items.
    """
    outcomes: list[Any] = [None] * len(items)

    def settle(i: int, outcome: Any) -> None:
        if take is not None and not isinstance(outcome, Failure):
            take(items[i], outcome)
            outcome = _TAKEN
        outcomes[i] = outcome
        bar.update()

    with progress(len(items), title, unit) as bar:
        if read or workers == 1 or len(items) < 2:
            for i, item in enumerate(_read_ahead(read, items, min(workers, AHEAD)) if read else items):
                settle(i, guarded(function, item))
        else:
            try:
                pool = _pool(workers)
                futures = {pool.submit(guarded, function, item): i for i, item in enumerate(items)}
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
        leave_out(failure)
    return Done([(i, o) for i, o in zip(items, outcomes) if o is not _TAKEN and not isinstance(o, Failure)], failures)


def guarded(function: Callable[[T], Any], item: T) -> Any:
    """What the function returns, or a Failure where the item is at fault; another error is raised and names the item."""
    try:
        return function(item)
    except BaseException as error:
        if is_expected(error):
            return Failure(str(item), reason(error))
        if not isinstance(error, (FmbsegError, KeyboardInterrupt)):
            error.add_note(f"this happened at {item}")
        raise


def is_expected(error: BaseException) -> bool:
    """Whether an error is one item's own (``EXPECTED``; torch tells a CPU's want of memory as a RuntimeError)."""
    return isinstance(error, EXPECTED) or "can't allocate memory" in str(error)


def reason(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FmbsegError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _pool(workers: int):
    """The worker processes, started again where the working folder, the cache or the package's code has changed."""
    source = max(path.stat().st_mtime_ns for path in Path(__file__).parents[1].rglob("*.py"))
    where = (os.getcwd(), str(files.home()), source)
    return get_reusable_executor(workers, timeout=IDLE_SECONDS, initializer=_begin_worker, initargs=where)


def release() -> None:
    """End the worker processes and free their memory; unfinished work is dropped (files are written completely or not at all)."""
    get_reusable_executor(reuse=True, kill_workers=True).shutdown(wait=False, kill_workers=True)  # the one that is there


def _begin_worker(folder: str, home: str, source: int) -> None:
    """Set up a worker: one thread; it ignores interrupts, because the parent stops it; and it ends when the parent has ended."""
    os.chdir(folder)
    os.environ["FMBSEG_HOME"] = home
    torch.set_num_threads(1)
    process_executor._USE_PSUTIL = False  # or loky takes the models of a later item for a leak and ends the worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()


def _leave_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextmanager
def group(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did; yields the device of this one.

        torchrun --nproc-per-node 8 -m fmbseg.cli train --profile paper

    device: "cuda" (process i of a machine takes its GPU i, over NCCL) or "cpu" (over gloo). Every process must see the
    same FMBSEG_HOME. Raises ParameterError for another device, and where a machine has fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if device not in ("cpu", "cuda"):
        raise ParameterError(f"device = {device!r}: several processes train on cpu or on cuda, one GPU each; give device=cuda")
    if device == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ParameterError(f"process {local} of this machine has no GPU, for there are {gpus}; give torchrun --nproc-per-node {gpus}")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    dist.init_process_group("nccl" if device != "cpu" else "gloo", timeout=PATIENCE)
    try:
        yield device
        wait()
    finally:
        dist.destroy_process_group()


def wait() -> None:
    """Return when every process has called this."""
    if size() > 1:
        dist.barrier()


def split_by_rank(items: Sequence[T]) -> list[T]:
    """This process's items: every item belongs to one process."""
    return list(items[rank() :: size()])
