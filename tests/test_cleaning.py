"""Cleaning of pseudo labels against a slow transcription of its rule."""

import pytest
import torch

from fmbseg.params import CleanParams
from fmbseg.stage2 import cleaning

A, B = torch.tensor([5.0, 1, 0]), torch.tensor([1.0, 5, 0])  # two classes' directions, beside a part that all have


def images(*classes, noise=0.0):
    """(width, 2, 3) patches of one class an image, seeded noise added, with a first row of patches of neither."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for direction in classes:
        patches = 9 + noise * torch.randn(3, 2, 3, generator=generator)
        patches[:, 1] += direction[:, None]
        made.append(patches)
    return made


def labelled(*classes):
    return [torch.tensor([[-1, -1, -1], [k, k, k]], dtype=torch.int16) for k in classes]


def slowly(classes, means, margin):
    """Which regions are doubtful, and their nearest class, one by one."""
    unit = lambda v: v / v.norm()  # noqa: E731
    f = [unit(m - means.mean(dim=0)) for m in means]
    new = []
    for r, k in enumerate(classes):
        near = {}
        for j in set(classes):
            if sum(c == j for c in classes) >= cleaning.LEAST:
                near[j] = float(f[r] @ unit(sum(f[s] for s in range(len(f)) if classes[s] == j and s != r)))
        best = max(near, key=near.get) if near else k
        new.append(best if k in near and near[best] - near[k] > margin else k)
    return new


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_classes_are_those_of_the_slow_transcription(margin):
    generator = torch.Generator().manual_seed(1)
    classes, means = torch.randint(0, 6, (40,), generator=generator), torch.randn(40, 8, generator=generator) + 3
    classes[-2:] = torch.tensor([8, 9])  # classes of one image each
    expected = slowly(classes.tolist(), means, margin)
    assert cleaning.reassign(classes, means, CleanParams(clean="relabel", clean_margin=margin)).tolist() == expected
    dropped = cleaning.reassign(classes, means, CleanParams(clean="drop", clean_margin=margin)).tolist()
    assert dropped == [k if k == new else -1 for k, new in zip(classes.tolist(), expected)]
    assert 3 < dropped.count(-1) < 38 and dropped[-2:] == [8, 9]


@pytest.mark.parametrize("way, wrong", [("drop", -1), ("relabel", 1)])
def test_one_wrong_mask_among_right_ones_is_found_and_nothing_else_changes(way, wrong):
    patches, labels = images(A, A, A, A, B, B, B, B, noise=0.2), labelled(0, 0, 0, 1, 1, 1, 1, 0)
    made = cleaning.clean_labels(iter(patches), labels, CleanParams(clean=way))
    assert [label[1, 0].item() for label in made] == [0, 0, 0, -1 if way == "drop" else 0, 1, 1, 1, wrong]
    assert all((label[0] == -1).all() and label.dtype == torch.int16 for label in made)
    assert [label[1, 0].item() for label in labels] == [0, 0, 0, 1, 1, 1, 1, 0]  # the input stays


def test_the_order_of_images_does_not_matter_and_a_constant_collection_stays():
    patches, labels = images(A, A, A, A, B, B, B, B, noise=2.0), labelled(0, 0, 0, 1, 1, 1, 1, 0)
    params, order = CleanParams(clean="relabel"), [5, 2, 7, 0, 1, 6, 3, 4]
    one = cleaning.clean_labels(patches, labels, params)
    other = cleaning.clean_labels([patches[i] for i in order], [labels[i] for i in order], params)
    assert all(torch.equal(one[i], made) for i, made in zip(order, other))
    flat = cleaning.clean_labels([torch.ones(3, 2, 3)] * 8, labels, params)
    assert all(torch.equal(a, b) for a, b in zip(flat, labels))


def test_an_image_without_a_label_stays_without():
    patches, labels = images(A, A, A, A), [*labelled(0, 0, 0), torch.full((2, 3), -1, dtype=torch.int16)]
    assert (cleaning.clean_labels(patches, labels, CleanParams(clean="drop"))[-1] == -1).all()
    assert (cleaning.clean_labels(patches, labels[-1:] * 4, CleanParams(clean="drop"))[0] == -1).all()
