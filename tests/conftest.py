"""Fixtures: the embedded weights and images, fetched by ``make test`` (or ``fmbseg fetch``) before."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import fmbseg.models  # noqa: F401  before any test imports torchvision, open_clip or timm
from fmbseg.data import benchmarks, fetch, images
from fmbseg.params import LabelParams, make

EMBEDDED = {
    "clip": "lit-efficientnet-lite2-minilm",
    "sam": "mobile_sam",
    "crop_size": 256,
    "crop_stride": 128,
    "crop_input": 256,
    "points_per_side": 3,
    "points_per_batch": 2,
    "vocabulary": "voc21",
}


ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    config.addinivalue_line("markers", "minutes: takes a minute or more; leave it out with -m 'not minutes'")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def gone(workers):
    """Wait until these processes have ended; fail where one has not after 20 seconds."""
    end = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # one that ended and was not yet waited for does not count
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return True


@pytest.fixture(scope="session")
def sample():
    """A real image with panoptic truth."""
    fetch.require("coco_panoptic_20")
    return benchmarks.load_benchmark("embedded_coco_object81").samples[0]


@pytest.fixture(scope="session")
def real_image(sample):
    return images.read_image(sample.image)


@pytest.fixture(scope="session")
def data_root():
    """Official data sets, or a part of them: $FMBSEG_DATA_ROOT, data/ of the project, or shared/data beside it; else skips."""
    for folder in (os.environ.get("FMBSEG_DATA_ROOT"), ROOT / "data", ROOT.parent / "shared" / "data"):
        if folder and Path(folder).is_dir():
            return str(folder)
    pytest.skip("no official data set is here; set FMBSEG_DATA_ROOT to their folder")


@pytest.fixture(scope="session")
def label_params():
    return make(LabelParams, EMBEDDED)


@pytest.fixture(scope="session")
def smoke():
    """Parameters of a schema as params/smoke has them: smoke(schema, name=value, ...)."""
    shared = yaml.safe_load((ROOT / "params" / "smoke" / "shared.yaml").read_text())
    return lambda schema, **values: make(schema, {k: v for k, v in (shared | values).items() if k in schema.model_fields})


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    """An empty FMBSEG_HOME of the test's own."""
    monkeypatch.setenv("FMBSEG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def own_home_with_weights(tmp_path, monkeypatch):
    """The same, with the fetched weights and images in it."""
    fetched, pools, own_home = fetch.require("mobile_sam").parent, fetch.require("coco_panoptic_20").parent, tmp_path / "home"
    own_home.mkdir()
    monkeypatch.setenv("FMBSEG_HOME", str(own_home))
    (own_home / "weights").symlink_to(fetched)
    (own_home / "images").symlink_to(pools)
    return own_home


@pytest.fixture(scope="session")
def toy(smoke, tmp_path_factory):
    """A module trained on the truth of the drawn images until it fits: its home, data set, labels, parameters and file."""
    from fmbseg.data.images import IGNORED
    from fmbseg.runs import train
    from fmbseg.runs.label import LabelStore
    from fmbseg.schemas import TrainRun
    from fmbseg.stage1.pseudo_labels import PseudoLabel

    home = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMBSEG_HOME", str(home))
        drawn = benchmarks.load_benchmark("drawn")
        params = smoke(TrainRun, profile="smoke", epochs=40, learning_rate=0.05, temperature=0.1, reference_images=0)
        store = LabelStore(home / "labels", drawn.space, params)
        for sample in drawn.samples:
            labels = sample.truth()
            labels[:10] = IGNORED
            store.write(sample, PseudoLabel(labels, [], [], []))
        path = home / "module.safetensors"
        result = train.fit(list(drawn.samples), store, params, path)
    return SimpleNamespace(home=home, drawn=drawn, samples=list(drawn.samples), store=store, params=params, path=path, result=result)
