"""Label maps in the formats that annotation tools and trainers open: COCO, YOLO-seg, VOC (CVAT's "Segmentation mask 1.1"), Label Studio.

The class "background" and unlabelled pixels are no objects: COCO, YOLO and Label Studio leave them out, in VOC they are black.
"""

from __future__ import annotations

import os
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from contourpy import FillType, contour_generator
from pycocotools import mask as rle

from fmbseg import files
from fmbseg.data import images, label_spaces
from fmbseg.data.images import IGNORED
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.data.samples import Sample
from fmbseg.errors import ParameterError
from fmbseg.runs import records
from fmbseg.runs.cache import encode_rle
from fmbseg.runs.label import LabelStore


@dataclass(frozen=True)
class Labelled:
    """An image and its label map.

    name: unique among the images, without folders; read: returns (height, width) class indices, IGNORED where unlabelled;
    scores: how certain each class is, a mean margin, where that is known.
    """

    name: str
    image: Path
    read: Callable[[], np.ndarray]
    scores: Mapping[int, float] = field(default_factory=dict)

    def masks(self, space: LabelSpace) -> tuple[tuple[int, int], dict[int, np.ndarray]]:
        """(height, width) and the bool mask of each class that occurs, but for the background."""
        labels = self.read()
        return labels.shape, {k: labels == k for k in np.unique(labels).tolist() if int(space.background) <= k < len(space)}


def of_store(samples: Sequence[Sample], store: LabelStore) -> list[Labelled]:
    """The images that have a pseudo label in a store."""
    return [Labelled(s.name, s.image, lambda s=s: store.read(s)) for s in samples if store.has(s)]


def outlines(mask: np.ndarray, level: float = 0.5) -> list[np.ndarray]:
    """The parts of a (height, width) bool mask, one closed polygon of (x, y) vertices each; pixel centres have whole numbers.

    Holes are joined to their outline by a line that is passed twice. level: how far from the pixels outside to those inside the
    outline runs. Painted by the rule of pixel centres, as pycocotools does, the polygons give back the mask.
    """
    padded = np.pad(mask, 1)
    found = []
    for points, offsets in zip(*contour_generator(z=padded.astype(np.float64), fill_type=FillType.OuterOffset).filled(level, 2)):
        outer, *holes = (points[start : end - 1] for start, end in zip(offsets, offsets[1:]))
        hooks: dict[tuple[float, float], list] = {}  # vertex -> what is joined to it

        def joined(ring: np.ndarray, hooks=hooks) -> list:
            path = []
            for vertex in ring.tolist():
                path.append(vertex)
                for hole in hooks.pop(_key(vertex), ()):
                    path += [*hole, hole[0], vertex]
            return path

        rings = [np.roll(hole, -hole[:, 1].argmin(), axis=0) for hole in holes]
        for ring in sorted(rings, key=lambda ring: -ring[0, 1]):  # what is joined to a hole lies below its top
            column, row = round(ring[0, 0]), int(ring[0, 1])
            above = np.flatnonzero(~padded[:row, column])[-1]  # straight up through the mask to the next outline
            hooks.setdefault(_key((column, above + level)), []).append(joined(ring))
        found.append(np.array(joined(outer)) - 1)
    return found


def _key(vertex: Sequence[float]) -> tuple[float, float]:
    return round(vertex[0], 4), round(vertex[1], 4)


def _simple(path: np.ndarray) -> np.ndarray:
    """A closed path less repeated vertices and those between two others on a straight line; at least three vertices."""
    path = path[(path != np.roll(path, 1, axis=0)).any(axis=1)] if len(path) > 1 and np.ptp(path, axis=0).any() else path[:1]
    before, after = path - np.roll(path, 1, axis=0), np.roll(path, -1, axis=0) - path
    straight = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0] == 0
    kept = path[~straight | ((before * after).sum(axis=1) <= 0)]
    return kept[np.arange(max(len(kept), 3)) % len(kept)]


def coco(items: Sequence[Labelled], space: LabelSpace, path: str | Path, polygons: bool = False, instances: bool = False) -> dict[str, Any]:
    """Write label maps as a COCO file; returns what is in it.

    One annotation a class and image, or (``instances``) one a connected part; run-length encoded, or polygons. category_id is the
    class index plus one (COCO counts from one); bbox is (x, y, width, height); file_name is relative to the folder that all images
    share; words: a class's prompt words; score: its mean margin, where that is known.
    """
    root, pictures, found = _root(items), [], []
    for number, item in enumerate(items, 1):
        (height, width), masks = item.masks(space)
        pictures.append({"id": number, "file_name": os.path.relpath(item.image.absolute(), root), "height": height, "width": width})
        for k, mask in masks.items():
            parts: list[Any] = [encode_rle(mask)]
            if polygons or instances:
                rings = [[_simple(ring + 0.5).ravel().tolist()] for ring in outlines(mask)]
                parts = rings if instances else [[ring for (ring,) in rings]]
            for part in parts:
                coded = rle.merge(rle.frPyObjects(part, height, width)) if isinstance(part, list) else part
                shown = part if polygons else {"size": [height, width], "counts": _text(coded["counts"])}
                one = {"id": len(found) + 1, "image_id": number, "category_id": k + 1, "segmentation": shown}
                one |= {"area": int(rle.area(coded)), "bbox": [int(v) for v in rle.toBbox(coded)], "iscrowd": 0}
                found.append(one | ({"score": item.scores[k]} if k in item.scores else {}))
    classes = [
        {"id": k + 1, "name": name, "supercategory": "", "words": list(words)}
        for k, (name, words) in enumerate(zip(space.names, space.prompts))
    ]
    about = {"description": "labels by fmbseg, not checked by anybody", "version": records.revision()}
    made = {"info": about, "licenses": [], "images": pictures, "annotations": found, "categories": classes}
    files.write_json(path, made)
    return made


def _text(counts: str | bytes) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def yolo(items: Sequence[Labelled], space: LabelSpace, folder: Path) -> None:
    """Write a YOLO-seg folder: data.yaml, copies of the images in images/, and in labels/ a text file each.

    A line is a connected part: class and polygon in shares of width and height. Vertices lie a quarter of a pixel inside the
    pixels of the outline: readers that round, those that cut off, and OpenCV's ``fillPoly`` meet the same pixels.
    """
    first = int(space.background)
    for item in items:
        (height, width), masks = item.masks(space)
        lines = []
        for k, mask in masks.items():
            for ring in outlines(mask, level=0.999):
                shares = (_simple(np.floor(ring + 0.25)) + 0.25) / (width, height)
                lines.append(" ".join([str(k - first), *(f"{value:.7f}" for value in shares.ravel())]))
        with files.atomic_path(folder / "labels" / f"{item.name}.txt") as part:
            part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        with files.atomic_path(folder / "images" / f"{item.name}{item.image.suffix.lower()}") as part:
            shutil.copyfile(item.image, part)
    with files.atomic_path(folder / "data.yaml") as part:
        described = {"train": "images", "val": "images", "names": dict(enumerate(space.names[first:]))}
        part.write_text(yaml.safe_dump(described, allow_unicode=True, sort_keys=False), encoding="utf-8")


def voc(items: Sequence[Labelled], space: LabelSpace, folder: Path) -> None:
    """Write a VOC folder, which CVAT imports as "Segmentation mask 1.1" (zip it): labelmap.txt, SegmentationClass, ImageSets.

    The palette PNGs hold the number of the class's line in labelmap.txt, and show its colour; 0, black, is the background, and
    all that is unlabelled. Raises ParameterError for a class whose name has a colon, which ends names in labelmap.txt, and for more
    classes than 8 bits hold.
    """
    names = space.names[int(space.background) :]
    if bad := [name for name in names if ":" in name]:
        raise ParameterError(f"{bad[0]}: names with a colon cannot be written to VOC's labelmap.txt; name that class otherwise")
    if len(names) > 254:
        raise ParameterError(f"--format voc: {len(names)} classes, and its palette holds 254; give fewer classes, or another format")
    colours = np.concatenate([np.zeros((1, 3), np.uint8), label_spaces.palette(len(names))])
    for item in items:
        labels = item.read()
        shown = np.where(labels == IGNORED, 0, labels + (not space.background)).astype(labels.dtype)
        images.write_label_map(folder / "SegmentationClass" / f"{item.name}.png", shown, colours)
    lines = [f"{name}:{','.join(map(str, colour))}::" for name, colour in zip(("background", *names), colours.tolist())]
    for path, text in (
        ("labelmap.txt", ["# label:color_rgb:parts:actions", *lines]),
        ("ImageSets/Segmentation/default.txt", [item.name for item in items]),
    ):
        with files.atomic_path(folder / path) as part:
            part.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")


def label_studio(items: Sequence[Labelled], space: LabelSpace, folder: Path) -> None:
    """Write tasks.json, predictions for Label Studio with a brush mask and a score a class, and config.xml, its labels.

    Images are local files under ``LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT``, which is to be the folder that all of them share.
    """
    root, tasks, version = _root(items), [], f"fmbseg {records.revision()}"
    for item in items:
        (height, width), masks = item.masks(space)
        result = [
            {
                "id": files.digest(item.name, k),
                "type": "brushlabels",
                "from_name": "tag",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "value": {"format": "rle", "rle": brush_rle(mask), "brushlabels": [space.names[k]]},
            }
            | ({"score": item.scores[k]} if k in item.scores else {})
            for k, mask in masks.items()
        ]
        prediction = {"model_version": version, "result": result}
        if scores := [item.scores[k] for k in masks if k in item.scores]:
            prediction["score"] = min(scores)  # the least certain first
        where = os.path.relpath(item.image.absolute(), root).replace(os.sep, "/")
        tasks.append({"data": {"image": f"/data/local-files/?d={where}"}, "predictions": [prediction]})
    files.write_json(folder / "tasks.json", tasks)
    view = ET.Element("View")
    ET.SubElement(view, "Image", name="image", value="$image", zoom="true")
    brush = ET.SubElement(view, "BrushLabels", name="tag", toName="image")
    first = int(space.background)
    for name, colour in zip(space.names[first:], space.palette[first:].tolist()):
        ET.SubElement(brush, "Label", value=name, background="#{:02x}{:02x}{:02x}".format(*colour))
    with files.atomic_path(folder / "config.xml") as part:
        ET.ElementTree(view).write(part, encoding="utf-8")


def brush_rle(mask: np.ndarray) -> list[int]:
    """A (height, width) bool mask as Label Studio's brush has it: the bytes of the run-length code of its RGBA values, 0 or 255.

    The code: 32 bits number of values, 5 bits word size less one, four times 4 bits size of a run's length less one; then the
    runs, here always 1 (a run), 3 (the fourth size), 16 bits length less one, 8 bits value.
    """
    values = np.repeat(mask.ravel().astype(np.uint8) * 255, 4)
    starts = np.flatnonzero(np.diff(values, prepend=~values[:1]))
    lengths = np.diff(starts, append=len(values))
    pieces = -(-lengths // 65536)
    owner = np.repeat(np.arange(len(starts)), pieces)
    last = np.cumsum(pieces) - 1
    sizes = np.full(len(owner), 65536)
    sizes[last] = lengths - (pieces - 1) * 65536
    codes = (7 << 24) + ((sizes.astype(np.int64) - 1) << 8) + values[starts][owner]
    head = f"{len(values):032b}{7:05b}" + f"{15:04b}" * 4
    bits = (codes[:, None] >> np.arange(26, -1, -1)) & 1
    return np.packbits(np.concatenate([np.array(list(head), dtype=np.uint8), bits.ravel().astype(np.uint8)])).tolist()


def _root(items: Sequence[Labelled]) -> str:
    return os.path.commonpath([item.image.absolute().parent for item in items]) if items else ""


FORMATS: dict[str, Callable[[Sequence[Labelled], LabelSpace, Path, bool], Any]] = {
    "coco": lambda items, space, folder, instances: coco(items, space, folder / "coco.json", False, instances),
    "coco-polygons": lambda items, space, folder, instances: coco(items, space, folder / "coco-polygons.json", True, instances),
    "yolo": lambda items, space, folder, instances: yolo(items, space, folder / "yolo"),
    "voc": lambda items, space, folder, instances: voc(items, space, folder / "voc"),
    "label-studio": lambda items, space, folder, instances: label_studio(items, space, folder / "label-studio"),
}


def formats(text: str) -> list[str]:
    """Names of formats, separated by commas. Raises ParameterError for one that is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in FORMATS]:
        raise ParameterError(f"--format {unknown[0]}: unknown; known are {', '.join(FORMATS)}")
    return names


def export(items: Sequence[Labelled], space: LabelSpace, names: Sequence[str], folder: str | Path, instances: bool = False) -> None:
    """Write label maps in every format of ``names`` (keys of ``FORMATS``) into one folder. instances: as in ``coco``."""
    for name in names:
        FORMATS[name](items, space, Path(folder), instances)
