"""What an instance is: connected parts, or SAM's masks with what they leave over; always a partition of the class."""

import cv2
import numpy as np
import pytest
from conftest import EMBEDDED
from PIL import Image

from fmbseg import files
from fmbseg.data import fetch
from fmbseg.params import make
from fmbseg.schemas import SegmentRun
from fmbseg.tools import instances


def box(top, bottom, left, right, size=(60, 80)):
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def test_parts_are_the_components_that_opencv_finds():
    mask = np.random.default_rng(0).random((40, 50)) < 0.5
    found = list(instances.split(mask, "parts"))
    assert (sum(part.astype(int) for part in found) == mask).all()
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    assert len(found) == count - 1 and all(len(np.unique(labels[part])) == 1 for part in found)
    assert [part.sum() for part in instances.split(mask, "")] == [mask.sum()] and not list(instances.split(box(0, 0, 0, 0), "parts"))


def test_sams_masks_split_a_class_and_small_rests_join_them():
    mask = box(10, 50, 5, 75)
    left, right, part = box(10, 50, 5, 40), box(10, 50, 41, 74), box(20, 30, 10, 20)
    elsewhere, half = box(0, 20, 0, 80), box(30, 60, 50, 80)  # 0.44 and 0.0 of them lie in what the larger ones leave
    found = list(instances.split(mask, "sam", [part, right, elsewhere, left, half]))
    assert [one.sum() for one in found] == [40 * 35, 40 * 33, 40, 40]  # two masks, and the columns between and beside them
    assert (found[0] == left).all() and (found[1] == right).all()
    over = box(10, 50, 5, 40) | box(8, 10, 5, 40)  # 5% of it lies outside the class
    found = list(instances.split(mask | box(9, 10, 5, 7), "sam", [over]))
    assert (found[0] == (left | box(9, 10, 5, 7))).all() and len(found) == 2
    found = list(instances.split(mask | box(50, 52, 5, 7), "sam", [left]))  # 4 pixels that touch the first
    assert [one.sum() for one in found] == [40 * 35 + 4, 40 * 35]
    assert (sum(one.astype(int) for one in found) == (mask | box(50, 52, 5, 7))).all()


@pytest.mark.embedded
def test_sams_masks_tell_real_vases_apart_that_touch(label_params):
    """In the truth of an image, 13 vases touch; SAM's masks find more of them one by one than its connected parts do."""
    folder, name = fetch.require("coco_panoptic_20"), "000000434230"
    (described,) = [one for one in files.read_json(folder / "panoptic.json")["annotations"] if one["image_id"] == int(name)]
    ids = np.array(Image.open(folder / "masks" / f"{name}.png").convert("RGB")) @ (1, 256, 65536)
    vases = [ids == one["id"] for one in described["segments_info"] if one["category_id"] == 86 and not one["iscrowd"]]
    together = np.logical_or.reduce(vases)
    (image,) = folder.rglob(f"{name}.jpg")
    params = make(SegmentRun, {k: v for k, v in EMBEDDED.items() if k in SegmentRun.model_fields} | {"points_per_side": 6})
    regions = instances.sam_regions([image], params)[image]()
    found = {}
    for way in ("parts", "sam"):
        made = list(instances.split(together, way, regions))
        assert (sum(one.astype(int) for one in made) == together).all()
        found[way] = sum(max((one & vase).sum() / (one | vase).sum() for one in made) >= 0.5 for vase in vases)
    assert len(vases) == 13 and found == {"parts": 4, "sam": 8}
