import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fmbseg import files
from fmbseg.data import benchmarks, collections, images, label_spaces
from fmbseg.data.images import IGNORED
from fmbseg.errors import DataError, ParameterError
from fmbseg.models import texts as texts_of
from fmbseg.models.clip import load_clip
from fmbseg.models.encoders import load_encoder
from fmbseg.params import AlignParams, EvaluateParams, LabelParams, ModuleParams, SegmentParams
from fmbseg.runs import cache, evaluate
from fmbseg.stage1.pseudo_labels import LabelStore, PseudoLabel
from fmbseg.stage2 import alignment, segmenter, training
from fmbseg.stage2.metrics import Confusion
from fmbseg.stage2.segmenter import DenseClip, Segmenter, words_space

WORDS = "sky, grass, sun, house"


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """One FMBSEG_HOME for this file: encoder patches of the drawn images are made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMBSEG_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def drawn():
    return benchmarks.load_benchmark("drawn")


@pytest.fixture(scope="module")
def store(drawn, smoke, tmp_path_factory):
    """The drawn images' truth as pseudo labels, their upper edge unlabelled."""
    made = LabelStore(tmp_path_factory.mktemp("labels"), drawn.space, smoke(LabelParams))
    for sample in drawn.samples:
        labels = sample.truth()
        labels[:10] = IGNORED
        made.write(sample, PseudoLabel(labels, [], [], []))
    return made


@pytest.fixture(scope="module")
def clip(smoke):
    return load_clip(smoke(LabelParams).clip)


@pytest.fixture(scope="module")
def texts(drawn, clip):
    return texts_of.class_texts(clip, drawn.space)


@pytest.fixture(scope="module")
def trained(drawn, store, texts, smoke):
    """Trained on the truth until it fits, and its parameters."""
    params = smoke(AlignParams, epochs=40, learning_rate=0.05, temperature=0.1)
    return training.train(list(drawn.samples), store, texts, params), params


@pytest.fixture(scope="module")
def module(trained, smoke, tmp_path_factory):
    result, params = trained
    described = {"key": "toy", "encoder": params.encoder, "clip": smoke(LabelParams).clip, "crop_input": None, "templates": "one"}
    return alignment.save(tmp_path_factory.mktemp("module") / "alignment.safetensors", result.alignment, described)


def saved(result, path):
    return alignment.save(path, result.alignment, {}).read_bytes()


# ---------------------------------------------------------------- training


def test_the_same_seed_gives_the_same_file(drawn, store, texts, smoke, tmp_path):
    samples, params = list(drawn.samples), smoke(AlignParams, epochs=2, images_per_batch=2)
    torch.rand(3)
    first = saved(training.train(samples, store, texts, params, seed=1), tmp_path / "a")
    assert saved(training.train(samples, store, texts, params, seed=1), tmp_path / "b") == first
    assert saved(training.train(samples, store, texts, params, seed=2), tmp_path / "c") != first


def test_the_loss_falls_and_the_rate_ends_at_zero(trained):
    steps = trained[0].steps
    losses, rates = ([step[name] for step in steps] for name in ("loss", "learning_rate"))
    assert len(steps) == 40 * 2 and [s["step"] for s in steps] == list(range(80)) and steps[-1]["epoch"] == 39
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.3
    np.testing.assert_allclose(rates, [0.05 * (1 + np.cos(np.pi * i / 80)) / 2 for i in range(80)], atol=1e-9)
    assert trained[0].classes == (0, 1, 2, 3) and steps[0]["patches"] > 100


def test_a_trained_module_segments_what_it_was_trained_on(drawn, module):
    segmenter, counts = Segmenter.load(module, params=SegmentParams(segment_short_side=128, window=256, window_stride=128)), Confusion(4)
    for sample in drawn.samples:
        counts.add(sample.truth(), segmenter.segment(images.read_image(sample.image), WORDS).labels)
    assert counts.miou() > 50  # one class everywhere: about 12


def test_standardisation_is_that_of_the_patches(drawn, trained):
    result, params = trained
    patches = torch.cat([cache.encoder_patches(s.image, params).float().flatten(1) for s in drawn.samples], dim=1)
    torch.testing.assert_close(result.alignment.mean, patches.mean(dim=1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.alignment.std, patches.std(dim=1).clamp(min=1e-3), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("module", ["linear", "mlp", "transformer"])
@pytest.mark.parametrize("loss", ["tsupcon", "prototype", "supcon"])
def test_every_loss_and_module_trains(module, loss, drawn, store, texts, smoke):
    params = smoke(AlignParams, module=module, loss=loss, images_per_batch=3)
    result = training.train(list(drawn.samples), store, texts, params)
    assert len(result.steps) == 2 and all(np.isfinite(s["loss"]) for s in result.steps)
    torch.manual_seed(0)
    fresh = alignment.Alignment(result.alignment.width, result.alignment.out, ModuleParams(module=module))
    assert all(torch.isfinite(p).all() for p in result.alignment.parameters())
    assert not torch.equal(result.alignment.module.project.weight, fresh.module.project.weight)


def test_adamw_trains_too(drawn, store, texts, smoke):
    params = smoke(AlignParams, optimiser="adamw", learning_rate=1e-3, epochs=6, temperature=0.1)
    losses = [s["loss"] for s in training.train(list(drawn.samples), store, texts, params).steps]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("loss", ["tsupcon", "prototype", "supcon"])
def test_unlabelled_patches_do_not_enter_the_loss(loss, drawn, texts, smoke, tmp_path, monkeypatch):
    """With a module that sees each patch by itself, other features of unlabelled patches change nothing."""
    params = smoke(AlignParams, module="linear", loss=loss, epochs=2)
    store = LabelStore(tmp_path / "labels", drawn.space, smoke(LabelParams))
    samples = list(drawn.samples[:3])
    for sample in samples:
        labels = sample.truth()
        labels[:, : labels.shape[1] // 2] = IGNORED
        store.write(sample, PseudoLabel(labels, [], [], []))
    monkeypatch.setattr(training, "standardise", lambda *_: None)
    plain = saved(training.train(samples, store, texts, params), tmp_path / "a")
    original = cache.encoder_patches

    def changed(columns):
        def patches(*arguments):
            made = original(*arguments).clone()
            made[:, :, columns] += 3
            return made

        return patches

    monkeypatch.setattr(cache, "encoder_patches", changed(slice(0, 4)))  # the unlabelled half of 8 x 8
    assert saved(training.train(samples, store, texts, params), tmp_path / "b") == plain
    monkeypatch.setattr(cache, "encoder_patches", changed(slice(4, 8)))
    assert saved(training.train(samples, store, texts, params), tmp_path / "c") != plain


def test_labels_of_the_pictures_are_those_of_their_patches(drawn, store, smoke):
    data = training.PatchDataset(list(drawn.samples), store, smoke(AlignParams), "cpu")
    patches, labels = data[2]
    assert patches.shape[1:] == labels.shape == (8, 8) and labels[0].tolist() == [-1] * 8
    assert labels[1, 0] == 0 and (labels[7] == 1).all() and (labels == 3).sum() == 3  # a row of 10 unlabelled of 16 stays out
    assert training.labelled_classes(data) == (0, 1, 2, 3)


def test_nothing_labelled_is_refused(drawn, texts, smoke, tmp_path):
    store, samples = LabelStore(tmp_path / "labels", drawn.space, smoke(LabelParams)), list(drawn.samples[:2])
    for sample in samples:
        store.write(sample, PseudoLabel(np.full_like(sample.truth(), IGNORED), [], [], []))
    with pytest.raises(DataError, match="no patch is labelled; lower min_votes"):
        training.train(samples, store, texts, smoke(AlignParams))


def test_no_labelled_patch_is_refused(drawn, texts, smoke, tmp_path):
    """Labelled pixels, yet no labelled patch."""
    store, samples = LabelStore(tmp_path / "labels", drawn.space, smoke(LabelParams)), list(drawn.samples[:2])
    for sample in samples:
        labels = np.full_like(sample.truth(), IGNORED)
        labels[5, 5] = 1
        store.write(sample, PseudoLabel(labels, [], [], []))
    with pytest.raises(DataError, match="labelled"):
        training.train(samples, store, texts, smoke(AlignParams))


# ---------------------------------------------------------------- Segmenter


@pytest.fixture(scope="module")
def segmenter(module):
    return Segmenter.load(module, params=SegmentParams(segment_short_side=128, window=128, window_stride=64))


def test_label_map_has_the_size_of_the_picture(segmenter):
    generator = np.random.default_rng(0)
    for size in ((90, 133), (300, 61), (8, 8)):
        result = segmenter.segment(generator.integers(0, 255, (*size, 3), np.uint8), WORDS)
        assert result.labels.shape == size and result.labels.dtype == np.uint8 and result.labels.max() < 4
        assert result.space.names == ("sky", "grass", "sun", "house") and result.similarity.shape[0] == 4
        assert min(result.similarity.shape[1:]) == 128 and result.similarity.abs().max() <= 1.001


@pytest.mark.parametrize("classes", ["", " , ", [], ["cat", " cat "], "cat, dog, cat", ["cat", 3]])
def test_empty_and_repeated_classes_are_refused(classes, segmenter):
    with pytest.raises(ParameterError) as caught:
        segmenter.segment(np.zeros((32, 32, 3), np.uint8), classes)
    assert "\n" not in str(caught.value) and "classes: " in str(caught.value)


def test_background_words_are_class_0(segmenter, drawn):
    image = images.read_image(drawn.samples[0].image)
    apart, result = segmenter.segment(image, WORDS).labels, segmenter.segment(image, "sun, house", background="sky, grass")
    assert result.space.names == ("background", "sun", "house") and result.space.background
    assert (result.labels == np.array([0, 0, 1, 2], np.uint8)[apart]).mean() > 0.97  # the best word is chosen before interpolation
    assert len(np.unique(result.labels)) > 1 and (result.labels == 0).mean() > 0.5 and result.space.palette[0].tolist() == [0, 0, 0]
    with pytest.raises(ParameterError, match="background: also among the classes: sun"):
        words_space("sun, house", ["sky", "sun"])


def test_description_counts_the_pixels(segmenter, drawn):
    result = segmenter.segment(images.read_image(drawn.samples[1].image), WORDS)
    told = segmenter.describe(result)
    assert (told["height"], told["width"]) == result.labels.shape
    assert {c["name"]: c["pixels"] for c in told["classes"]} == {
        result.space.names[k]: int((result.labels == k).sum()) for k in np.unique(result.labels)
    }


def test_label_map_is_interpolation_then_argmax():
    similarity = torch.randn(7, 6, 9, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(similarity[None], (37, 50), mode="bilinear", align_corners=False)[0].argmax(dim=0)
    np.testing.assert_array_equal(segmenter.label_map(similarity, (37, 50)), expected.numpy())
    assert (segmenter.label_map(torch.zeros(5, 3, 3), (9, 9)) == 0).all()


def test_similarity_of_one_window_is_the_direct_one(drawn, module):
    image = images.read_image(drawn.samples[0].image)  # 128 x 160
    segmenter = Segmenter.load(module, params=SegmentParams(segment_short_side=128, window=160, window_stride=160))
    embedded, texts = segmenter.embed(image), segmenter.texts(words_space(WORDS))
    aligned, described = alignment.load(module)
    with torch.inference_mode():
        z = aligned(load_encoder(described["encoder"]).encode(torch.from_numpy(image)[None]))
        expected = torch.einsum("kd,bdhw->bkhw", texts.features, z)
        expected = F.interpolate(expected, (128, 160), mode="bilinear", align_corners=False)[0]
    assert len(embedded.windows) == 1
    torch.testing.assert_close(segmenter.similarity(embedded, texts), expected, atol=1e-5, rtol=1e-5)


def test_overlapping_windows_are_averaged(drawn, segmenter):
    image, texts = images.read_image(drawn.samples[0].image), segmenter.texts(words_space(WORDS))
    embedded = segmenter.embed(image)
    assert [(w.top, w.left, w.height, w.width) for w in embedded.windows] == [(0, 0, 128, 128), (0, 32, 128, 128)]
    left, right = (
        F.interpolate(torch.einsum("kd,dhw->khw", texts.features, z)[None], (128, 128), mode="bilinear", align_corners=False)[0]
        for z in embedded.maps
    )
    made = segmenter.similarity(embedded, texts)
    torch.testing.assert_close(made[..., :32], left[..., :32], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made[..., 128:], right[..., 96:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made[..., 32:128], (left[..., 32:] + right[..., :96]) / 2, atol=1e-5, rtol=1e-5)


def test_dense_clip_is_the_normalised_map(clip, drawn):
    image = images.resize(images.read_image(drawn.samples[0].image), (100, 100))
    made = DenseClip(clip).embed(torch.from_numpy(image)[None])
    direct = clip.encode_crops(torch.from_numpy(images.resize(image, (224, 224)))[None]).maps
    torch.testing.assert_close(made, F.normalize(direct, dim=1))


def test_a_file_that_is_no_module_is_refused(tmp_path):
    files.write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    with pytest.raises(DataError, match="not an alignment module"):
        Segmenter.load(tmp_path / "x.safetensors")
    with pytest.raises(DataError, match="no trained module there; run notebook 04 or: fmbseg train"):
        Segmenter.load(tmp_path / "none.safetensors")


def test_the_module_that_is_loaded_by_default_is_the_embedded_profiles(module, own_home):
    with pytest.raises(DataError, match=r"modules/embedded/alignment\.safetensors: no trained module there"):
        Segmenter.load()
    alignment.place().parent.mkdir(parents=True)
    alignment.place().write_bytes(module.read_bytes())
    assert Segmenter.load().embedder.key == Segmenter.load(module).embedder.key


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("method", evaluate.METHODS)
def test_evaluation_is_the_direct_computation_and_is_kept(method, drawn, module, smoke, monkeypatch):
    params = smoke(EvaluateParams, eval_limit=3)
    (record,) = evaluate.evaluate(method, [drawn], params, str(module))
    counts, confusion = Confusion(4), np.zeros((4, 5), dtype=int)
    for sample in (drawn.samples[0], drawn.samples[2], drawn.samples[4]):
        (prediction,) = evaluate.predict(method, [(sample, drawn.space)], params, str(module), "cpu")
        assert prediction.shape == sample.truth().shape and prediction.dtype == np.uint8
        counts.add(sample.truth(), prediction)
        for t, p in zip(sample.truth().ravel(), prediction.ravel()):
            confusion[t, min(p, 4)] += 1
    ious = [confusion[k, k] / (confusion[k].sum() + confusion[:, k].sum() - confusion[k, k]) for k in range(4)]
    assert record.miou == pytest.approx(counts.miou(), abs=1e-3) == pytest.approx(100 * np.mean(ious), abs=1e-3)
    assert record.iou["house"] == pytest.approx(100 * ious[3], abs=1e-3) and (record.images, record.failed) == (3, 0)
    assert record.notes == ["random weights: the number means nothing"] and record.dataset == "drawn"
    monkeypatch.setattr(evaluate, "predict", lambda *_: pytest.fail("predicted again"))
    (again,) = evaluate.evaluate(method, [drawn], params, str(module))
    assert (again.miou, again.iou, again.images) == (record.miou, record.iou, 3)


def test_shared_pictures_go_through_the_model_once(drawn, smoke, own_home, monkeypatch):
    other = collections.Dataset(
        "other", label_spaces.own_words(["tree", "sea", "moon", "barn"], "other"), drawn.samples[:2], "the same images"
    )
    seen, predict = [], evaluate.predict
    monkeypatch.setattr(
        evaluate,
        "predict",
        lambda method, columns, *rest: seen.append((columns[0][0].name, len(columns))) or predict(method, columns, *rest),
    )
    records = evaluate.evaluate("dense_high_resolution", [drawn, other], smoke(EvaluateParams))
    assert [(r.dataset, r.images) for r in records] == [("drawn", 6), ("other", 2)]
    assert sorted(seen) == [(f"drawn_{i}", 2 if i < 2 else 1) for i in range(6)]
    assert set(records[1].iou) == {"tree", "sea", "moon", "barn"}


def test_another_module_is_evaluated_anew(drawn, module, trained, smoke, tmp_path, monkeypatch):
    params = smoke(EvaluateParams, eval_limit=1)
    evaluate.evaluate("fmbseg", [drawn], params, str(module))
    described = alignment.load(module)[1] | {"key": "another"}
    other = alignment.save(tmp_path / "other.safetensors", trained[0].alignment, described)
    seen, predict = [], evaluate.predict
    monkeypatch.setattr(evaluate, "predict", lambda *arguments: seen.append(1) or predict(*arguments))
    evaluate.evaluate("fmbseg", [drawn], params, str(other))
    assert seen == [1]


def test_a_failing_picture_is_counted(drawn, smoke, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    broken = collections.Sample("broken", tmp_path / "broken.png", drawn.samples[0].truth)
    mixed = collections.Dataset("drawn", drawn.space, (drawn.samples[0], broken), "")
    (record,) = evaluate.evaluate("dense_high_resolution", [mixed], smoke(EvaluateParams))
    assert (record.images, record.failed) == (1, 1)


def test_unknown_method_and_missing_module_are_refused(drawn, smoke, tmp_path):
    with pytest.raises(ParameterError, match="method 'magic': unknown; known are dense"):
        evaluate.evaluate("magic", [drawn], smoke(EvaluateParams))
    with pytest.raises(DataError, match="no trained module there; run notebook 04 or: fmbseg train"):
        evaluate.evaluate("fmbseg", [drawn], smoke(EvaluateParams), str(tmp_path / "none.safetensors"))


def test_stage1_as_a_prediction_folds_the_background_words(drawn, smoke, monkeypatch):
    """Words 0 and 1 are background's: what they label, and what nothing labels, is class 0."""
    space = words_space("sun, house", "sky, grass")
    labels = np.array([[0, 1, 2, 3, 255]], dtype=np.uint8)
    monkeypatch.setattr(evaluate.pseudo_labels, "label_picture", lambda *_: PseudoLabel(labels, [], [], []))
    params = smoke(EvaluateParams)
    assert evaluate.predict("stage1", [(drawn.samples[0], space)], params, "", "cpu")[0].tolist() == [[0, 0, 1, 2, 0]]
    assert evaluate.predict("stage1", [(drawn.samples[0], drawn.space)], params, "", "cpu")[0].tolist() == [[0, 1, 2, 3, 255]]
