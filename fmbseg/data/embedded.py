"""Benchmarks that need no download by hand: the embedded images with truth, and drawn images for smoke runs."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image

from fmbseg import files
from fmbseg.data import fetch, label_spaces
from fmbseg.data.images import IGNORED
from fmbseg.data.label_spaces import LabelSpace, label_space
from fmbseg.data.samples import Dataset, Outline, Sample, read_instances, read_panoptic

EMBEDDED = ("embedded_coco_object80", "embedded_coco_object81", "embedded_coco_panoptic133")


def _embedded_panoptic(space: LabelSpace) -> list[Sample]:
    """The 20 images with full panoptic truth, as 133 classes, or as things with or without background."""
    folder = fetch.require("coco_panoptic_20")
    described = files.read_json(folder / "panoptic.json")
    ids = label_spaces.assets()["id_maps"]["coco_panoptic133_ids"]
    things = label_spaces.assets()["id_maps"]["coco_object81_ids"]
    names = {image["id"]: image["file_name"] for image in described["images"]}
    samples = []
    for annotation in sorted(described["annotations"], key=lambda a: a["image_id"]):
        segments = []
        for segment in annotation["segments_info"]:
            category = segment["category_id"]
            if segment["iscrowd"]:
                continue
            if space.name == "coco_panoptic133":
                segments.append((segment["id"], ids.index(category)))
            elif str(category) in things:
                segments.append((segment["id"], things[str(category)] - (not space.background)))
            elif space.background:
                segments.append((segment["id"], 0))
        path = folder / "images" / Path(names[annotation["image_id"]]).name
        mask = folder / "masks" / Path(annotation["file_name"]).name
        samples.append(Sample(path.stem, path, functools.partial(read_panoptic, mask, tuple(segments))))
    return samples


def _embedded_instances(space: LabelSpace) -> list[Sample]:
    """The 10 images with instance outlines; what has no outline is background."""
    folder = fetch.require("coco_instances_10")
    described = files.read_json(folder / "instances_val2017_subset.json")
    things = label_spaces.assets()["id_maps"]["coco_object81_ids"]
    samples = []
    for image in sorted(described["images"], key=lambda i: i["id"]):
        path = folder / "images" / image["file_name"]
        if not path.is_file():
            continue
        outlines = tuple(
            Outline(things[str(a["category_id"])] - (not space.background), a["segmentation"], a["area"], bool(a["iscrowd"]))
            for a in described["annotations"]
            if a["image_id"] == image["id"]
        )
        read = functools.partial(read_instances, (image["height"], image["width"]), outlines, 0 if space.background else IGNORED)
        samples.append(Sample(path.stem, path, read))
    return samples


def load(name: str) -> Dataset:
    """One of EMBEDDED. Raises WeightsError, with the command that brings them, when the images are not here."""
    space = label_space(name.removeprefix("embedded_"))
    samples = _embedded_panoptic(space)
    source = "20 COCO val2017 images with panoptic truth (embedded subset)"
    if space.name != "coco_panoptic133":
        samples += _embedded_instances(space)
        source = "30 COCO val2017 images (embedded subset: 20 panoptic, 10 instances)"
    return Dataset(name, space, tuple(samples), source)


def drawn() -> Dataset:
    """Six drawn images with their truth, made on the spot: for smoke runs, where nothing is fetched."""
    folder = files.home() / "drawn"
    space = label_spaces.own_words(["sky", "grass", "sun", "house"], "drawn")
    samples = []
    for i in range(6):
        width, height = 160 + 16 * i, 128
        truth = np.zeros((height, width), dtype=np.int16)
        truth[80:] = 1
        rows, columns = np.mgrid[:height, :width]
        truth[(rows - 30) ** 2 + (columns - 30 - 15 * i) ** 2 < 300] = 2
        truth[50:100, width - 60 : width - 20] = 3
        colours = np.array([[120, 180, 240], [60, 150, 60], [250, 220, 60], [170, 80, 60]])
        noise = np.random.RandomState(i).randint(-25, 25, (height, width, 3))
        path = folder / f"drawn_{i}.png"
        if not path.is_file():
            with files.atomic_path(path) as part:
                Image.fromarray(np.clip(colours[truth] + noise, 0, 255).astype(np.uint8)).save(part, format="PNG")
        samples.append(Sample(path.stem, path, functools.partial(np.copy, truth)))
    return Dataset("drawn", space, tuple(samples), "6 drawn images (smoke run)")
