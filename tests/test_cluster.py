"""Labelling with Ray: the same files as the serial run, failures told, models loaded once a worker."""

import importlib.util
import sys
from pathlib import Path

import pytest

from fmbseg import cli, files
from fmbseg.data import collections, label_spaces
from fmbseg.data.samples import Sample
from fmbseg.errors import ParameterError
from fmbseg.models.clip import load_clip
from fmbseg.models.sam import load_sam
from fmbseg.params import LabelParams
from fmbseg.runs import cache, cluster
from fmbseg.stage1 import pseudo_labels

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='Ray is not installed: pip install -e ".[ray]"')


@pytest.fixture
def samples(own_home, tmp_path, monkeypatch):
    """Three drawn images and a broken one, which is given by a relative path."""
    drawn = [Sample(s.name, s.image) for s in collections.load_collection("drawn")[:3]]
    (tmp_path / "broken.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    return [drawn[0], Sample("broken", Path("broken.png")), *drawn[1:]]


def files(folder):
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

    space, params = label_spaces.label_space("voc20"), smoke(LabelParams)
    _, serial = pseudo_labels.label_collection(samples, tmp_path / "serial", space, params)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # or it writes a token into the home folder
    monkeypatch.setenv("FMBSEG_HOME", str(tmp_path / "other"))
    start(ray)
    try:
        store, failures = cluster.label_collection(samples, tmp_path / "ray", space, params, "cpu", 2, 0)
        with pytest.raises(ParameterError, match="the Ray cluster has 3 CPUs and they want 4; give fewer workers"):
            cluster.label_collection(samples, tmp_path / "ray", space, params, "cpu", 4, 0)
        assert ray.is_initialized()  # only what it started itself is shut down
    finally:
        ray.shutdown()
    made = files(tmp_path / "ray")
    assert made == files(tmp_path / "serial") and set(made) >= {"labels.json", "drawn_2.png", "drawn_2.json", "failed/broken.json"}
    assert failures == serial and len(failures) == 1 and "broken.png: cannot be read" in failures[0].reason
    kept = {path.name.split("-")[0] for path in (tmp_path / "other/cache/queries").iterdir()}
    assert kept == {sample.name for sample in samples} - {"broken"}  # the workers keep what they make where the driver does


def test_a_worker_loads_the_models_once(samples, smoke, tmp_path):
    space, params = label_spaces.label_space("voc20"), smoke(LabelParams)
    pseudo_labels.LabelStore(tmp_path / "labels", space, params)
    load_clip.cache_clear(), load_sam.cache_clear()
    worker = cluster.Labeller(str(files.home()), str(tmp_path), str(tmp_path / "labels"), space, params, "cpu")
    loaded = lambda: (load_clip.cache_info().misses, load_sam.cache_info().misses)  # noqa: E731
    assert loaded() == (1, 1)
    rows = [worker({"name": s.name, "image": str(s.image)}) for s in samples]
    assert loaded() == (1, 1) and [row["reason"] == "" for row in rows] == [True, False, True, True]
    assert cache.clip_of(params) is cache.clip_of(params)


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
