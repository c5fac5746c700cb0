"""Label maps in the formats that annotation tools and trainers open: COCO, YOLO-seg, VOC (CVAT's "Segmentation mask 1.1"), Label Studio,
and GeoJSON.

A class "background" and unlabelled pixels are not objects: COCO, YOLO and Label Studio leave them out; in VOC they are black.
"""

from __future__ import annotations

import os
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import yaml
from pycocotools import mask as rle

from fmbseg import files
from fmbseg.data import images, label_spaces
from fmbseg.data.images import IGNORED
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.data.samples import Sample
from fmbseg.errors import ParameterError, tell
from fmbseg.runs import records
from fmbseg.runs.cache import encode_rle
from fmbseg.runs.label import LabelStore
from fmbseg.stage2.segmenter import Segmentation, describe
from fmbseg.tools import tiles
from fmbseg.tools.instances import Regions, Way, outlines, split


@dataclass(frozen=True)
class Labelled:
    """An image and its label map.

    name: unique among the images, without folders; read: returns (height, width) class indices, IGNORED where unlabelled;
    scores: the mean margin of each class, where it is known; regions: returns SAM's automatic masks, (height, width) bool each,
    from which instances "sam" are made; large: the label map's file where it was made in tiles.
    """

    name: str
    image: Path
    read: Callable[[], np.ndarray]
    scores: Mapping[int, float] = field(default_factory=dict)
    regions: Regions = tuple
    large: Path | None = None

    @classmethod
    def of(cls, result: Segmentation, image: str | Path, regions: Sequence[np.ndarray] = ()) -> Labelled:
        """A result of ``Segmenter.segment`` of an image file; a class's score is its mean margin."""
        scores = {one["index"]: one["mean_margin"] for one in describe(result)["classes"]}
        return cls(Path(image).stem, Path(image), lambda: result.labels, scores, lambda: regions)

    def objects(self, space: LabelSpace, way: Way = "") -> tuple[tuple[int, int], Iterator[tuple[int, np.ndarray]]]:
        """(height, width), and the class and the (height, width) bool mask of each instance (``split``), without the background."""
        labels = self.read()
        regions = self.regions() if way == "sam" else ()
        there = set(np.unique(labels).tolist())
        classes = [k for k in _objects(space) if k in there]
        return labels.shape, ((k, mask) for k in classes for mask in split(labels == k, way, regions))


def _objects(space: LabelSpace) -> list[int]:
    """The classes that are objects: all but one that is called background, a label space's own or the user's."""
    return [k for k, name in enumerate(space.names) if not label_spaces.is_background(name)]


def of_store(samples: Sequence[Sample], store: LabelStore, regions: Mapping[Path, Regions] | None = None) -> list[Labelled]:
    """The images that have a pseudo label in a store. regions: those of ``sam_regions``."""
    given = regions or {}
    return [Labelled(s.name, s.image, lambda s=s: store.read(s), {}, given.get(s.image, tuple)) for s in samples if store.has(s)]


def _simple(path: np.ndarray) -> np.ndarray:
    """A closed path without repeated vertices and without vertices on a straight line; at least three vertices are kept."""
    path = path[(path != np.roll(path, 1, axis=0)).any(axis=1)] if len(path) > 1 and np.ptp(path, axis=0).any() else path[:1]
    before, after = path - np.roll(path, 1, axis=0), np.roll(path, -1, axis=0) - path
    straight = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0] == 0
    kept = path[~straight | ((before * after).sum(axis=1) <= 0)]
    return kept[np.arange(max(len(kept), 3)) % len(kept)]


def coco(items: Sequence[Labelled], space: LabelSpace, path: str | Path, polygons: bool = False, way: Way = "") -> dict[str, Any]:
    """Write label maps as a COCO file; returns what is in it.

    One annotation an instance (``way``, of ``split``: ""; one a class); run-length encoded, or polygons. category_id is the
    class index plus one (COCO counts from one); bbox is (x, y, width, height); file_name is relative to the folder that all images
    share; words: a class's prompt words; score: its mean margin, where that is known.
    """
    root, entries, found = _root(items), [], []
    for number, item in enumerate(items, 1):
        (height, width), objects = item.objects(space, way)
        entries.append({"id": number, "file_name": os.path.relpath(item.image.absolute(), root), "height": height, "width": width})
        for k, mask in objects:
            coded = encode_rle(mask)
            shown = [_simple(ring + 0.5).ravel().tolist() for ring in outlines(mask)] if polygons else coded
            one = {"id": len(found) + 1, "image_id": number, "category_id": k + 1, "segmentation": shown}
            one |= {"area": int(mask.sum()), "bbox": [int(v) for v in rle.toBbox(coded)], "iscrowd": 0}
            found.append(one | ({"score": item.scores[k]} if k in item.scores else {}))
    classes = [
        {"id": k + 1, "name": name, "supercategory": "", "words": list(words)}
        for k, (name, words) in enumerate(zip(space.names, space.prompts))
    ]
    about = {"description": "labels by fmbseg, not checked by anybody", "version": records.revision()}
    made = {"info": about, "licenses": [], "images": entries, "annotations": found, "categories": classes}
    files.write_json(path, made)
    return made


def yolo(items: Sequence[Labelled], space: LabelSpace, folder: Path, way: Way = "") -> None:
    """Write a YOLO-seg folder: data.yaml, copies of the images in images/, and in labels/ a text file each.

    A line is a connected part of an instance (``way``, of ``split``): class and polygon in shares of width and height. Vertices
    lie a quarter of a pixel inside the pixels of the outline: readers that round, those that cut off, and OpenCV's ``fillPoly``
    meet the same pixels.
    """
    numbers = {k: number for number, k in enumerate(_objects(space))}
    for item in items:
        (height, width), objects = item.objects(space, way)
        lines = []
        for k, mask in objects:
            for ring in outlines(mask, level=0.999):
                shares = (_simple(np.floor(ring + 0.25)) + 0.25) / (width, height)
                lines.append(" ".join([str(numbers[k]), *(f"{value:.7f}" for value in shares.ravel())]))
        with files.atomic_path(folder / "labels" / f"{item.name}.txt") as part:
            part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        with files.atomic_path(folder / "images" / f"{item.name}{item.image.suffix.lower()}") as part:
            shutil.copyfile(item.image, part)
    with files.atomic_path(folder / "data.yaml") as part:
        described = {"train": "images", "val": "images", "names": {number: space.names[k] for k, number in numbers.items()}}
        part.write_text(yaml.safe_dump(described, allow_unicode=True, sort_keys=False), encoding="utf-8")


def voc(items: Sequence[Labelled], space: LabelSpace, folder: Path, way: Way = "") -> None:
    """Write a VOC folder, which CVAT imports as "Segmentation mask 1.1" (zip it): labelmap.txt, SegmentationClass, ImageSets.

    The palette PNGs hold the number of the class's line in labelmap.txt, and show its colour; 0, black, is the background, and
    all that is unlabelled. With instances (``way``, of ``split``), SegmentationObject has their numbers from 1 in each image, the
    large ones first; those that 8 bits do not hold are left out of it, and told. Raises ParameterError for a class whose name has
    a colon, which ends names in labelmap.txt, and for more classes than 8 bits hold.
    """
    names = _voc_names(space)
    colours = np.concatenate([np.zeros((1, 3), np.uint8), label_spaces.palette(len(names))])
    numbers = np.zeros(len(space) + 1, np.int16)
    numbers[_objects(space)] = np.arange(1, len(names) + 1)
    for item in items:
        labels = item.read()
        shown = numbers[labels]  # IGNORED is the last
        images.write_label_map(folder / "SegmentationClass" / f"{item.name}.png", shown, colours)
        if way:
            ids, left = _numbered(item, space, way)
            images.write_label_map(folder / "SegmentationObject" / f"{item.name}.png", ids, _INSTANCE_COLOURS)
            if left:
                tell(f"{item.name}: its {left} smallest instances are left out of SegmentationObject, which holds {MOST_IDS}")
    lines = [f"{name}:{','.join(map(str, colour))}::" for name, colour in zip(("background", *names), colours.tolist())]
    for path, text in (
        ("labelmap.txt", ["# label:color_rgb:parts:actions", *lines]),
        ("ImageSets/Segmentation/default.txt", [item.name for item in items]),
    ):
        with files.atomic_path(folder / path) as part:
            part.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")


def _voc_names(space: LabelSpace) -> list[str]:
    names = [space.names[k] for k in _objects(space)]
    if bad := [name for name in names if ":" in name]:
        raise ParameterError(f"{bad[0]}: names with a colon cannot be written to VOC's labelmap.txt; name that class otherwise")
    if len(names) > 254:
        raise ParameterError(f"--format voc: {len(names)} classes, and its palette holds 254; give fewer classes, or another format")
    return names


MOST_IDS = 254
"""Instances that a palette PNG holds, between none, 0, and void, 255."""

_BITS = np.arange(MOST_IDS + 1)[:, None] >> (np.arange(8)[:, None, None] * 3 + np.arange(3))
_INSTANCE_COLOURS = ((_BITS & 1) << np.arange(7, -1, -1)[:, None, None]).sum(axis=0).astype(np.uint8)
"""(255, 3): VOC's own colours, by which readers know the numbers: bits of a number, the last first, are spread over red, green and blue."""


def _numbered(item: Labelled, space: LabelSpace, way: Way) -> tuple[np.ndarray, int]:
    """(height, width) numbers of an image's instances, 0 where there is none, and how many are too many."""
    size, objects = item.objects(space, way)
    ids, order = np.zeros(size, np.int32), []
    for number, (_, mask) in enumerate(objects, 1):
        ids[mask] = number
        order.append(int(mask.sum()))
    rank = np.zeros(len(order) + 1, np.int32)
    rank[1 + np.argsort(order, kind="stable")[::-1]] = np.arange(1, len(order) + 1)
    rank[rank > MOST_IDS] = 0
    return rank[ids], max(0, len(order) - MOST_IDS)


def label_studio(items: Sequence[Labelled], space: LabelSpace, folder: Path, way: Way = "") -> None:
    """Write tasks.json, predictions for Label Studio with a brush mask and a score an instance (``way``, of ``split``: ""; a
    class), and config.xml, its labels.

    Images are local files under ``LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT``, which is to be the folder that all of them share.
    """
    root, tasks, version = _root(items), [], f"fmbseg {records.revision()}"
    for item in items:
        (height, width), objects = item.objects(space, way)
        result = [
            {
                "id": files.digest(item.name, number),
                "type": "brushlabels",
                "from_name": "tag",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "value": {"format": "rle", "rle": brush_rle(mask), "brushlabels": [space.names[k]]},
            }
            | ({"score": item.scores[k]} if k in item.scores else {})
            for number, (k, mask) in enumerate(objects)
        ]
        prediction = {"model_version": version, "result": result}
        if scores := [one["score"] for one in result if "score" in one]:
            prediction["score"] = min(scores)  # the least certain first
        where = os.path.relpath(item.image.absolute(), root).replace(os.sep, "/")
        tasks.append({"data": {"image": f"/data/local-files/?d={quote(os.fsencode(where))}"}, "predictions": [prediction]})
    files.write_json(folder / "tasks.json", tasks)
    view = ET.Element("View")
    ET.SubElement(view, "Image", name="image", value="$image", zoom="true")
    brush = ET.SubElement(view, "BrushLabels", name="tag", toName="image")
    for k in _objects(space):
        ET.SubElement(brush, "Label", value=space.names[k], background="#{:02x}{:02x}{:02x}".format(*space.palette[k].tolist()))
    with files.atomic_path(folder / "config.xml") as part:
        ET.ElementTree(view).write(part, encoding="utf-8")


def brush_rle(mask: np.ndarray) -> list[int]:
    """A (height, width) bool mask in Label Studio's brush format: the bytes of the run-length code of its RGBA values, 0 or 255.

    The code begins with the number of values (32 bits), the word size minus one (5 bits) and four sizes of a run's length, each
    minus one (4 bits). Then come the runs, here always: 1 (it is a run), 3 (the fourth size), the length minus one (16 bits), the
    value (8 bits).
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


def geojson(items: Sequence[Labelled], space: LabelSpace, folder: Path) -> None:
    """Write a file an image (``tiles.geojson``)."""
    for item in items:
        labels = item.large or item.read()
        if not item.large:
            labels = np.where(np.isin(labels, _objects(space)), labels, IGNORED)
        tiles.geojson(labels, space, folder / f"{item.name}.geojson")


def _root(items: Sequence[Labelled]) -> str:
    return os.path.commonpath([item.image.absolute().parent for item in items]) if items else ""


FORMATS: dict[str, Callable[[Sequence[Labelled], LabelSpace, Path, Way], Any]] = {
    "coco": lambda items, space, folder, way: coco(items, space, folder / "coco.json", False, way),
    "coco-polygons": lambda items, space, folder, way: coco(items, space, folder / "coco-polygons.json", True, way),
    "yolo": lambda items, space, folder, way: yolo(items, space, folder / "yolo", way),
    "voc": lambda items, space, folder, way: voc(items, space, folder / "voc", way),
    "label-studio": lambda items, space, folder, way: label_studio(items, space, folder / "label-studio", way),
    "geojson": lambda items, space, folder, way: geojson(items, space, folder / "geojson"),
}


def formats(text: str, space: LabelSpace) -> list[str]:
    """The formats in a text with commas between their names. Raises ParameterError for an unknown one, and for one that cannot hold
    the classes of ``space``."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in FORMATS]:
        raise ParameterError(f"--format {unknown[0]}: unknown; known are {', '.join(FORMATS)}")
    if "voc" in names:
        _voc_names(space)
    return names


_FORMER = {
    "yolo": ("images/*", "labels/*.txt"),
    "voc": ("SegmentationClass/*.png", "SegmentationObject/*.png", "ImageSets/Segmentation/default.txt"),
    "geojson": ("*.geojson",),
}
"""What an earlier call wrote into the folder of a format, and this one would not replace."""


def export(
    items: Sequence[Labelled], space: LabelSpace, names: Sequence[str], folder: str | Path, way: Way = "", fresh: bool = False
) -> None:
    """Write label maps in every format of ``names`` (keys of ``FORMATS``) into one folder. way: what an instance is (``split``).

    fresh: first remove what an earlier call wrote there in these formats, of other images or words.
    """
    whole = [item for item in items if not item.large]
    if len(whole) < len(items) and set(names) != {"geojson"}:
        tell(f"{len(items) - len(whole)} images that were segmented in tiles are written as geojson alone")
    for name in names:
        if fresh:
            _remove_former(Path(folder) / name, _FORMER.get(name, ()), {item.image.resolve() for item in items})
        FORMATS[name](items if name == "geojson" else whole, space, Path(folder), way)


def _remove_former(folder: Path, patterns: Sequence[str], kept: Collection[Path]) -> None:
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        without_label = path.parent.name == "images" and not (folder / "labels" / f"{path.stem}.txt").is_file()
        if path.is_file() and not without_label and path.resolve() not in kept:
            path.unlink()
