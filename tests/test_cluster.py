"""Labelling and evaluating with Ray: the same files as the serial run, failures told."""

import importlib.util
import sys
from pathlib import Path

import pytest

from fmbseg import cli
from fmbseg.data import collections
from fmbseg.data.samples import Sample
from fmbseg.errors import ParameterError
from fmbseg.runs import cluster, evaluate, label
from fmbseg.runs.evaluate import Method
from fmbseg.schemas import EvaluateRun, LabelRun

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='Ray is not installed: pip install -e ".[ray]"')


@pytest.fixture
def samples(own_home, tmp_path, monkeypatch):
    """Three drawn images and a broken one, which is given by a relative path."""
    drawn = [Sample(s.name, s.image) for s in collections.load_collection("drawn")[:3]]
    (tmp_path / "broken.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    return [drawn[0], Sample("broken", Path("broken.png")), *drawn[1:]]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def start(ray, attempts=3):
    """A local Ray of three CPUs. It gives itself 30 seconds to start, which a busy machine may exceed: then once more."""
    for left in reversed(range(attempts)):
        try:
            return ray.init(num_cpus=3, object_store_memory=100_000_000, log_to_driver=False)
        except Exception:  # a plain one is what Ray raises
            ray.shutdown()
            if not left:
                raise


@needs_ray
def test_two_ray_workers_make_the_same_files_as_one_process(samples, smoke, tmp_path, monkeypatch):
    import ray

    params = smoke(LabelRun, profile="smoke", vocabulary="voc20", workers=2, reference_images=0)
    _, serial = label.label(samples, params.model_copy(update={"workers": 1}), tmp_path / "serial")
    found, measured = evaluate.find_benchmarks(["drawn"]), smoke(EvaluateRun, profile="smoke", eval_limit=2)
    whole = evaluate.measure([Method("dense_high_resolution")], found, measured)[0][0]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # or it writes a token into the home folder
    monkeypatch.setenv("FMBSEG_HOME", str(tmp_path / "other"))
    start(ray)
    try:
        store, failures = label.label(samples, params, tmp_path / "ray", "ray")
        with pytest.raises(ParameterError, match="the Ray cluster has 3 CPUs and they want 4; give fewer workers"):
            label.label(samples, params.model_copy(update={"workers": 4}), tmp_path / "ray", "ray")
        monkeypatch.setattr(evaluate.parallel, "each", _no_prediction(evaluate.parallel.each, monkeypatch))
        counted = evaluate.measure([Method("dense_high_resolution")], found, measured.model_copy(update={"workers": 2}), engine="ray")[0][0]
        assert ray.is_initialized()  # only what it started itself is shut down
    finally:
        ray.shutdown()
    made = contents(tmp_path / "ray")
    assert made == contents(tmp_path / "serial") and set(made) >= {"labels.json", "drawn_2.png", "drawn_2.json", "failed/broken.json"}
    assert failures == serial and len(failures) == 1 and "broken.png: cannot be read" in failures[0].reason
    kept = {path.name.split("-")[0] for path in (tmp_path / "other/cache/queries").iterdir()}
    assert kept == {sample.name for sample in samples} - {"broken"}  # the workers keep what they make where the driver does
    assert (counted.iou, counted.images) == (whole.iou, 2)


def _no_prediction(each, monkeypatch):
    """``each``, in which nothing may be predicted: the workers of the cluster have counted it all."""

    def reading(*given):
        monkeypatch.setattr(evaluate, "predict_on_device", lambda *_: pytest.fail("predicted again"))
        return each(*given)

    return reading


@pytest.mark.parametrize(("workers", "gpus", "fits"), [(2, 0, True), (5, 0, False), (2, 0.5, True), (2, 1, False)])
def test_more_workers_than_the_cluster_holds_are_refused(workers, gpus, fits):
    here = {"CPU": 4.0, "GPU": 1.0}
    if fits:
        cluster._check(here, workers, gpus)
    else:
        with pytest.raises(ParameterError, match="give fewer workers or less of --gpus-per-worker"):
            cluster._check(here, workers, gpus)


def test_without_ray_the_command_says_what_to_install(own_home, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    status = cli.main(["label", "--profile", "smoke", "--engine", "ray", "--out", str(tmp_path / "labels")])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and 'Ray is not installed; run: pip install -c constraints.txt "fmbseg[ray]"' in error
