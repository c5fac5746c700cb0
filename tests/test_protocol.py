"""The evaluation protocol: what is a parameter is what is used, and what is recorded."""

import functools
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fmbseg.data import benchmarks, collections, images, label_spaces
from fmbseg.data.images import resize_map
from fmbseg.errors import ParameterError
from fmbseg.models import texts as texts_of
from fmbseg.models.clip import load_clip
from fmbseg.models.encoders import load_encoder
from fmbseg.params import EvaluateParams, ModuleParams, SegmentParams, make
from fmbseg.runs import evaluate
from fmbseg.stage2 import alignment, segmenter
from fmbseg.stage2.segmenter import DenseClip, Segmenter


@pytest.fixture(scope="module")
def clip():
    return load_clip("random:ViT-S-32")


def test_background_words_are_a_rule_or_a_list(own_home):
    space = label_spaces.label_space("voc21")
    found = collections.Dataset("voc21", space, (), "")
    prompts = {rule: evaluate.protocol_space(found, make(SegmentParams, {"background_words": rule})).prompts for rule in ("stuff", "name")}
    assert prompts["stuff"][0] == label_spaces.BACKGROUND_WORDS and prompts["name"][0] == ("background",)
    given = make(SegmentParams, {"background_words": ["wall", "sky", "cat"]})
    assert evaluate.protocol_space(found, given).prompts == (("wall", "sky"), *space.prompts[1:])  # a class stays a class
    for wrong in ("stuf", 3, [1]):
        with pytest.raises(ParameterError, match="background_words = "):
            make(SegmentParams, {"background_words": wrong})
    with pytest.raises(ParameterError, match="background_words: given more than once: wall"):
        evaluate.protocol_space(found, make(SegmentParams, {"background_words": ["wall", "wall"]}))


def test_every_rule_is_in_the_record_and_in_the_key(own_home, smoke):
    found = benchmarks.load_benchmark("drawn")
    settings = {
        "templates": "seven",
        "interpolation": "bicubic",
        "segment_long_limit": 512,
        "window_stride": 96,
        "background_words": ["wall"],
    }
    base = smoke(EvaluateParams, eval_limit=1)
    (record,) = evaluate.evaluate("dense", [found], smoke(EvaluateParams, eval_limit=1, **settings))
    assert {name: record.protocol[name] for name in settings} == settings | {"background_words": ("wall",)}
    assert record.protocol["window"] == 128 and record.protocol["segment_short_side"] == 128
    keys = [evaluate.method_key("dense", base, "", "cpu")]
    keys += [evaluate.method_key("dense", base.model_copy(update={k: v}), "", "cpu") for k, v in settings.items()]
    assert len(set(keys)) == len(keys)
    for same in ({"window_batch": 9}, {"min_votes": 3, "reference_images": 2, "sam": "another"}):
        assert evaluate.method_key("dense", base.model_copy(update=same), "", "cpu") == keys[0]
    assert set(record.weights) == {"clip"}  # and SAM need not be here
    other, given = base.model_copy(update={"reference_images": 2}), base.model_copy(update={"collection": "not here"})
    key = functools.partial(evaluate.method_key, module="", device="cpu")
    assert key("stage1.1", base) != key("stage1.1", other) and key("stage1.1+labels", base) != key("stage1.1", base)
    assert key("stage1.1+labels", given) == key("stage1.1+labels", base)  # given labels need no reference


def test_counts_are_kept_under_the_photographs_that_votes_were_standardised_over(own_home, smoke, tmp_path):
    found, folder = benchmarks.load_benchmark("drawn"), tmp_path / "images"
    folder.mkdir()
    for name, seed in (("a", 0), ("b", 1)):
        Image.fromarray(np.random.RandomState(seed).randint(0, 255, (128, 160, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    params = smoke(EvaluateParams, eval_limit=1, collection=str(folder), reference_images=2)
    evaluate.evaluate("stage1.1", [found], params)
    (counted,) = (own_home / "cache/counts").iterdir()
    evaluate.evaluate("stage1.1", [found], params)
    assert list((own_home / "cache/counts").iterdir()) == [counted]
    (folder / "b.png").write_bytes(found.samples[0].image.read_bytes())
    evaluate.evaluate("stage1.1", [found], params)
    assert len(list((own_home / "cache/counts").iterdir())) == 2


def test_a_module_trained_anew_is_read_anew(own_home, smoke, tmp_path):
    """Also by workers and kernels that had read it before."""
    found, params, module = benchmarks.load_benchmark("drawn"), smoke(EvaluateParams), tmp_path / "module.safetensors"
    described = {"key": "a", "encoder": params.encoder, "clip": params.clip, "crop_input": params.crop_input}
    columns, made = [(found.samples[1], found.space)], []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        width = load_encoder(params.encoder).width
        alignment.save(module, alignment.Alignment(width, 384, ModuleParams(module="linear")), described)
        os.utime(module, ns=(len(made), len(made)))
        made += evaluate.predict("fmbseg", columns, params, str(module), "cpu")
    assert (made[0] != made[1]).any() and (made[0] == made[2]).all()


def test_windows_in_batches_are_the_same_windows(clip):
    image = np.random.RandomState(0).randint(0, 255, (128, 300, 3), dtype=np.uint8)
    sizes = []

    def embed(pixels):
        sizes.append(len(pixels))
        return pixels.permute(0, 3, 1, 2).float()

    made = {}
    for batch in (1, 2, 9):
        params = SegmentParams(segment_short_side=128, window=128, window_stride=64, window_batch=batch)
        made[batch] = Segmenter(DenseClip(clip), clip, params).through_windows(image, embed)
    assert sizes == [1, 1, 1, 1, 2, 2, 4]
    for batch in (2, 9):
        assert made[batch].windows == made[1].windows
        for a, b in zip(made[batch].maps, made[1].maps):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_interpolation_is_the_one_that_is_set(clip):
    similarity = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    maps = {mode: segmenter.label_map(similarity, (37, 50), interpolation=mode) for mode in ("bilinear", "bicubic")}
    for mode, made in maps.items():
        np.testing.assert_array_equal(made, resize_map(similarity[None], (37, 50), mode)[0].argmax(0).numpy())
    assert (maps["bilinear"] != maps["bicubic"]).any()
    image = images.resize(np.random.RandomState(1).randint(0, 255, (9, 9, 3), dtype=np.uint8), (150, 128))
    results = [
        Segmenter(DenseClip(clip), clip, SegmentParams(segment_short_side=128, window=128, window_stride=64, interpolation=mode)).segment(
            image, "sun, sea"
        )
        for mode in maps
    ]
    assert (results[0].similarity != results[1].similarity).any()


def test_templates_of_the_run_are_used_for_a_trained_module(monkeypatch, smoke):
    """And not those of its training, or the record would say what was not done."""
    seen = []
    monkeypatch.setattr(Segmenter, "load", lambda *arguments: seen.append(arguments))
    evaluate._segmenter.cache_clear()
    params = smoke(EvaluateParams, templates="eighty")
    evaluate._segmenter("fmbseg", "module.safetensors", 0, params, "cpu")
    assert seen == [("module.safetensors", "cpu", params, "eighty")]
    evaluate._segmenter.cache_clear()


def test_template_sets():
    assert [len(texts_of.templates(name)) for name in ("one", "plain", "seven", "eighty")] == [1, 1, 7, 80]
    with pytest.raises(ParameterError, match="templates = 'nine': unknown; known are one, plain, seven, eighty"):
        texts_of.templates("nine")
