"""The official layouts on real images, where some are here: see ``data_root`` in conftest.py."""

from pathlib import Path

import numpy as np
import pytest

from fmbseg.data import benchmarks, images
from fmbseg.data.images import IGNORED
from fmbseg.runs import parallel
from fmbseg.stage2.metrics import Confusion


@pytest.fixture(params=list(benchmarks.LAYOUTS))
def dataset(request, data_root):
    layout = benchmarks.LAYOUTS[request.param]
    if layout.missing(Path(data_root)):
        pytest.skip(f"{request.param} is not here")
    return benchmarks.load_benchmark(request.param, data_root)


def test_real_truth_has_the_size_of_its_image_and_ids_of_its_classes(dataset):
    assert len({s.name for s in dataset.samples}) == len(dataset.samples) <= benchmarks.LAYOUTS[dataset.name].images
    seen = set()
    for sample in parallel.evenly_spaced(dataset.samples, 40):
        truth = sample.truth()
        assert truth.shape == images.read_image(sample.image).shape[:2] and truth.dtype == np.int16
        seen |= set(np.unique(truth).tolist())
        counts = Confusion(len(dataset.space))
        counts.add(truth, truth)
        assert counts.miou() == pytest.approx(100) or (truth == IGNORED).all()
    assert seen <= {*range(len(dataset.space)), IGNORED} and len(seen) > 5


def test_with_and_without_background_are_the_same_images_and_things(data_root):
    for with_one, without in (("voc21", "voc20"), ("context60", "context59"), ("coco_object81", "coco_object80")):
        if benchmarks.LAYOUTS[with_one].missing(Path(data_root)):
            continue
        for a, b in zip(*(parallel.evenly_spaced(benchmarks.load_benchmark(n, data_root).samples, 10) for n in (with_one, without))):
            truth = a.truth().astype(int)
            assert a.image == b.image
            np.testing.assert_array_equal(b.truth(), np.where(truth <= 0, IGNORED, truth - 1))


def test_coco_object_is_the_things_of_coco_stuff(data_root):
    if benchmarks.LAYOUTS["coco_stuff171"].missing(Path(data_root)):
        pytest.skip("COCO-Stuff is not here")
    for stuff, things in zip(*(benchmarks.load_benchmark(n, data_root).samples for n in ("coco_stuff171", "coco_object80"))):
        truth = stuff.truth()
        np.testing.assert_array_equal(things.truth(), np.where(truth < 80, truth, IGNORED))


@pytest.mark.parametrize("name", ["coco_object", "msrc", "camvid"])
def test_folder_data_sets(name, data_root):
    if not (Path(data_root) / name / "classes.txt").is_file():
        pytest.skip(f"{name} is not here")
    dataset = benchmarks.load_benchmark(f"folder:{name}", data_root)
    assert dataset.space.background == (name == "coco_object") and len(dataset.samples) > 20
    seen = {int(k) for s in parallel.evenly_spaced(dataset.samples, 30) for k in np.unique(s.truth())}
    assert seen <= {*range(len(dataset.space)), IGNORED}
