"""Evaluation: what a method predicts, what is counted and kept, what a record says, and that shards are the whole."""

import dataclasses
import functools
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fmbseg.data import benchmarks, images, label_spaces
from fmbseg.data.images import resize_map
from fmbseg.data.samples import Dataset, Sample
from fmbseg.errors import DataError, ParameterError
from fmbseg.models.clip import load_clip
from fmbseg.models.encoders import load_encoder
from fmbseg.models.sam import load_sam
from fmbseg.models.texts import class_texts
from fmbseg.params import EvaluateParams, ModuleParams, SegmentParams, make
from fmbseg.runs import cache, evaluate, modules, records
from fmbseg.runs.cache import Models
from fmbseg.runs.evaluate import Method, measure
from fmbseg.runs.modules import Segmenter
from fmbseg.schemas import EvaluateRun
from fmbseg.stage1 import features, label_masks, pseudo_labels
from fmbseg.stage1.pseudo_labels import PseudoLabel
from fmbseg.stage1.query_sam import class_similarity
from fmbseg.stage2 import segmenter
from fmbseg.stage2.alignment import Alignment
from fmbseg.stage2.metrics import Confusion
from fmbseg.stage2.segmenter import DenseClip, words_space
from fmbseg.stage2.segmenter import Segmenter as PlainSegmenter

CHEAP = "dense_high_resolution"


@pytest.fixture
def plain(smoke):
    """Smoke's parameters, votes as they are."""
    return smoke(EvaluateParams, reference_images=0)


@pytest.fixture
def home(toy, monkeypatch):
    monkeypatch.setenv("FMBSEG_HOME", str(toy.home))


def of(name, toy=None):
    return Method(name, str(toy.path) if toy and Method(name).base in evaluate.ALIGNED else "")


def seen_by(monkeypatch):
    """The predictions from now on: (name of the image, number of columns)."""
    seen, predict = [], evaluate.predict_on_device
    monkeypatch.setattr(evaluate, "predict_on_device", lambda m, c, *rest: seen.append((c[0][0].name, len(c))) or predict(m, c, *rest))
    return seen


# ---------------------------------------------------------------- predictions


def direct(given, image, space, params, toy):
    """A method's label map, from the method's own functions and in memory."""
    name, masks = Method(given).base, ()
    if Method(given).voted(params):
        masks = [one.mask for one in label_masks.automatic_masks(image, load_sam(params.sam), params)]
    if name in evaluate.ALIGNED:
        return Segmenter.load(toy.path, params=params).segment(image, space, masks=masks).labels
    clip = load_clip(params.clip, "cpu", params.crop_input)
    if name == "dense":  # a transformer sees the whole window
        clip = load_clip(params.clip, "cpu", params.window)
        return PlainSegmenter(DenseClip(clip, params.path, 1.0, params.residual), clip, params).segment(image, space, masks=masks).labels
    if name == "dense_high_resolution":
        found = features.extract(image, clip, params)
        similar = class_similarity(dataclasses.replace(found, map=found.map.half().float()), class_texts(clip, space))
        return resize_map(similar[None], image.shape[:2])[0].argmax(0).numpy()
    words = [word for prompts in space.prompts for word in prompts]
    owner = np.array([k for k, prompts in enumerate(space.prompts) for _ in prompts] + [-1])
    if space.background:
        owner[-1] = 0
    texts = class_texts(clip, label_spaces.own_words(words))
    stage = params.model_copy(update={"stages": evaluate.STAGES[name]})
    return owner[pseudo_labels.label_image(image, clip, load_sam(params.sam), texts, stage).labels]


@pytest.mark.parametrize("name", [m for m in evaluate.METHODS if not m.endswith("+labels")])
def test_a_prediction_is_what_the_methods_functions_give(name, toy, plain, home):
    sample = toy.samples[0]
    for space in (toy.drawn.space, words_space("sun, house", "sky, grass")):
        (made,) = evaluate.predict(of(name, toy), [(sample, space)], plain, Models.of(plain))
        expected = direct(name, images.read_image(sample.image), space, plain, toy)
        made = np.asarray(made)
        assert made.shape == expected.shape and made.dtype == np.int16
        assert (made == expected).mean() > 0.999  # features are kept in fp16


def test_residual_reaches_the_dense_row(toy, plain, home):
    columns = [(toy.samples[0], toy.drawn.space)]
    image = images.read_image(toy.samples[0].image)
    made = {}
    for residual in (False, True):
        params = plain.model_copy(update={"residual": residual})
        (made[residual],) = evaluate.predict(Method("dense"), columns, params, Models.of(params))
        np.testing.assert_array_equal(made[residual], direct("dense", image, toy.drawn.space, params, toy))
    assert (made[False] != made[True]).any()


def test_stage_1_as_a_prediction_folds_the_background_words(toy, plain, monkeypatch):
    """Words 0 and 1 are background's: what they label, and what nothing labels, is class 0."""
    labels = np.array([[0, 1, 2, 3, -1]])
    monkeypatch.setattr(evaluate.label, "label_cached", lambda *_: PseudoLabel(labels, [], [], []))
    predict = functools.partial(evaluate.predict, Method("stage1"), params=plain, models=Models.of(plain))
    assert predict([(toy.samples[0], words_space("sun, house", "sky, grass"))])[0].tolist() == [[0, 0, 1, 2, 0]]
    assert predict([(toy.samples[0], toy.drawn.space)])[0].tolist() == [[0, 1, 2, 3, -1]]


def test_given_labels_take_the_place_of_detection(toy, plain, monkeypatch):
    """The classes of the truth, less the background, reach Stage 1; without "+labels" nothing does."""
    seen, empty = [], PseudoLabel(np.full((128, 160), -1), [], [], [])
    monkeypatch.setattr(evaluate.label, "label_cached", lambda *arguments: seen.append(arguments[-1]) or empty)
    background = dataclasses.replace(toy.drawn.space, background=True)
    for name, space in (("stage1.1", toy.drawn.space), ("stage1.1+labels", toy.drawn.space), ("stage1.1+labels", background)):
        evaluate.predict(Method(name), [(toy.samples[0], space)], plain, Models.of(plain))
    assert seen == [None, (0, 1, 2, 3), (1, 2, 3)]


def test_a_module_trained_anew_is_read_anew_and_tested_with_the_runs_templates(toy, plain, tmp_path):
    """Also by workers and kernels that had read it before."""
    module = tmp_path / "module.safetensors"
    described = {name: modules.load(toy.path)[1][name] for name in ("encoder", "clip", "crop_input", "templates")}
    columns, made = [(toy.samples[1], toy.drawn.space)], []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        modules.save(module, Alignment(load_encoder(plain.encoder).width, 384, ModuleParams(module="linear")), described)
        os.utime(module, ns=(len(made), len(made)))
        made += evaluate.predict(Method("fmbseg", str(module)), columns, plain, Models.of(plain))
    assert (made[0] != made[1]).any() and (made[0] == made[2]).all()
    seven = plain.model_copy(update={"templates": "seven"})
    assert evaluate._aligned(str(module), Models.of(seven), seven).templates == "seven" != described["templates"]


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("name", evaluate.METHODS)
def test_a_record_holds_the_counts_of_its_predictions_which_are_kept(name, toy, plain, home, monkeypatch):
    params = plain.model_copy(update={"eval_limit": 3})
    ((record,),) = measure([of(name, toy)], [toy.drawn], params)
    confusion = np.zeros((4, 5), dtype=int)
    for sample in (toy.samples[0], toy.samples[2], toy.samples[4]):
        (prediction,) = evaluate.predict(of(name, toy), [(sample, toy.drawn.space)], params, Models.of(params))
        np.add.at(confusion, (sample.truth().ravel(), np.minimum(prediction.ravel(), 4)), 1)
    ious = [confusion[k, k] / (confusion[k].sum() + confusion[:, k].sum() - confusion[k, k]) for k in range(4)]
    assert record.miou == pytest.approx(100 * np.mean(ious), abs=1e-3) and record.iou["house"] == pytest.approx(100 * ious[3], abs=1e-3)
    assert (record.images, record.failed, record.dataset) == (3, 0, "drawn")
    assert record.notes == ["random weights: the number means nothing"]
    monkeypatch.setattr(evaluate, "predict_on_device", lambda *_: pytest.fail("predicted again"))
    ((again,),) = measure([of(name, toy)], [toy.drawn], params)
    assert dataclasses.replace(again, seconds=0, time="") == dataclasses.replace(record, seconds=0, time="")


def test_another_truth_of_the_same_image_is_counted_anew(toy, plain, own_home, tmp_path):
    """A mask that was corrected, and two sets of one name whose images are the same."""
    mask, numbers = tmp_path / "mask.png", []
    sample = Sample("one", toy.samples[0].image, functools.partial(images.read_mask, mask))
    for shift in (0, 1, 0):
        Image.fromarray(((toy.samples[0].truth() + shift) % 4).astype(np.uint8)).save(mask)
        ((record,),) = measure([Method(CHEAP)], [Dataset("mine", toy.drawn.space, (sample,), "")], plain)
        numbers.append(record.iou)
    assert numbers[0] == numbers[2] != numbers[1] and len(list((own_home / "cache/counts").iterdir())) == 2


def test_images_that_benchmarks_share_go_through_the_models_once(toy, plain, own_home, monkeypatch):
    words = label_spaces.own_words(["tree", "sea", "moon", "barn"], "other")
    other, seen = Dataset("other", words, toy.drawn.samples[:2], "the same images"), seen_by(monkeypatch)
    (made,) = measure([Method(CHEAP)], [toy.drawn, other], plain)
    assert [(r.dataset, r.images) for r in made] == [("drawn", 6), ("other", 2)] and set(made[1].iou) == set(words.names)
    assert sorted(seen) == [(f"drawn_{i}", 2 if i < 2 else 1) for i in range(6)]


def test_several_modules_share_the_encoders_pass(toy, plain, home, own_home, tmp_path, monkeypatch):
    other = modules.save(tmp_path / "other.safetensors", toy.result.alignment, modules.load(toy.path)[1] | {"key": "another"})
    passes, through = [], Segmenter.through_windows
    monkeypatch.setattr(PlainSegmenter, "through_windows", lambda self, *given: passes.append(1) or through(self, *given))
    seen = seen_by(monkeypatch)
    first, second = measure([of("fmbseg", toy), Method("fmbseg", str(other))], [toy.drawn], plain.model_copy(update={"eval_limit": 2}))
    assert len(passes) == 2 and len(seen) == 4 and first[0].miou == second[0].miou  # another file is another module


def test_a_failing_image_is_counted(toy, plain, own_home, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    broken = Sample("broken", tmp_path / "broken.png", toy.samples[0].truth)
    mixed = Dataset("drawn", toy.drawn.space, (toy.samples[0], broken), "")
    ((record,),) = measure([Method(CHEAP)], [mixed], plain)
    assert (record.images, record.failed) == (1, 1)


def test_unknown_methods_and_missing_modules_are_refused(toy, plain, tmp_path):
    with pytest.raises(ParameterError, match="method 'magic': unknown; known are dense"):
        Method("magic")
    with pytest.raises(DataError, match="no trained module there"):
        measure([Method("fmbseg", str(tmp_path / "none.safetensors"))], [toy.drawn], plain)


# ---------------------------------------------------------------- protocol and records


def test_background_words_are_a_rule_or_a_list():
    space = label_spaces.label_space("voc21")
    found = Dataset("voc21", space, (), "")
    prompts = {
        rule: evaluate.protocol_space(found, make(EvaluateParams, {"background_words": rule})).prompts
        for rule in ("stuff", "name", "sclip")
    }
    assert prompts["stuff"][0] == label_spaces.background_rule("stuff", "voc21").words and prompts["name"][0] == ("background",)
    assert "sands" in prompts["sclip"][0]
    given = make(EvaluateParams, {"background_words": ["wall", "sky", "cat"]})
    assert evaluate.protocol_space(found, given).prompts == (("wall", "sky"), *space.prompts[1:])  # a class stays a class
    for wrong in ("stuf", 3, [1]):
        with pytest.raises(ParameterError, match="background_words = "):
            make(SegmentParams, {"background_words": wrong})
    with pytest.raises(ParameterError, match="background_words: given more than once: wall"):
        evaluate.protocol_space(found, make(EvaluateParams, {"background_words": ["wall", "wall"]}))


def test_every_rule_is_in_the_record_and_in_the_key(toy, plain, own_home, smoke):
    settings = {
        "templates": "seven",
        "text_average": "raw",
        "interpolation": "bicubic",
        "segment_long_limit": 512,
        "resize": "cv2_bilinear",
        "window_stride": 96,
        "word_maximum": "after",
        "residual": True,
    }
    words = {"words": "verbatim", "background_words": ("wall",)}  # what they say is in the key of the counts
    ((record,),) = measure([Method("dense")], [toy.drawn], plain.model_copy(update={"eval_limit": 1, **settings, **words}))
    said = record.protocol | {"residual": record.parameters["residual"]}
    assert {name: said[name] for name in settings | words} == settings | words and (said["window"], said["segment_short_side"]) == (
        128,
        128,
    )
    assert set(record.weights) == {"clip"}  # SAM need not be here
    key = lambda name, **changed: Method(name).key(plain.model_copy(update=changed))  # noqa: E731
    keys = [key("dense"), *(key("dense", **{name: value}) for name, value in settings.items())]
    assert len(set(keys)) == len(keys)
    assert key("dense", window_batch=9) == key("dense", min_votes=3, sam="another") == keys[0]
    assert key("stage1.1") != key("stage1.1+labels") == key("stage1.1+labels", collection="not here")  # given labels need no reference
    own, other = smoke(EvaluateParams), smoke(EvaluateParams, reference_images=2)
    assert Method("stage1.1").key(own) != Method("stage1.1").key(other)


def test_a_vote_in_regions_is_in_the_key_with_all_that_makes_its_masks(smoke, monkeypatch):
    key = lambda name, **values: Method(name).key(smoke(EvaluateParams, **values))  # noqa: E731
    assert key("dense", regions="sam") != key("dense") == key("dense", points_per_side=3)
    keys = [key("dense", regions="sam", **more) for more in ({}, {"points_per_side": 3}, {"min_area": 0.01})]
    monkeypatch.setattr(evaluate.sam, "weights_key", lambda name: "other")
    assert len({*keys, key("dense", regions="sam")}) == 4
    assert key("stage1.1", regions="sam") == key("stage1.1") and Method("fmbseg").voted(smoke(EvaluateParams, regions="sam"))
    assert key("dense+sam") == key("dense", regions="sam") == key("dense+sam", regions="sam")


def test_the_encoder_that_guides_is_in_the_key_of_the_dense_row_and_of_no_other_path(smoke):
    key = lambda **values: Method("dense").key(smoke(EvaluateParams, **values))  # noqa: E731
    assert key(path="guided") != key(path="guided", encoder="random:mobile_sam")
    assert key(path="kk") == key(path="kk", encoder="random:mobile_sam")


def test_masks_of_sam_reach_the_vote(smoke, own_home, monkeypatch):
    drawn, given = benchmarks.load_benchmark("drawn"), []
    monkeypatch.setattr(segmenter, "vote", lambda labels, placed, masks, rule: given.append(masks) or labels)
    for name, regions in (("dense", "sam"), ("dense", "none"), ("dense+sam", "none")):
        params = smoke(EvaluateParams, regions=regions)
        evaluate.predict(Method(name), [(drawn.samples[0], drawn.space)], params, Models.of(params))
    sam = cache.automatic_masks(drawn.samples[0].image, Models.of(params), params)
    assert [len(masks) for masks in given] == [len(sam)] * 2 and len(sam) > 0 and (given[0][0] == sam[0].mask).all()
    (record,) = evaluate.measure([Method("dense+sam")], [dataclasses.replace(drawn, samples=drawn.samples[:1])], params)[0]
    assert record.parameters["regions"] == "sam" and "sam" in record.weights and record.method == "dense+sam"


def test_counts_of_stage_1_depend_on_the_weights_of_both_models(plain, monkeypatch):
    before = {name: Method(name).key(plain) for name in ("stage1", "dense")}
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.sam, "weights_key", lambda name: "other")
        assert Method("stage1").key(plain) != before["stage1"] and Method("dense").key(plain) == before["dense"]
    monkeypatch.setattr(evaluate.clip, "weights_key", lambda name: "other")
    assert all(Method(name).key(plain) != key for name, key in before.items())


def test_counts_are_kept_under_the_images_that_votes_were_standardised_over(toy, own_home, smoke, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, seed in (("a", 0), ("b", 1)):
        Image.fromarray(np.random.RandomState(seed).randint(0, 255, (128, 160, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    params = smoke(EvaluateParams, eval_limit=1, collection=str(folder), reference_images=2)
    kept = lambda: list((own_home / "cache/counts").iterdir())  # noqa: E731
    for _ in range(2):
        measure([Method("stage1.1")], [toy.drawn], params)
        assert len(kept()) == 1
    Image.fromarray(np.zeros((128, 160, 3), np.uint8)).save(folder / "b.png")
    measure([Method("stage1.1")], [toy.drawn], params)
    assert len(kept()) == 2


def test_a_record_of_fmbseg_says_what_its_module_was_trained_with(toy, plain, own_home, tmp_path):
    """And not what the profile says that happens to evaluate it."""
    described = modules.load(toy.path)[1] | {"notes": ["a stand-in"], "weights": {"clip": "theirs", "encoder": "e"}}
    described["parameters"] |= {"epochs": 99, "collection": "theirs"}
    module = modules.save(tmp_path / "module.safetensors", toy.result.alignment, described)
    ((record,),) = measure([Method("fmbseg", str(module))], [toy.drawn], plain.model_copy(update={"eval_limit": 1}))
    assert (record.parameters["epochs"], record.parameters["collection"], record.notes) == (99, "theirs", ["a stand-in"])
    assert (record.weights["clip"], record.weights["encoder"], len(record.weights["module"])) == ("theirs", "e", 64)


def test_hardware_is_the_device_that_did_the_work(toy, plain, own_home, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    ((record,),) = measure([Method(CHEAP)], [toy.drawn], plain.model_copy(update={"eval_limit": 1}))
    assert "CPU" in record.hardware and records.hardware("cuda:0") == "a GPU"


# ---------------------------------------------------------------- shards


def shifted_truth(method, columns, *_):
    """A prediction that costs nothing: the truth, moved by as much as a pixel of the image says."""
    shift = int(images.read_image(columns[0][0].image)[0, 0, 0])
    return [np.roll(sample.truth(), shift, axis=1) for sample, _ in columns]


@pytest.mark.parametrize("count", [2, 3, 9])
def test_an_unsharded_run_reads_what_shards_counted_and_gives_exactly_the_whole(count, plain, own_home, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "predict_on_device", shifted_truth)
    drawn = benchmarks.load_benchmark("drawn")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    words = label_spaces.own_words(["tree", "sea", "moon", "barn"], "other")
    two = [
        Dataset("drawn", drawn.space, (*drawn.samples, Sample("broken", broken, drawn.samples[0].truth)), "seven"),
        Dataset("other", words, drawn.samples[:4], ""),
    ]
    (whole,) = measure([Method(CHEAP)], two, plain)
    monkeypatch.setenv("FMBSEG_HOME", str(tmp_path / "shared"))
    parts = [measure([Method(CHEAP)], two, plain, shard=i, num_shards=count)[0] for i in range(count)]
    monkeypatch.setattr(
        evaluate, "predict_on_device", lambda m, columns, *_: shifted_truth(m, columns) if columns[0][0].image == broken else 1 / 0
    )
    (made,) = measure([Method(CHEAP)], two, plain)
    same = functools.partial(dataclasses.replace, seconds=0.0, time="")
    assert [same(r) for r in made] == [same(r) for r in whole]
    assert [(r.images, r.failed) for r in whole] == [(6, 1), (4, 0)]
    for i, _ in enumerate(two):
        assert sum(part[i].images for part in parts) == whole[i].images and f"shard 1 of {count} alone" in parts[1][i].notes
    if count == 9:
        assert parts[8][0].images == 0 and parts[8][0].miou is None


def test_a_shard_only_counts_and_writes_no_record(smoke, own_home, tmp_path):
    params = smoke(EvaluateRun, profile="smoke", methods=[CHEAP], results_dir=str(tmp_path / "results"), num_shards=2)
    found = evaluate.find_benchmarks(params.benchmarks)
    frame = evaluate.evaluate(found, params)
    assert frame["images"].tolist() == [3] and not list((tmp_path / "results").rglob("*.json"))
    frame = evaluate.evaluate(found, params.model_copy(update={"num_shards": 1}))
    assert frame["images"].tolist() == [6] and len(list((tmp_path / "results").rglob("*.json"))) == 1
    with pytest.raises(ParameterError, match="shards are numbered 0 to 1"):
        evaluate.evaluate(found, params.model_copy(update={"shard": 2}))
    with pytest.raises(DataError, match="none of voc20 is here"):
        evaluate.find_benchmarks(["voc20"])


def test_nonzero_counts_are_the_matrix():
    counts = np.random.RandomState(0).randint(0, 3, (4, 5))
    matrix = Confusion(4)
    for _ in range(2):
        matrix.add_nonzero(Confusion(4, counts.astype(np.int64)).nonzero())
    np.testing.assert_array_equal(matrix.counts, 2 * counts)
