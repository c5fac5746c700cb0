"""Fixtures: the embedded weights and photographs, fetched by ``make test`` (or ``fmbseg fetch``) before."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

from fmbseg import datasets, images, weights
from fmbseg.params import LabelParams, make

EMBEDDED = {
    "clip": "lit-efficientnet-lite2-minilm", "sam": "mobile_sam", "crop_size": 256, "crop_stride": 128, "crop_input": 256,
    "points_per_side": 3, "points_per_batch": 2, "vocabulary": "voc21",
}


def pytest_configure():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def sample():
    """A real photograph with panoptic truth."""
    weights.require("coco_panoptic_20")
    return datasets.load_benchmark("embedded_coco_object81").samples[0]


@pytest.fixture(scope="session")
def photograph(sample):
    return images.read_image(sample.image)


@pytest.fixture(scope="session")
def label_params():
    return make(LabelParams, EMBEDDED)
