"""Evaluation in shards: what they count adds up to exactly the unsharded result, on machines that share nothing."""

import dataclasses
import shutil

import numpy as np
import pytest
from conftest import ROOT

from fmbseg import cli, files
from fmbseg.data import benchmarks, collections, images, label_spaces
from fmbseg.errors import DataError, ParameterError
from fmbseg.params import EvaluateParams
from fmbseg.runs import evaluate, parallel, records, shards
from fmbseg.stage2.metrics import Confusion

METHOD = "dense_high_resolution"


def shifted_truth(method, columns, *_):
    """A prediction that costs nothing: the truth, moved by as much as a pixel of the image says."""
    shift = int(images.read_image(columns[0][0].image)[0, 0, 0])
    return [np.roll(sample.truth(), shift, axis=1) for sample, _ in columns]


@pytest.fixture
def two(own_home, monkeypatch):
    """Two benchmarks that share images; one image cannot be read."""
    monkeypatch.setattr(evaluate, "predict", shifted_truth)
    drawn = benchmarks.load_benchmark("drawn")
    broken = own_home / "broken.png"
    broken.write_bytes(b"no image")
    bad = collections.Sample("broken", broken, drawn.samples[0].truth)
    words = label_spaces.own_words(["tree", "sea", "moon", "barn"], "other")
    return [
        collections.Dataset("drawn", drawn.space, (*drawn.samples, bad), "seven"),
        collections.Dataset("other", words, drawn.samples[:4], ""),
    ]


def parts_of(found, smoke, count, **values):
    """The shards, each counted with a home of its own: nothing is shared."""
    made = []
    for shard in range(count):
        shutil.rmtree(files.home() / "cache", ignore_errors=True)
        made += evaluate.evaluate_parts(METHOD, [""], found, smoke(EvaluateParams, **values), shard=shard, num_shards=count)[0]
    return made


def same(record):
    """All of a record but the time it took."""
    return dataclasses.replace(record, seconds=0.0)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_shards_add_up_to_exactly_the_whole(count, two, smoke, tmp_path):
    whole = evaluate.evaluate_parts(METHOD, [""], two, smoke(EvaluateParams))[0]
    parts = parts_of(two, smoke, count)
    assert len(parts) == 2 * count
    for part in reversed(parts):
        part.write(tmp_path / "machine" / str(part.shard))
    read = shards.read_folders([tmp_path / "machine"])
    made = {record.dataset: record for record in shards.merge(read)}
    for part in whole:
        assert same(made[part.record.dataset]) == same(part.record)
        counted = sum((p.confusion.counts for p in read if p.record.dataset == part.record.dataset), np.zeros(1, np.int64))
        np.testing.assert_array_equal(counted, part.confusion.counts)
    assert (made["drawn"].images, made["drawn"].failed) == (6, 1) and (made["other"].images, made["other"].failed) == (4, 0)


def test_an_unsharded_run_on_a_shared_home_counts_nothing_again(two, smoke, monkeypatch):
    params = smoke(EvaluateParams)
    for shard in (0, 1):
        evaluate.evaluate_parts(METHOD, [""], two[1:], params, shard=shard, num_shards=2)
    monkeypatch.setattr(evaluate, "predict", lambda *_: pytest.fail("predicted again"))
    assert evaluate.evaluate(METHOD, two[1:], params)[0].images == 4


def test_a_shard_with_no_picture_counts_nothing(two, smoke):
    part = parts_of(two[1:], smoke, 5)[-1]
    assert part.record.images == 0 and part.record.miou is None and part.confusion.counts.sum() == 0
    assert part.noted.notes[-1] == "shard 4 of 5 alone"


def refusal(parts):
    with pytest.raises(DataError) as caught:
        shards.merge(parts)
    assert "\n" not in str(caught.value) and f"{METHOD} on drawn: " in str(caught.value)
    return str(caught.value)


def test_what_does_not_belong_together_is_refused(two, smoke):
    a, b, c = parts_of(two[:1], smoke, 3)
    assert "of 3 shards these are missing: 1; run: fmbseg evaluate --shard 1" in refusal([a, c])
    assert shards.merge([a, b, b, c])[0].images == 6  # the same shard twice is one
    other = dataclasses.replace(b, confusion=Confusion(4, b.confusion.counts + 1))
    assert "shard 1 is there twice with different counts" in refusal([a, b, other, c])
    for changed in (
        parts_of(two[:1], smoke, 3, short_side=256)[1],
        parts_of(two[:1], smoke, 3, eval_limit=3)[1],
        parts_of(two[:1], smoke, 2)[1],
    ):
        assert "of different evaluations" in refusal([a, changed, c])
    lost = dataclasses.replace(b, record=dataclasses.replace(b.record, images=b.record.images - 1))
    assert "the shards hold 6 images, and the evaluation 7" in refusal([a, lost, c])


def test_versions_that_differ_are_noted(two, smoke):
    a, b = parts_of(two[1:], smoke, 2)
    b = dataclasses.replace(b, record=dataclasses.replace(b.record, versions={"torch": "0"}, hardware="abacus"))
    (made,) = shards.merge([a, b])
    assert made.notes[-1] == "the shards ran with different versions" and made.hardware == f"{a.record.hardware}; abacus"


def test_a_file_that_is_no_shard_is_refused(tmp_path):
    import torch

    with pytest.raises(DataError, match="no shard there; run: fmbseg evaluate --shard 0"):
        shards.read_folders([tmp_path])
    files.write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    with pytest.raises(DataError, match="not a shard of an evaluation"):
        shards.read_folders([tmp_path])


@pytest.mark.parametrize("shard, count", [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_that_is_none_is_refused(shard, count):
    with pytest.raises(ParameterError, match=f"shard = {shard}, num_shards = {count}: shards are numbered 0 to"):
        parallel.shard([1, 2, 3], shard, count)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_taken_one_by_one_and_not_kept(workers):
    taken = []
    done = parallel.each(abs, [-3, 1, -2], "test", workers, take=lambda item, result: taken.append((item, result)))
    assert sorted(taken) == [(-3, 3), (-2, 2), (1, 1)] and done.results == [] and done.failures == []


def test_nonzero_counts_are_the_matrix():
    counts = np.random.RandomState(0).randint(0, 3, (4, 5))
    matrix = Confusion(4)
    for _ in range(2):
        matrix.add_nonzero(Confusion(4, counts.astype(np.int64)).nonzero())
    np.testing.assert_array_equal(matrix.counts, 2 * counts)


def test_the_command_counts_shards_and_merges_them(own_home, tmp_path, monkeypatch, capsys):
    project = tmp_path / "project"
    project.mkdir()
    for name in ("params", "notebooks"):
        (project / name).symlink_to(ROOT / name)
    monkeypatch.chdir(project)
    common = ["evaluate", "--profile", "smoke", "--methods", METHOD]
    for shard in ("0", "1"):
        monkeypatch.setenv("FMBSEG_HOME", str(tmp_path / shard))
        assert cli.main([*common, "--shard", shard, "--num-shards", "2", "--set", f"results_dir=machine{shard}"]) == 0
        out = capsys.readouterr().out
        assert f"shard {shard} of 2 alone" in out and "add all up with: fmbseg evaluate --merge" in out
    assert not list(project.glob("machine*/smoke/records/*"))
    assert cli.main([*common, "--merge", "machine0"]) == 2 and "these are missing: 1" in capsys.readouterr().err
    assert cli.main([*common, "--merge", "machine0", "machine1"]) == 0
    merged = records.load(project / "results")
    assert cli.main([*common, "--set", "results_dir=whole"]) == 0
    whole = records.load(project / "whole")
    columns = [c for c in whole if c not in ("file", "seconds")]
    assert merged[columns].equals(whole[columns]) and merged["images"].tolist() == [6]
