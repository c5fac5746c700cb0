import math

import numpy as np
import pytest
import torch

from fmbseg.errors import DataError
from fmbseg.stage2.metrics import Confusion


def counted(classes, *pairs):
    confusion = Confusion(classes)
    for truth, prediction in pairs:
        confusion.add(np.array(truth, dtype=np.int16), np.array(prediction, dtype=np.int16))
    return confusion


def image_pairs(classes, count=3, seed=0):
    random = np.random.default_rng(seed)
    pairs = []
    for height, width in random.integers(20, 40, (count, 2)):
        truth = random.integers(0, classes, (height, width))
        prediction = np.where(random.random(truth.shape) < 0.5, truth, random.integers(0, classes, truth.shape))
        truth[random.random(truth.shape) < 0.1] = -1
        pairs.append((truth, prediction))
    return pairs


@pytest.mark.parametrize("classes", [2, 5, 21, 300])
def test_miou_equals_torchmetrics(classes):
    from torchmetrics.classification import MulticlassJaccardIndex  # needs torchvision, so after fmbseg

    pairs = image_pairs(classes)
    reference = MulticlassJaccardIndex(num_classes=classes, ignore_index=-1, average="macro")
    per_class = MulticlassJaccardIndex(num_classes=classes, ignore_index=-1, average="none")
    for truth, prediction in pairs:
        reference.update(torch.from_numpy(prediction), torch.from_numpy(truth))
        per_class.update(torch.from_numpy(prediction), torch.from_numpy(truth))
    confusion = counted(classes, *pairs)
    assert confusion.miou() == pytest.approx(100 * reference.compute().item(), rel=1e-5)
    np.testing.assert_allclose(confusion.iou(), per_class.compute().numpy(), rtol=1e-5)


def test_absent_class_is_nan_and_left_out_of_the_mean():
    confusion = counted(3, ([[0, 0], [1, 1]], [[0, 1], [1, 1]]))
    np.testing.assert_allclose(confusion.iou(), [1 / 2, 2 / 3, np.nan])
    assert confusion.miou() == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)


def test_class_only_predicted_scores_zero():
    confusion = counted(3, ([[0, 0], [1, 1]], [[0, 2], [1, 1]]))
    np.testing.assert_allclose(confusion.iou(), [1 / 2, 1, 0])


def test_ignored_truth_counts_for_nothing():
    assert (counted(2, ([[-1, 0]], [[1, 0]])).counts == counted(2, ([[0]], [[0]])).counts).all()


def test_unlabelled_prediction_is_a_miss_and_no_false_alarm():
    confusion = counted(2, ([[0, 0, 0, 1]], [[0, -1, -1, 1]]))
    np.testing.assert_allclose(confusion.iou(), [1 / 3, 1])


def test_precision_and_coverage():
    confusion = counted(2, ([[0, 0, 0, 1, 1, -1, -1, 1]], [[0, -1, 1, 1, -1, 0, -1, 1]]))
    assert confusion.precision() == pytest.approx(100 * 3 / 4)
    assert confusion.coverage() == pytest.approx(100 * 4 / 6)


def test_nothing_counted_is_nan():
    for confusion in (Confusion(3), counted(3, ([[-1]], [[0]]))):
        assert math.isnan(confusion.miou()) and math.isnan(confusion.precision()) and math.isnan(confusion.coverage())
    assert math.isnan(counted(2, ([[0]], [[-1]])).precision())


def test_other_size_is_refused():
    with pytest.raises(DataError, match=r"\(2, 3\).*\(3, 2\)"):
        Confusion(2).add(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8))


@pytest.mark.parametrize("truth, prediction, name", [(3, 0, "truth"), (0, 4, "prediction"), (7, 9, "truth")])
def test_index_that_is_no_class_is_refused(truth, prediction, name):
    with pytest.raises(DataError, match=f"the {name} holds index .*3 classes"):
        counted(3, ([[truth]], [[prediction]]))


@pytest.mark.parametrize("truth, prediction", [([0, 1], [0, -2]), ([-2, 1], [0, 1]), ([0, 300], [0, 1]), ([0, 1], [255, 1])])
def test_an_index_past_either_end_is_refused(truth, prediction):
    with pytest.raises(DataError):
        Confusion(3).add(np.array([truth]), np.array([prediction]))
