"""Vocabularies of more than 255 classes, from labels to numbers: 16-bit label maps and masks."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from fmbseg.data import benchmarks, collections, images, label_spaces
from fmbseg.models.clip import load_clip
from fmbseg.runs import evaluate, label, train
from fmbseg.schemas import EvaluateRun, TrainRun
from fmbseg.stage2.segmenter import words_space

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


@pytest.mark.minutes
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


def test_a_label_spaces_name_is_its_list_of_words():
    assert words_space("lvis1203").names == label_spaces.label_space("lvis1203").names
    assert words_space("voc21").names == label_spaces.label_space("voc20").names  # its background is left out
    assert words_space("lvis1203", "wall, floor").background


def test_only_padding_of_all_texts_is_cut():
    clip = load_clip("lit-efficientnet-lite2-minilm")
    prompts = ["a photo of a cat", "a photo of a " + "very " * 20 + "big dog"]
    ids = clip._tokens(prompts)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(clip.model.encode_text(ids), dim=-1)
    torch.testing.assert_close(clip.encode_text(prompts), expected, atol=1e-6, rtol=0)
    seen = []
    clip.model.text.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    for some in (prompts, prompts[:1]):
        clip.encode_text(some)
    assert seen == [32, 16] and ids.shape[1] == 64


def test_masks_of_sixteen_bits_are_the_truth_of_many_classes(own_home, large_folder):
    found, drawn = benchmarks.load_benchmark(f"folder:{large_folder}"), benchmarks.load_benchmark("drawn")
    truth, expected = found.samples[0].truth(), drawn.samples[0].truth() + 296
    expected[:5] = images.IGNORED
    np.testing.assert_array_equal(truth, expected)
