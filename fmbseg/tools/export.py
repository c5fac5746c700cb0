"""Pseudo labels in COCO's annotation format, which annotation tools and pycocotools read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmbseg import files
from fmbseg.data.images import IGNORED
from fmbseg.data.samples import Sample
from fmbseg.runs import records
from fmbseg.runs.cache import encode_rle
from fmbseg.runs.label import LabelStore


def annotations(labels: np.ndarray, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """One annotation for every class of a (height, width) label map: run-length encoded mask, area in pixels, and box.

    category_id is the class index plus one (COCO counts from one); bbox is (x, y, width, height); IGNORED has no annotation.
    """
    found = []
    for k in np.unique(labels[labels != IGNORED]).tolist():
        mask = labels == k
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        found.append(
            {
                "id": first_id + len(found),
                "image_id": image_id,
                "category_id": k + 1,
                "segmentation": encode_rle(mask),
                "area": int(mask.sum()),
                "bbox": [int(value) for value in box],
                "iscrowd": 0,
            }
        )
    return found


def write_coco(samples: Sequence[Sample], store: LabelStore, path: str | Path) -> int:
    """Write the pseudo labels of the images that have one as a COCO file; returns how many images it holds.

    file_name is relative to the folder that all images share.
    """
    samples = [sample for sample in samples if store.has(sample)]
    root = os.path.commonpath([sample.image.absolute().parent for sample in samples]) if samples else ""
    pictures: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for number, sample in enumerate(samples, 1):
        labels = store.read(sample)
        name = os.path.relpath(sample.image.absolute(), root)
        pictures.append({"id": number, "file_name": name, "height": labels.shape[0], "width": labels.shape[1]})
        found += annotations(labels, number, len(found) + 1)
    classes = [{"id": k + 1, "name": name, "supercategory": ""} for k, name in enumerate(store.space.names)]
    about = {"description": "pseudo labels by fmbseg, not checked by anybody", "version": records.revision()}
    files.write_json(path, {"info": about, "licenses": [], "images": pictures, "annotations": found, "categories": classes})
    return len(pictures)
