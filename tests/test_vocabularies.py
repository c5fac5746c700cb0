"""Vocabularies of more than 255 classes, from labels to numbers: 16-bit label maps and masks."""

import math

import numpy as np
import pytest
from PIL import Image

from fmbseg.data import benchmarks, collections, images, label_spaces
from fmbseg.runs import evaluate, label, train
from fmbseg.schemas import EvaluateRun, TrainRun

JOINED = "coco_stuff171+ade150"


@pytest.fixture
def large_folder(tmp_path):
    """The drawn images as a folder data set of 300 classes, of which the last four are drawn; masks of 16 bits."""
    drawn, folder = benchmarks.load_benchmark("drawn"), tmp_path / "large"
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    (folder / "classes.txt").write_text("".join(f"word {k}\n" for k in range(296)) + "sky\ngrass\nsun\nhouse\n")
    for sample in drawn.samples:
        (folder / "images" / sample.image.name).write_bytes(sample.image.read_bytes())
        truth = (sample.truth() + 296).astype(np.uint16)
        truth[:5] = images.IGNORED_IN_FILES[16]
        Image.fromarray(truth).save(folder / "masks" / sample.image.name)
    return folder


def test_a_joined_vocabulary_of_more_than_255_words_labels_trains_and_is_evaluated(smoke, own_home, large_folder, tmp_path):
    values = {"profile": "smoke", "vocabulary": JOINED, "reference_images": 0, "results_dir": str(tmp_path), "min_labelled": 0.1}
    p, space = smoke(TrainRun, **values), label_spaces.vocabulary(JOINED)
    assert len(space) == 263
    samples = collections.load_collection("drawn")[:2]
    store, failures = label.label(samples, p)
    assert not failures and all(Image.open(store.path(sample)).mode == "I;16" for sample in samples)
    used = {int(k) for sample in samples for k in np.unique(store.read(sample))}
    assert used <= {images.IGNORED, *range(263)} and max(used) > 0
    assert set(label.label_table(samples, store)["class"]) == {space.names[k] for k in used - {images.IGNORED}}
    module = tmp_path / "module.safetensors"
    result = train.train(samples, store, p, module)
    assert set(result.classes) <= used and math.isfinite(result.steps[-1]["loss"])
    q = smoke(EvaluateRun, **values | {"methods": ["stage1", "fmbseg"], "eval_limit": 1, "benchmarks": [f"folder:{large_folder}"]})
    frame = evaluate.evaluate(evaluate.find_benchmarks(q.benchmarks), q, module)
    assert (frame["images"] == 1).all() and frame["failed"].sum() == 0 and frame["miou"].between(0, 100).all()


def test_masks_of_sixteen_bits_are_the_truth_of_many_classes(own_home, large_folder):
    found, drawn = benchmarks.load_benchmark(f"folder:{large_folder}"), benchmarks.load_benchmark("drawn")
    truth, expected = found.samples[0].truth(), drawn.samples[0].truth() + 296
    expected[:5] = images.IGNORED
    np.testing.assert_array_equal(truth, expected)
