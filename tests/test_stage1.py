"""Stage 1 of one image, in memory: features, detection, Stage 1.1, Stage 1.2, combination."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fmbseg.data import images, label_spaces
from fmbseg.data.images import IGNORED
from fmbseg.errors import ParameterError
from fmbseg.models import texts as texts_of
from fmbseg.models.clip import load_clip
from fmbseg.models.sam import AutomaticMask, load_sam
from fmbseg.models.texts import ClassTexts
from fmbseg.params import CombineParams, DetectParams, LabelParams
from fmbseg.stage1 import detection, features, label_masks, pseudo_labels, query_sam
from fmbseg.stage1.detection import Detected, Scale
from fmbseg.stage1.features import ImageFeatures
from fmbseg.stage1.label_masks import LabelledMask
from fmbseg.stage1.query_sam import QueryMask
from fmbseg.stage1.windows import Window


@pytest.fixture(scope="module")
def clip(label_params):
    return load_clip(label_params.clip, "cpu", label_params.crop_input)


@pytest.fixture(scope="module")
def extracted(real_image, clip, label_params):
    return features.extract(real_image, clip, label_params)


@pytest.fixture(scope="module")
def texts(clip):
    return texts_of.class_texts(clip, label_spaces.label_space("voc20"))


@pytest.fixture(scope="module")
def sam(label_params):
    return load_sam(label_params.sam)


def hand_made(size, maps, tokens=None):
    return ImageFeatures(size, maps, torch.zeros(1, len(maps)) if tokens is None else tokens, (Window(0, 0, *maps.shape[1:]),))


def unit_texts(classes, owner=None):
    owner = torch.arange(classes) if owner is None else torch.tensor(owner)
    return ClassTexts(torch.eye(len(owner)), owner, tuple("abcdefgh"[:classes]))


def block(size, top, left, height, width):
    mask = np.zeros(size, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


# ---------------------------------------------------------------- features


def test_positions_and_crops_lie_inside_the_image(extracted):
    height, width = extracted.size
    h, w = extracted.map.shape[1:]
    assert extracted.centre(0, 0) == pytest.approx((width / w / 2, height / h / 2))
    assert extracted.centre(h - 1, w - 1) == pytest.approx((width - width / w / 2, height - height / h / 2))
    boxes = [extracted.crop_box(c) for c in extracted.crops]
    assert min(b[0] for b in boxes) == min(b[1] for b in boxes) == 0
    assert max(b[0] + b[2] for b in boxes) == pytest.approx(width) and max(b[1] + b[3] for b in boxes) == pytest.approx(height)
    assert boxes[0][2:] == pytest.approx((8 * width / w, 8 * height / h))


def test_stitched_map_is_the_mean_of_the_crops(real_image, clip, label_params, extracted):
    h, w = extracted.map.shape[1:]
    scaled = images.resize(real_image, (h * 32, w * 32))
    total, count = torch.zeros(384, h, w), torch.zeros(h, w)
    corners = [(c.top, c.left) for c in extracted.crops]
    out = clip.encode_crops(torch.from_numpy(np.stack([scaled[32 * y : 32 * y + 256, 32 * x : 32 * x + 256] for y, x in corners])))
    torch.testing.assert_close(extracted.tokens, out.tokens, atol=1e-3, rtol=1e-3)
    for (y, x), one in zip(corners, out.maps):
        total[:, y : y + 8, x : x + 8] += one
        count[y : y + 8, x : x + 8] += 1
    assert count.min() == 1 and count.max() > 1
    torch.testing.assert_close(extracted.map, total / count, atol=1e-3, rtol=1e-3)


def test_one_crop_equals_the_direct_encoding(real_image, clip, label_params):
    square = real_image[:300, :300]
    params = label_params.model_copy(update={"short_side": 256})
    made = features.extract(square, clip, params)
    out = clip.encode_crops(torch.from_numpy(images.resize(square, (256, 256)))[None])
    assert made.crops == (Window(0, 0, 8, 8),) and made.size == (300, 300)
    torch.testing.assert_close(made.map, out.maps[0].half().float(), atol=1e-5, rtol=1e-3)  # rounded as they are kept
    torch.testing.assert_close(made.tokens, out.tokens.half().float(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("sizes", [{"crop_size": 250}, {"crop_stride": 100}, {"crop_size": 256, "crop_stride": 288}])
def test_crops_that_are_no_whole_positions_are_refused(real_image, clip, label_params, sizes):
    assert features.crop_grid(clip, label_params) == (32, 8, 4)
    with pytest.raises(ParameterError, match="crop|stride"):
        features.extract(real_image, clip, label_params.model_copy(update=sizes))


@pytest.mark.parametrize("turned", [False, True])
def test_long_thin_image_holds_whole_crops(real_image, clip, label_params, turned):
    strip = np.ascontiguousarray(real_image[:80, :400].swapaxes(0, 1) if turned else real_image[:80, :400])
    made = features.extract(strip, clip, label_params.model_copy(update={"long_limit": 512}))
    long = max(made.map.shape[1:])
    assert made.map.shape[1:] == ((long, 8) if turned else (8, long)) and 36 <= long <= 44 and made.size == strip.shape[:2]
    assert made.crops[-1] == (Window(long - 8, 0, 8, 8) if turned else Window(0, long - 8, 8, 8))


# ---------------------------------------------------------------- detection


def voting(votes):
    """Features of an image whose crops vote as listed."""
    return hand_made((8, 8), torch.ones(4, 2, 2), 3 * torch.eye(4)[votes] + 0.1)


@pytest.mark.parametrize(
    "values, found",
    [
        ({}, "abc"),
        ({"min_votes": 1}, "ab"),
        ({"min_votes": 2}, "a"),
        ({"min_votes": 3}, ""),
        ({"min_votes": 0}, "abcd"),
        ({"min_votes": 0, "min_vote_share": 1 / 6}, "ab"),
        ({"min_votes": 0, "min_vote_share": 0.16}, "abc"),
    ],
)
def test_votes_and_thresholds_are_exact(values, found):
    crops = [1, 0, 0, 1, 0, 2]
    everything = detection.detect(voting(crops), unit_texts(4), DetectParams(min_votes=0))
    assert everything == [Detected(0, "a", 3), Detected(1, "b", 2), Detected(2, "c", 1)]
    made = detection.detect(voting(crops), unit_texts(4), DetectParams(**({"min_votes": 0} | values)))
    assert "".join(d.name for d in made) == found.replace("d", "")


def test_equal_votes_keep_the_order_of_the_vocabulary():
    found = detection.detect(voting([3, 1, 1, 3, 0]), unit_texts(4), DetectParams(min_votes=0))
    assert [(d.name, d.votes) for d in found] == [("b", 2), ("d", 2), ("a", 1)]


def test_the_best_word_of_a_class_votes():
    assert detection.winners(voting([0, 1, 2, 3]), unit_texts(3, [0, 1, 1, 2])) == [0, 1, 1, 2]


def test_a_word_that_hardly_varies_wins_votes_on_its_own_scale():
    two = ClassTexts(torch.eye(3)[:2], torch.arange(2), ("a", "b"))
    reference = torch.tensor([[0.7, 0.3, 0.8], [-0.5, 0.3, 0.8], [0.7, 0.1, 0.8], [-0.5, 0.1, 0.8]])
    similar = (reference / reference.norm(dim=1, keepdim=True))[:, :2]
    scale = detection.Scale.of(reference, two)
    torch.testing.assert_close(scale.mean, similar.mean(dim=0))
    torch.testing.assert_close(scale.spread, similar.std(dim=0, correction=0))
    crops = hand_made((8, 8), torch.ones(3, 2, 2), torch.tensor([[0.35, 0.3, 0.8], [0.35, 0.15, 0.8]]))
    assert detection.winners(crops, two) == [0, 0] and detection.winners(crops, two, scale) == [1, 0]
    assert detection.detect(crops, two, DetectParams(min_votes=0), scale) == [Detected(0, "a", 1), Detected(1, "b", 1)]
    constant = hand_made((8, 8), torch.ones(3, 2, 2), torch.tensor([[0.1, 0.2, 0.8]]))
    assert detection.winners(constant, two, detection.Scale.of(constant.tokens, two)) == [0]  # no spread at all: no error


def test_given_labels_replace_detection():
    assert detection.given([2, 0], unit_texts(3)) == [Detected(2, "c", 0), Detected(0, "a", 0)]


# ---------------------------------------------------------------- Stage 1.1


def test_query_points_are_centres_as_x_y_best_first():
    similarity = torch.zeros(2, 5)
    similarity[1, 3], similarity[0, 4], similarity[1, 0] = 3, 2, 1
    points = query_sam.query_points(similarity, hand_made((20, 100), torch.zeros(1, 2, 5)), 3)
    assert points.tolist() == [[70, 15], [90, 5], [10, 15]] and points.dtype == np.float32
    assert len(query_sam.query_points(similarity, hand_made((20, 100), torch.zeros(1, 2, 5)), 50)) == 10


def test_class_similarity_is_the_cosine_at_each_position():
    maps = torch.zeros(3, 2, 4)
    maps[0], maps[1, 1, 2] = 2, 2
    made = query_sam.class_similarity(hand_made((4, 8), maps), unit_texts(3))
    assert made.shape == (3, 2, 4)
    assert made[:, 0, 0].tolist() == [1, 0, 0] and made[:, 1, 2].tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 0])


def test_query_masks_choose_the_most_confident(real_image, extracted, texts, sam, label_params):
    wanted = detection.given(list(range(0, 20, 3)), texts)
    found = query_sam.query_masks(real_image, extracted, wanted, texts, sam, label_params)
    assert [q.detected for q in found] == wanted
    for query in found:
        masks, scores = sam.predict(query.points)
        assert query.points.shape == (5, 2) and query.masks.shape == (3, *real_image.shape[:2])
        np.testing.assert_array_equal(query.scores, scores)
        np.testing.assert_array_equal(query.chosen, masks[list(scores).index(max(scores))])
    assert len({int(q.scores.argmax()) for q in found}) > 1  # or the first would do
    similarity = query_sam.class_similarity(extracted, texts)[wanted[1].index]
    np.testing.assert_array_equal(found[1].points, query_sam.query_points(similarity, extracted, 5))


def test_separate_points_join_their_masks(real_image, extracted, texts, sam, label_params):
    params = label_params.model_copy(update={"separate_points": True, "points": 3})
    (found,) = query_sam.query_masks(real_image, extracted, detection.given([6], texts), texts, sam, params)
    union = np.zeros(real_image.shape[:2], dtype=bool)
    for point in found.points:
        masks, scores = sam.predict(point[None])
        union |= masks[scores.argmax()]
    np.testing.assert_array_equal(found.chosen, union)
    assert query_sam.query_masks(real_image, extracted, [], texts, sam, params) == []


# ---------------------------------------------------------------- Stage 1.2


def test_automatic_masks_drop_the_small_ones(real_image, sam, label_params):
    size = real_image.shape[0] * real_image.shape[1]
    loose = label_params.model_copy(update={"min_area": 0.0, "predicted_iou": 0.5, "stability": 0.5})
    everything = label_masks.automatic_masks(real_image, sam, loose)
    areas = sorted(int(m.mask.sum()) for m in everything)
    assert len(areas) > 2 and everything[0].mask.shape == real_image.shape[:2]
    limit = areas[len(areas) // 2]
    kept = label_masks.automatic_masks(real_image, sam, loose.model_copy(update={"min_area": limit / size}))
    assert sorted(m.area for m in kept) == [a for a in areas if a >= limit] != areas
    assert min(m.predicted_iou for m in everything) >= 0.5


def test_mean_feature_of_one_cell_is_its_feature():
    maps = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    made = label_masks.mean_features([block((8, 12), 4, 8, 4, 4), block((8, 12), 0, 4, 4, 4)], hand_made((8, 12), maps))
    torch.testing.assert_close(made, F.normalize(torch.stack([maps[:, 1, 2], maps[:, 0, 1]]), dim=1))


def test_mean_feature_weighs_a_position_by_its_share():
    maps = torch.zeros(2, 1, 2)
    maps[0, 0, 0], maps[1, 0, 1] = 1, 1
    made = label_masks.mean_features([block((4, 8), 0, 0, 4, 6)], hand_made((4, 8), maps))  # all of the left, half of the right
    torch.testing.assert_close(made, F.normalize(torch.tensor([[1.0, 0.5]]), dim=1))


def test_mean_feature_is_of_the_features_as_they_are_not_of_unit_vectors():
    """The mean of (3, 0) and (0, 1) points to (3, 1); unit vectors would point to (1, 1), and to another class."""
    maps = torch.zeros(2, 1, 2)
    maps[0, 0, 0], maps[1, 0, 1] = 3, 1
    whole = np.ones((4, 8), dtype=bool)
    made = label_masks.mean_features([whole], hand_made((4, 8), maps))
    torch.testing.assert_close(made, torch.tensor([[3.0, 1.0]]) / 10**0.5)
    texts = ClassTexts(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.arange(2), ("a", "b"))
    (found,) = label_masks.label_masks([whole], hand_made((4, 8), maps), detection.given([0, 1], texts), texts)
    assert found.detected.name == "a" and found.similarity == pytest.approx(3 / 10**0.5)


def test_masks_take_the_nearest_detected_class():
    maps = torch.zeros(3, 1, 2)
    maps[:, 0, 0], maps[:, 0, 1] = torch.tensor([4.0, 1, 2]), torch.tensor([0.0, 5, 1])
    masks = [block((2, 4), 0, 0, 2, 2), block((2, 4), 0, 2, 2, 2)]
    found = [Detected(1, "b", 3), Detected(2, "c", 1)]
    left, right = label_masks.label_masks(masks, hand_made((2, 4), maps), found, unit_texts(3))
    assert left.detected.name == "c" and left.similarity == pytest.approx(2 / 21**0.5)
    assert right.detected.name == "b" and right.similarity == pytest.approx(5 / 26**0.5)
    assert left.margin == pytest.approx((2 - 4) / 21**0.5) and right.margin == pytest.approx((5 - 1) / 26**0.5)  # over all classes
    scale = Scale(torch.tensor([0.5, 0.1, 0.0]), torch.tensor([0.5, 1.0, 0.1]))
    (scaled,) = label_masks.label_masks(masks[:1], hand_made((2, 4), maps), found, unit_texts(3), scale)
    values = [(4 / 21**0.5 - 0.5) / 0.5, (1 / 21**0.5 - 0.1) / 1.0, 2 / 21**0.5 / 0.1]
    assert scaled.detected.name == "c" and scaled.margin == pytest.approx(values[2] - values[0], rel=1e-5)
    np.testing.assert_array_equal(right.mask, masks[1])
    assert label_masks.label_masks([], hand_made((2, 4), maps), found, unit_texts(3)) == []
    assert label_masks.label_masks(masks, hand_made((2, 4), maps), [], unit_texts(3)) == []


# ---------------------------------------------------------------- combination

SIZE = (4, 6)


def labelled(index, similarity, *rectangle):
    return LabelledMask(block(SIZE, *rectangle), Detected(index, "abc"[index], 1), similarity, 0.0)


def test_small_masks_are_painted_last():
    large, small = labelled(0, 0.9, 0, 0, 4, 4), labelled(1, 0.1, 1, 1, 2, 2)
    for order in ([large, small], [small, large]):
        labels, similarity = pseudo_labels.paint(order, SIZE)
        assert labels[1:3, 1:3].tolist() == [[1, 1], [1, 1]] and labels[0].tolist() == [0, 0, 0, 0, -1, -1]
        assert similarity[1, 1] == np.float32(0.1) and similarity[0, 0] == np.float32(0.9) and similarity[0, 5] == -np.inf


@pytest.mark.parametrize(
    "params, row",
    [
        ({}, [0, 2, 1, 1, 1, -1]),
        ({"overlap": "query"}, [0, 0, 0, 1, 1, -1]),
        ({"overlap": "agree"}, [0, -1, -1, 1, 1, -1]),
        ({"stages": "1.1"}, [0, 0, 0, 1, -1, -1]),
        ({"stages": "1.2"}, [-1, 2, 1, 1, 1, -1]),
    ],
)
def test_combination_of_both_stages(params, row):
    query = [labelled(0, 0.5, 0, 0, 4, 3), labelled(1, 0.2, 0, 3, 4, 1)]
    automatic = [labelled(2, 0.7, 0, 1, 4, 1), labelled(1, 0.9, 0, 2, 4, 3)]
    made = pseudo_labels.combine(query, automatic, SIZE, CombineParams(**params))
    assert made.dtype == np.int16 and made.tolist() == [row] * 4


def test_the_more_similar_class_wins_either_way():
    query, automatic = [labelled(0, 0.5, 0, 0, 4, 6)], [labelled(1, 0.4, 0, 0, 4, 3)]
    assert (pseudo_labels.combine(query, automatic, SIZE, CombineParams()) == 0).all()
    assert (pseudo_labels.combine(automatic, query, SIZE, CombineParams()) == 0).all()
    assert (pseudo_labels.combine([], [], SIZE, CombineParams()) == IGNORED).all()


def test_a_margin_in_the_unit_of_votes_that_are_not_standardised_drops_nothing():
    params = LabelParams(min_margin=0.2, reference_images=40)
    assert pseudo_labels.least_margin(params, None) is None
    assert pseudo_labels.least_margin(params, Scale(torch.zeros(3), torch.ones(3))) == 0.2
    assert pseudo_labels.least_margin(params.model_copy(update={"reference_images": 0}), None) == 0.2  # cosine


@pytest.mark.parametrize(
    "least, row", [(None, [1, 1, 1, 1, 1, 1]), (0.0, [1, 1, 1, 1, -1, -1]), (0.5, [1, 1, -1, -1, -1, -1]), (1.0, [-1] * 6)]
)
def test_assemble_labels_both_stages_and_drops_small_margins(least, row):
    """Margins: Stage 1.1's mask 1; the left automatic one (2 - 1) / 5**0.5 = 0.447; the right one is nearer to a class not detected."""
    maps = torch.zeros(3, 1, 3)
    maps[1, 0, 0], maps[:, 0, 1], maps[:, 0, 2] = 1, torch.tensor([1.0, 2, 0]), torch.tensor([9.0, 1, 0])
    query = QueryMask(Detected(1, "b", 2), np.zeros((5, 2)), np.zeros((3, *SIZE), bool), np.zeros(3), block(SIZE, 0, 0, 4, 2))
    automatic = [AutomaticMask(block(SIZE, 0, left, 4, 2), 1.0, 1.0, (0, 0)) for left in (2, 4)]
    made = pseudo_labels.assemble([query], automatic, hand_made(SIZE, maps), unit_texts(3), LabelParams(min_margin=least))
    assert made.labels[0].tolist() == row and made.detected == [query.detected]
    if least is None:
        assert [m.margin for m in made.automatic_masks] == pytest.approx([1 / 5**0.5, -8 / 82**0.5])
        assert made.query_masks[0].similarity == pytest.approx(1)
