"""The way of the paper profile (a GPU, nothing kept, bf16), on random weights of tiny width, with every line on a CPU."""

import time

import pytest
import torch
from torch.utils.data import DataLoader

from fmbseg import files, profiles
from fmbseg.errors import ParameterError
from fmbseg.params import make
from fmbseg.runs import cache, evaluate, label, modules, parallel, train
from fmbseg.runs.cache import Models
from fmbseg.schemas import EvaluateRun, TrainRun
from fmbseg.stage2 import training

TINY = {"device": "cpu", "clip": "random:ViT-S-32", "sam": "random:tiny_sam", "encoder": "random:efficientnet_lite2", "collection": "drawn"}
TINY |= {"vocabulary": "voc21", "short_side": 224, "crop_stride": 96, "min_votes": 0, "points_per_side": 2, "predicted_iou": 0.0}
TINY |= {"stability": 0.0, "image_size": 128, "segment_short_side": 128, "window": 128, "window_stride": 64, "epochs": 2, "heads": 8}


def products(home):
    """Names of the folders of the cache in which any file lies."""
    return {path.relative_to(home / "cache").parts[0] for path in (home / "cache").rglob("*") if path.is_file()}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(parallel, "on_gpu", lambda device: True)
    monkeypatch.setattr(parallel, "_pool", lambda workers: pytest.fail("a process of its own would load every model again"))


def test_the_paper_profile_streams_and_keeps_nothing_but_labels(as_on_a_gpu, own_home, tmp_path, monkeypatch):
    given = {"results_dir": str(tmp_path / "results"), "workers": 2, "benchmarks": ["drawn"]} | TINY
    p = profiles.load("train", "paper", {k: v for k, v in given.items() if k in TrainRun.model_fields})
    assert not p.keep_features and p.precision == "bf16" and p.stages == "both"
    samples, seen, loaders = label.collection(p), [], []
    sam = Models.of(p).sam.model.image_encoder
    hook = sam.register_forward_hook(lambda *_: seen.append(1))
    store, failures = label.label(samples, p)
    hook.remove()
    assert not failures and len(seen) == len(samples)  # SAM's encoder sees an image once for both stages
    monkeypatch.setattr(training, "DataLoader", lambda *a, **k: loaders.append(k["num_workers"]) or DataLoader(*a, **k))
    result = train.train(samples, store, p, tmp_path / "module.safetensors")
    assert loaders == [2] and len(result.steps) == 2 * 2
    q = profiles.load("evaluate", "paper", {k: v for k, v in given.items() if k in EvaluateRun.model_fields})
    frame = evaluate.evaluate(evaluate.find_benchmarks(q.benchmarks), q, tmp_path / "module.safetensors")
    assert set(frame["method"]) == set(q.methods) and (frame["images"] == 6).all() and not frame["failed"].any()
    assert products(own_home) == {"counts"}


def test_what_is_made_when_needed_is_what_would_be_kept(smoke, own_home, tmp_path, monkeypatch):
    kept = smoke(TrainRun, **TINY, prealign=True, profile="smoke")
    made = kept.model_copy(update={"keep_features": False})
    samples, found = label.collection(kept), {}
    for name, p in (("made", made), ("kept", kept)):
        store, _ = label.label(samples, p, tmp_path / name)
        modules.place("smoke", "x").parent.mkdir(parents=True, exist_ok=True)
        train.prealigned_path(p).unlink(missing_ok=True)
        before = modules.load(train.prealign(p))[0].state_dict()
        found[name] = [store.read(s) for s in samples], before, train.fit(samples, store, p, tmp_path / f"{name}.safetensors")
        assert products(own_home) == ({"votes"} if name == "made" else {"votes", "clip", "queries", "masks", "encoder"})
    assert all((one == other).all() for one, other in zip(found["made"][0], found["kept"][0], strict=True))
    for one, other in zip(found["made"][1].values(), found["kept"][1].values()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    one, other = (found[name][2].steps for name in ("made", "kept"))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in other], rel=1e-4)  # batches through the encoder


def test_the_encoder_takes_a_batch_in_parts(smoke, own_home, monkeypatch):
    p = smoke(TrainRun, **TINY, keep_features=False, images_per_pass=2)
    samples, sizes = label.collection(p), []
    store, _ = label.label(samples, p)
    data = train.PatchDataset(samples, store, p)
    batch = torch.stack([data[i][0] for i in range(3)])
    encode = cache.encode
    monkeypatch.setattr(cache, "encode", lambda pixels, models: sizes.append(len(pixels)) or encode(pixels, models))
    found = data.encode(batch)
    assert sizes == [2, 1] and p.content(TrainRun) == p.model_copy(update={"images_per_pass": None}).content(TrainRun)
    torch.testing.assert_close(found, torch.stack([data.patches(i).float() for i in range(3)]), rtol=1e-2, atol=1e-2)


def test_workers_that_read_ahead_change_no_byte(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("FMBSEG_HOME", str(toy.home))
    params = toy.params.model_copy(update={"epochs": 3, "module": "linear", "images_per_batch": 2, "workers": 2})
    alone = train.fit(toy.samples, toy.store, params, tmp_path / "alone.safetensors")
    monkeypatch.setattr(parallel, "on_gpu", lambda device: True)
    ahead = train.fit(toy.samples, toy.store, params, tmp_path / "ahead.safetensors")
    assert ahead.steps == alone.steps and len(alone.steps) == 9
    assert files.file_sha256(tmp_path / "alone.safetensors") == files.file_sha256(tmp_path / "ahead.safetensors")


def test_an_item_is_read_before_its_turn_and_fails_at_it(as_on_a_gpu):
    order = []

    def read(i):
        order.append(("read", i))
        if i == 2:
            raise OSError("gone")

    def work(i):
        end = time.monotonic() + 10
        while ("read", min(i + 3, 6)) not in order:  # read by other threads, meanwhile
            assert time.monotonic() < end
            time.sleep(0.001)
        order.append(("work", i))
        if i == 2:
            raise OSError("gone")
        return 10 * i

    done = parallel.each(work, range(7), "test", workers=3, read=read)
    assert done.results == [(i, 10 * i) for i in (0, 1, 3, 4, 5, 6)] and [f.item for f in done.failures] == ["2"]
    assert [i for what, i in order if what == "work"] == list(range(7)) and order.index(("work", 0)) < order.index(("read", 4))


def test_the_anchor_wants_kept_features(smoke):
    with pytest.raises(ParameterError, match="dense_weight.*keep_features=true"):
        train.PatchDataset([], None, make(TrainRun, {"dense_weight": 1.0, "keep_features": False}))


def test_an_image_in_memory_is_read_again_when_its_file_changes(tmp_path):
    from fmbseg.data import benchmarks

    first, second = (s.image.read_bytes() for s in benchmarks.load_benchmark("drawn").samples[:2])
    (tmp_path / "a.png").write_bytes(first)
    one = cache.image(tmp_path / "a.png")
    assert cache.image(tmp_path / "a.png") is one
    (tmp_path / "a.png").write_bytes(second)
    assert cache.image(tmp_path / "a.png").shape != one.shape
