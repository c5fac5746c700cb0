"""One loop over many items: worker processes that are kept, replaced when one is lost, and gone when their parent is."""

import os
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import alive, gone

from fmbseg import files
from fmbseg.errors import DataError, ParameterError, StorageError, WeightsError, WorkerLost
from fmbseg.runs import parallel


def process_of(item):
    time.sleep(0.1)
    return os.getpid(), str(files.home()), os.getcwd()


held = []


def growing(item):
    """A process that holds 330 MB more from its second item on, as with the models of another step."""
    held.append(np.ones(330_000_000 if len(held) == 1 else 1, dtype=np.uint8))
    time.sleep(1.1)
    return os.getpid()


def troubled(item):
    if item == "expected":
        raise DataError("this one only")
    if item == "bug":
        raise ZeroDivisionError("a bug")
    if item == "lost":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)
    return item


def leave_a_file(path):
    time.sleep(0.1)
    path.touch()


def workers_of(count=6):
    return {result for _, result in parallel.each(process_of, range(count), "test", 2).results}


@pytest.fixture(autouse=True)
def _fresh():
    parallel.release()
    yield
    parallel.release()


def test_workers_are_kept_for_the_next_call_and_not_for_other_surroundings(monkeypatch, tmp_path):
    first = workers_of()
    assert os.getpid() not in {pid for pid, *_ in first}
    again = workers_of()
    assert again & first and len(again | first) <= 2
    monkeypatch.setenv("FMBSEG_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    other = workers_of()
    assert {tuple(where) for _, *where in other} == {(str(tmp_path / "home"), str(tmp_path))}
    assert not {pid for pid, *_ in other} & {pid for pid, *_ in again | first}


def test_a_worker_that_grows_is_kept_with_its_models():
    pids = [pid for _, pid in parallel.each(growing, range(8), "test", 2).results]
    assert len(set(pids)) <= 2


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_taken_one_by_one_and_not_kept(workers):
    taken = []
    done = parallel.each(abs, [-3, 1, -2], "test", workers, take=lambda item, result: taken.append((item, result)))
    assert sorted(taken) == [(-3, 3), (-2, 2), (1, 1)] and done.results == [] and done.failures == []


def test_items_in_shards_and_evenly_spaced():
    assert [parallel.shard("abcde", i, 2) for i in (0, 1)] == [["a", "c", "e"], ["b", "d"]]
    for shard, count in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ParameterError, match=f"shard = {shard}, num_shards = {count}"):
            parallel.shard([1, 2, 3], shard, count)
    assert parallel.evenly_spaced(range(10), 4) == [0, 2, 5, 7] and parallel.evenly_spaced(range(3), 5) == [0, 1, 2]
    assert parallel.evenly_spaced(range(3), None) == [0, 1, 2] and parallel.evenly_spaced([], 2) == []


def test_a_failure_is_one_items_and_a_bug_stops_the_run_but_not_the_next():
    done = parallel.each(troubled, ["a", "expected", "b"], "test", 2)
    assert [r for _, r in done.results] == ["a", "b"] and [(f.item, f.reason) for f in done.failures] == [("expected", "this one only")]
    with pytest.raises(ZeroDivisionError, match="a bug"):
        parallel.each(troubled, ["bug", *"abcdef"], "test", 2)
    assert len(parallel.each(troubled, ["a", "b"], "test", 2).results) == 2


def test_a_lost_worker_is_told_and_the_next_call_has_new_ones():
    with pytest.raises(WorkerLost, match="for want of memory; run again with fewer workers"):
        parallel.each(troubled, ["lost", "a", "b"], "test", 2)
    assert len(parallel.each(troubled, ["a", "b"], "test", 2).results) == 2


def test_a_worker_lost_between_calls_is_replaced():
    lost = next(iter(workers_of()))[0]
    os.kill(lost, signal.SIGKILL)
    time.sleep(1)
    assert lost not in {pid for pid, *_ in workers_of()}


def test_an_interrupt_is_the_parents_alone():
    assert parallel.each(troubled, ["interrupted", "a"], "test", 2).failures == []


def test_a_stopped_run_begins_nothing_more(tmp_path):
    def stop(item, result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parallel.each(leave_a_file, [tmp_path / str(i) for i in range(40)], "test", 2, take=stop)
    time.sleep(1.5)
    assert 1 <= len(list(tmp_path.iterdir())) < 10


def test_released_workers_are_gone():
    workers = [pid for pid, *_ in workers_of()]
    parallel.release()
    gone(workers)
    parallel.release()  # nothing there: nothing to do


SCRIPT = """
import sys
from fmbseg.runs import parallel
import test_parallel
if __name__ == "__main__":
    print(*sorted({pid for _, (pid, *_) in parallel.each(test_parallel.process_of, range(6), "test", 2).results}), flush=True)
    sys.stdin.read()
"""


def test_workers_leave_when_their_parent_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, tmp_path / "script.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert workers and all(alive(pid) for pid in workers)
    parent.kill()
    parent.wait()
    gone(workers)


# ---------------------------------------------------------------- whose fault an error is


def raises(error):
    raise error


@pytest.mark.parametrize(
    "error",
    [DataError("x"), OSError(5, "Input/output error"), struct.error("x"), EOFError(), MemoryError(), torch.OutOfMemoryError("x"),
     zlib.error("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)  # fmt: skip
def test_an_error_that_bytes_or_size_can_cause_is_the_items(error):
    done = parallel.each(raises, [error], "test")
    assert len(done.failures) == 1 and parallel.reason(error) == done.failures[0].reason


@pytest.mark.parametrize("kind", [StorageError, ParameterError, WeightsError])
def test_what_would_come_again_at_every_item_ends_the_run(kind):
    """A full disk, a parameter that does not fit, weights that are missing: told once, not once an image."""
    with pytest.raises(kind) as caught:
        parallel.each(raises, [kind("x")], "test")
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bug_names_the_item_that_it_happened_at(workers):
    with pytest.raises(ZeroDivisionError) as caught:
        parallel.each(troubled, ["a", "bug"], "test", workers)
    assert caught.value.__notes__ == ["this happened at bug"]


def test_watching_counts_each_item_once_with_its_first_reason():
    with parallel.watch() as outer, parallel.watch() as found:
        for reason in ("expected: first", "second"):
            parallel.leave_out(parallel.Failure("expected", reason))
        parallel.each(troubled, ["a", "expected"], "test")
    parallel.leave_out(parallel.Failure("later", "unseen"))
    assert [(f.item, f.why) for f in found.values()] == [("expected", "first")] and outer == found
