"""Deployment: windows, similarities, the label map, words and background words."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fmbseg import files
from fmbseg.data import images, label_spaces
from fmbseg.data.images import IGNORED, resize_map
from fmbseg.data.label_spaces import Background, LabelSpace
from fmbseg.errors import DataError, ParameterError
from fmbseg.models.clip import load_clip
from fmbseg.models.encoders import load_encoder
from fmbseg.params import SegmentParams, UnlabelledParams
from fmbseg.runs import modules
from fmbseg.runs.modules import Segmenter
from fmbseg.schemas import SegmentRun
from fmbseg.stage1.detection import Detected
from fmbseg.stage2 import segmenter as of
from fmbseg.stage2.metrics import Confusion
from fmbseg.stage2.segmenter import DenseClip, words_space

WORDS = "sky, grass, sun, house"


@pytest.fixture(scope="module")
def clip():
    return load_clip("random:ViT-S-32")


@pytest.fixture(scope="module")
def segmenter(toy):
    return Segmenter.load(toy.path, params=SegmentParams(segment_short_side=128, window=128, window_stride=64))


@pytest.fixture(scope="module")
def image(toy):
    return images.read_image(toy.samples[0].image)  # 128 x 160


def test_a_trained_module_segments_what_it_was_trained_on(toy):
    made, counts = Segmenter.load(toy.path, params=SegmentParams(segment_short_side=128, window=256, window_stride=128)), Confusion(4)
    for sample in toy.samples:
        counts.add(sample.truth(), made.segment(images.read_image(sample.image), WORDS).labels)
    assert counts.miou() > 50  # one class everywhere: about 12


def test_a_label_map_is_the_argmax_of_its_similarities_at_the_images_own_size(segmenter):
    generator = np.random.default_rng(0)
    for size in ((90, 133), (300, 61), (8, 8)):
        result = segmenter.segment(generator.integers(0, 255, (*size, 3), np.uint8), WORDS)
        assert result.labels.shape == size and result.labels.dtype == np.int16
        assert result.space.names == ("sky", "grass", "sun", "house") and min(result.similarity.shape[1:]) == 128
        expected = resize_map(result.similarity[None], size)[0].argmax(dim=0).numpy()
        assert (result.labels == expected).mean() > 0.999  # but for ties in the last bit


@pytest.mark.parametrize("classes", ["", " , ", [], ["cat", " cat "], "cat, dog, cat", ["cat", 3]])
def test_empty_and_repeated_classes_are_refused(classes, segmenter):
    with pytest.raises(ParameterError, match="classes: "):
        segmenter.segment(np.zeros((32, 32, 3), np.uint8), classes)


def test_background_words_are_class_0(segmenter, image):
    apart, result = segmenter.segment(image, WORDS).labels, segmenter.segment(image, "sun, house", background="sky, grass")
    assert result.space.names == ("background", "sun", "house") and result.space.background
    assert (result.labels == np.array([0, 0, 1, 2], np.uint8)[apart]).mean() > 0.97  # the best word is chosen before interpolation
    assert len(np.unique(result.labels)) > 1 and (result.labels == 0).mean() > 0.5 and result.space.palette[0].tolist() == [0, 0, 0]
    with pytest.raises(ParameterError, match="background: also among the classes: sun"):
        words_space("sun, house", ["sky", "sun"])


def test_description_counts_the_pixels(segmenter, image):
    result = segmenter.segment(image, WORDS)
    told = of.describe(result)
    assert (told["height"], told["width"]) == result.labels.shape
    assert {c["name"]: c["pixels"] for c in told["classes"]} == {
        result.space.names[k]: int((result.labels == k).sum()) for k in np.unique(result.labels)
    }


def test_a_real_images_labels_are_the_argmax_of_all_classes_everywhere(real_image):
    segmenter = Segmenter.load(modules.SHIPPED)
    result = segmenter.segment(real_image, label_spaces.vocabulary("coco_stuff171"))
    assert "similarity" not in vars(result)  # 51 million numbers that nobody has asked for
    everywhere = result.placed.at(result.labels.shape, "bilinear").interpolated()
    best, second = everywhere.topk(2, dim=0).values
    same = result.labels == everywhere.argmax(dim=0).numpy()
    assert same[(best - second > 1e-6).numpy()].all() and same.mean() > 0.9999 and len(np.unique(result.labels)) > 5


@pytest.mark.parametrize("rule", [Background(), Background(threshold=0.36, scale=1)])
def test_masks_take_the_class_of_their_mean_similarity(rule):
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randn(4, 6, 9, generator=generator)
    down, across = (images.resampling(n, m, "bilinear") for n, m in ((37, 6), (50, 9)))
    masks = [np.zeros((37, 50), bool) for _ in range(4)]
    masks[0][3:9, 4:20], masks[1][:30, :25], masks[2][20:37, 30:50] = True, True, True  # small in large; the last is empty
    placed = of.Placed(similarity, down, across, torch.tensor([0, 1, 1, 2]))
    before = of.best_class(placed).numpy()
    full = F.interpolate(similarity[None], (37, 50), mode="bilinear", align_corners=False)[0]
    expected = before.copy()
    for mask in (masks[2], masks[1], masks[0]) if masks[2].sum() > masks[1].sum() else (masks[1], masks[2], masks[0]):
        means = torch.stack([one[torch.from_numpy(mask)].mean() for one in full])
        expected[mask] = [0, 1, 1, 2][means.argmax()] if means.softmax(0).max() >= rule.threshold else 0
    made = of.vote(before, placed, masks, rule)
    np.testing.assert_array_equal(made, expected)
    np.testing.assert_array_equal(of.vote(before, placed, masks[::-1], rule), made)
    assert (made != before).any() and (made[~np.logical_or.reduce(masks)] == before[~np.logical_or.reduce(masks)]).all()


def test_a_segmenter_votes_in_the_masks_that_it_is_given(clip, image):
    made = of.Segmenter(DenseClip(clip), clip, SegmentParams(segment_short_side=128, window=128, window_stride=64))
    plain, whole = made.segment(image, WORDS), made.segment(image, WORDS, masks=[np.ones(image.shape[:2], bool)])
    placed = made.place(made.embed(image), made.texts(words_space(WORDS))).at(image.shape[:2], "bilinear")
    assert (whole.labels == int(placed.interpolated().mean(dim=(1, 2)).argmax())).all() and len(np.unique(plain.labels)) > 1


def test_only_classes_that_lose_everywhere_are_no_candidates():
    leader, rival, loser, twin = torch.full((2, 2), 0.5), torch.zeros(2, 2), torch.full((2, 2), 0.49), torch.full((2, 2), 0.5)
    rival[1, 1] = 0.6
    assert of.candidates(torch.stack([loser, rival, leader, twin])).tolist() == [1, 2, 3]


@pytest.mark.parametrize("rule", ["words", "score", "threshold"])
@pytest.mark.parametrize("words", ["before", "after"])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_background_rules_are_their_slow_transcription(clip, image, mode, words, rule):
    """Each word's similarities to the image's own size, the best word of a class, softmax over all, the threshold."""
    params = SegmentParams(segment_short_side=128, window=224, window_stride=224, interpolation=mode, word_maximum=words)
    made = of.Segmenter(DenseClip(clip), clip, params)
    prompts = (("tree",), ("sun", "sky"), ("house", "grass"))
    space, embedded = LabelSpace("own", ("background", "a", "b"), prompts, label_spaces.palette(3), True), made.embed(image)
    similar, owner = torch.einsum("pd,dhw->phw", made.texts(space).features, embedded.maps[0]), [0, 1, 1, 2, 2]
    used = Background(("tree",))
    if rule != "words":  # a score that half the patches reach, or none
        used = Background(score=float(similar[1:].max(dim=0).values.median()) if rule == "score" else -1.0)
        similar = torch.cat([torch.full_like(similar[:1], used.score), similar[1:]])
    if words == "before":
        similar, owner = torch.stack([similar[0], similar[1:3].amax(dim=0), similar[3:].amax(dim=0)]), [0, 1, 2]
    for size in (embedded.scaled, embedded.size):
        similar = F.interpolate(similar[None], size, mode=mode, align_corners=False)[0]
    expected = torch.tensor(owner)[similar.argmax(dim=0)]
    if rule == "threshold":
        likely = (30 * similar).softmax(dim=0).max(dim=0).values
        used = dataclasses.replace(used, threshold=float(likely.median()), scale=30)
        expected[likely < used.threshold] = 0
    ruled = space.with_background(used)
    labels = made.label(embedded, made.texts(ruled), ruled.rule)
    assert (labels == expected.numpy()).mean() > 0.999 and (rule == "words" or 0.2 < (labels == 0).mean() < 0.8)
    assert (made.segment(image, ruled).labels == labels).all()


def test_confidence_is_of_the_two_best_classes_at_every_pixel(segmenter, image):
    result = segmenter.segment(image, WORDS)
    best, second = result.placed.at(result.labels.shape, "bilinear").interpolated().topk(2, dim=0).values
    np.testing.assert_allclose(result.confidence.similarity, best.numpy(), atol=1e-6)
    np.testing.assert_allclose(result.confidence.margin, (best - second).numpy(), atol=1e-6)
    alone = segmenter.segment(image, "sun").confidence
    np.testing.assert_array_equal(alone.margin, alone.similarity)
    told = of.describe(result)
    assert told["unlabelled"] == 0 and told["mean_margin"] == pytest.approx(float((best - second).mean()), abs=1e-4)


def test_pixels_under_a_threshold_are_unlabelled(segmenter, image):
    result = segmenter.segment(image, WORDS)
    for what, name in (("similarity", "least_similarity"), ("margin", "least_margin")):
        values = getattr(result.confidence, what)
        least = float(np.median(values))
        params = UnlabelledParams(**{name: least})
        both = make_run(segmenter.params, params)
        labels = Segmenter(segmenter.embedder, segmenter.clip, both).segment(image, WORDS).labels
        np.testing.assert_array_equal(labels, np.where(values < least, IGNORED, result.labels))
        assert 0.4 < (labels == IGNORED).mean() < 0.6


def test_pixels_of_classes_that_are_not_detected_are_unlabelled(segmenter, image, monkeypatch):
    """The crops' votes decide; background needs none."""
    found = [Detected(2, "sun", 3), Detected(0, "sky", 2)]
    monkeypatch.setattr(of.detection, "detect", lambda *given: found)
    chosen = Segmenter(segmenter.embedder, segmenter.clip, make_run(segmenter.params, UnlabelledParams(detected_only=True, crop_stride=96)))
    all_of_them, few = segmenter.segment(image, WORDS), chosen.segment(image, WORDS)
    np.testing.assert_array_equal(few.labels, np.where(np.isin(all_of_them.labels, (0, 2)), all_of_them.labels, IGNORED))
    assert 0 < (few.labels == IGNORED).mean() < 1
    np.testing.assert_array_equal(few.confidence.margin, all_of_them.confidence.margin)
    found.clear()
    assert set(np.unique(chosen.segment(image, "grass, sun", "sky, house").labels)) == {IGNORED, 0}
    nothing = chosen.segment(image, WORDS)
    assert (nothing.labels == IGNORED).all() and of.describe(nothing)["classes"] == [] and of.describe(nothing)["mean_margin"] == 0


def make_run(segment, unlabelled):
    return SegmentRun(**segment.part(SegmentParams), **{k: v for k, v in unlabelled.model_dump().items() if k != "precision"})


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("classes", [40, of.MANY + 40])
def test_label_map_is_interpolation_then_argmax(mode, classes):
    similarity = torch.randn(classes, 6, 9, generator=torch.Generator().manual_seed(0))
    for size in ((37, 50), (of.TILE, 2 * of.TILE), (2 * of.TILE + 7, of.TILE + 1)):
        expected = F.interpolate(similarity[None], size, mode=mode, align_corners=False)[0].argmax(dim=0)
        np.testing.assert_array_equal(of.label_map(similarity, size, mode), expected.numpy())
    assert (of.label_map(torch.zeros(5, 3, 3), (9, 9)) == 0).all()


def test_the_interpolation_that_is_set_is_used(clip, image):
    params = {"segment_short_side": 128, "window": 128, "window_stride": 64}
    one, other = (of.Segmenter(DenseClip(clip), clip, SegmentParams(interpolation=m, **params)) for m in ("bilinear", "bicubic"))
    assert (one.segment(image, WORDS).similarity != other.segment(image, WORDS).similarity).any()


def test_similarity_of_one_window_is_the_direct_one(toy, image):
    segmenter = Segmenter.load(toy.path, params=SegmentParams(segment_short_side=128, window=160, window_stride=160))
    embedded, texts = segmenter.embed(image), segmenter.texts(words_space(WORDS))
    aligned, described = modules.load(toy.path)
    with torch.inference_mode():
        z = aligned(load_encoder(described["encoder"]).encode(torch.from_numpy(image)[None]))
        expected = torch.einsum("kd,bdhw->bkhw", texts.features, z)
        expected = F.interpolate(expected, (128, 160), mode="bilinear", align_corners=False)[0]
    assert len(embedded.windows) == 1
    torch.testing.assert_close(segmenter.similarity(embedded, texts), expected, atol=1e-5, rtol=1e-5)


def test_overlapping_windows_are_averaged(segmenter, image):
    embedded, texts = segmenter.embed(image), segmenter.texts(words_space(WORDS))
    assert [(w.top, w.left, w.height, w.width) for w in embedded.windows] == [(0, 0, 128, 128), (0, 32, 128, 128)]
    left, right = (
        F.interpolate(torch.einsum("kd,dhw->khw", texts.features, z)[None], (128, 128), mode="bilinear", align_corners=False)[0]
        for z in embedded.maps
    )
    made = segmenter.similarity(embedded, texts)
    torch.testing.assert_close(made[..., :32], left[..., :32], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made[..., 128:], right[..., 96:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made[..., 32:128], (left[..., 32:] + right[..., :96]) / 2, atol=1e-5, rtol=1e-5)


def test_windows_in_batches_are_the_same_windows(clip):
    image = np.random.RandomState(0).randint(0, 255, (128, 300, 3), dtype=np.uint8)
    sizes = []

    def embed(pixels):
        sizes.append(len(pixels))
        return pixels.permute(0, 3, 1, 2).float()

    made = {}
    for batch in (1, 2, 9):
        params = SegmentParams(segment_short_side=128, window=128, window_stride=64, window_batch=batch)
        made[batch] = of.Segmenter(DenseClip(clip), clip, params).through_windows(image, embed)
    assert sizes == [1, 1, 1, 1, 2, 2, 4]
    for batch in (2, 9):
        assert made[batch].windows == made[1].windows
        assert all(torch.equal(a, b) for a, b in zip(made[batch].maps, made[1].maps, strict=True))


@pytest.mark.parametrize("options", [{}, {"residual": True}, {"path": "plain"}])
def test_dense_clip_is_the_normalised_map_of_its_path(clip, image, options):
    square = images.resize(image, (100, 100))
    made = DenseClip(clip, **options).embed(torch.from_numpy(square)[None])
    direct = clip.encode_crops(torch.from_numpy(images.resize(square, (224, 224)))[None], **options).maps
    torch.testing.assert_close(made, F.normalize(direct, dim=1))


def test_a_file_that_is_no_module_is_refused(tmp_path):
    files.write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    with pytest.raises(DataError, match="not an alignment module"):
        Segmenter.load(tmp_path / "x.safetensors")


def test_the_default_is_the_embedded_profiles_own_module_else_the_one_of_the_repository(toy, own_home, image):
    assert modules.default("embedded") == modules.SHIPPED and modules.default("smoke") == modules.place("smoke")
    modules.place().parent.mkdir(parents=True)
    modules.place().write_bytes(toy.path.read_bytes())
    loaded = Segmenter.load()
    assert loaded.embedder.key == Segmenter.load(toy.path).embedder.key
    made = loaded.segment(str(toy.samples[0].image), WORDS)  # an image file
    np.testing.assert_array_equal(made.labels, loaded.segment(image, WORDS).labels)


@pytest.mark.parametrize("way", ["pil_bicubic", "cv2_bilinear"])
def test_the_image_is_scaled_by_the_filter_of_the_parameters(image, way):
    params = SegmentParams(segment_short_side=64, window=64, window_stride=64, resize=way)
    seen = []
    of.Segmenter(None, None, params).through_windows(image[:128, :128], lambda pixels: seen.append(pixels) or pixels.float())
    np.testing.assert_array_equal(seen[0][0].numpy(), images.resize(image[:128, :128], (64, 64), way))
