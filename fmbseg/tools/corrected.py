"""Masks that a person corrected, for training: from COCO, Label Studio, VOC (as CVAT exports it), YOLO-seg and label PNGs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import yaml
from PIL import Image, ImageDraw

from fmbseg import files
from fmbseg.data import images, label_spaces
from fmbseg.data.images import IGNORED
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.data.samples import Sample, read_instances
from fmbseg.errors import DataError, ImageError, tell
from fmbseg.runs.label import LabelStore
from fmbseg.tools import review, segmenting

Masks = dict[str, Callable[[tuple[int, int]], np.ndarray]]
"""File name of an image, without folders and suffix -> a function of its (height, width) that returns its class indices."""


class MixedStore(LabelStore):
    """The pseudo labels of a store, with corrected masks in place of those of some images.

    corrected: sample's name -> file of its label map (``take``).
    """

    def __init__(self, store: LabelStore, corrected: dict[str, Path]):
        vars(self).update(vars(store))
        self.corrected = corrected
        self.notes = (f"{len(corrected)} images with masks that a person corrected: not annotation-free",)

    def has(self, sample: Sample) -> bool:
        return sample.name in self.corrected or super().has(sample)

    def path(self, sample: Sample) -> Path:
        return self.corrected.get(sample.name) or super().path(sample)


def take(source: Path, samples: Sequence[Sample], space: LabelSpace) -> dict[str, Path]:
    """Write the corrected masks that belong to samples as label maps of ``space``: {sample's name: file}.

    source: a .json of COCO or of Label Studio (brush masks); a folder with labelmap.txt and SegmentationClass/; one with data.yaml and
    labels/ (YOLO-seg); or one with classes.txt and a PNG an image, such as results of ``fmbseg segment``; of these, if they were
    reviewed, only the accepted ones count. A mask belongs to the image of the same file name without suffix. Background becomes
    unlabelled. Raises DataError for another source, for a class that is not in ``space`` and where no mask belongs to a sample,
    ImageError for a mask whose size is not its image's.
    """
    names, masks = _read(source)
    words = {label_spaces.normal(word): k for k, own in enumerate(space.prompts) for word in own}
    words |= {label_spaces.normal(name): k for k, name in enumerate(space.names)}  # a name counts before a word of another class
    table = [IGNORED if label_spaces.is_background(name) else words.get(label_spaces.normal(name), -2) for name in names]
    if -2 in table:
        raise DataError(f"{source}: {names[table.index(-2)]!r} is none of the words that are trained; add it to --classes-file")
    of_stem: dict[str, list[Sample]] = {}
    for sample in samples:
        of_stem.setdefault(sample.image.stem, []).append(sample)
    folder, found = files.home() / "corrected" / files.digest(str(source.resolve()), space.names), {}
    for stem, read in masks.items():
        of_one = of_stem.get(stem, [])
        if len(of_one) > 1:
            raise DataError(f"{source}: {stem} may be {of_one[0]} or {of_one[1]}; give images of different names")
        for sample in of_one:
            size = images.image_size(sample.image)
            labels = read(size)
            if labels.shape != size:
                raise ImageError(
                    f"{source}: the mask of {stem} is {labels.shape[::-1]}, its image {size[::-1]} pixels; both must be of one size"
                )
            if labels.max(initial=0) >= len(table):
                raise DataError(f"{source}: the mask of {stem} holds {labels.max()}, and there are {len(table)} classes; correct it")
            found[sample.name] = folder / f"{files.digest(sample.name)}.png"
            images.write_label_map(found[sample.name], np.array([*table, IGNORED])[labels], space.palette)
    if not found:
        raise DataError(
            f"{source}: none of its {len(masks)} masks belongs to an image of the collection; names of files have to be the same"
        )
    if len(found) < len(masks):
        tell(f"{source}: {len(masks) - len(found)} of {len(masks)} masks belong to no image of the collection")
    return found


def _read(source: Path) -> tuple[list[str], Masks]:
    if source.suffix == ".json":
        made = files.read_json(source)
        return _label_studio(source, made) if isinstance(made, list) else _coco(source, made)
    readers = {"labelmap.txt": _voc, "data.yaml": _yolo}
    return next((read for name, read in readers.items() if (source / name).is_file()), _maps)(source)


def _coco(path: Path, made: Any) -> tuple[list[str], Masks]:
    try:
        index = {one["id"]: k for k, one in enumerate(made["categories"])}
        outlines: dict[int, list[tuple[int, dict]]] = {one["id"]: [] for one in made["images"]}
        for one in made["annotations"]:
            outlines[one["image_id"]].append((index[one["category_id"]], one | {"iscrowd": 0}))
        sizes = {Path(one["file_name"]).stem: ((one["height"], one["width"]), outlines[one["id"]]) for one in made["images"]}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: no COCO annotations ({error!r} is missing); export them again") from error
    masks = {stem: lambda _, given=given: read_instances(*given, IGNORED) for stem, given in sizes.items() if given[1]}
    return [one["name"] for one in made["categories"]], masks


def _label_studio(path: Path, tasks: list[Any]) -> tuple[list[str], Masks]:
    """What persons annotated: of each task the last annotation that was not cancelled; predictions that nobody accepted are not taken."""
    names: dict[str, int] = {}
    masks: Masks = {}
    try:
        for task in tasks:
            given = [one["result"] for one in task["annotations"] if not one.get("was_cancelled")]
            brushes = [one for one in given[-1] if "value" in one] if given else []
            if other := {one["type"] for one in brushes} - {"brushlabels"}:
                raise DataError(f"{path}: holds {sorted(other)[0]}, and only brush masks are read; export from Label Studio as COCO")
            parts = []
            for one in brushes:
                size, (name,) = (one["original_height"], one["original_width"]), one["value"]["brushlabels"]
                parts.append((names.setdefault(name, len(names)), size, one["value"]["rle"]))
            file = unquote(task["data"]["image"]).rsplit("/", 1)[-1].rsplit("?d=", 1)[-1]
            if "/upload/" in task["data"]["image"]:
                file = re.sub("^[0-9a-f]{8}-", "", file)  # Label Studio puts a key before the name of a file that was uploaded
            if parts:
                masks[Path(file).stem] = lambda _, parts=parts: _brushed(parts)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: no export of Label Studio with brush masks ({error!r}); export it as JSON or as COCO") from error
    return list(names), masks


def _brushed(parts: Sequence[tuple[int, tuple[int, int], Sequence[int]]]) -> np.ndarray:
    labels = np.full(parts[0][1], IGNORED, np.int32)
    for k, size, codes in parts:
        labels[brush_mask(codes, size)] = k
    return labels


def brush_mask(codes: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """A brush mask of Label Studio, by its opacity: (height, width) bool of ``size``. codes: bytes, as ``export.brush_rle`` has them.

    A 0 in place of a run's 1 begins so many single values. Raises ValueError for a code that is not of that size.
    """
    bits, at = "".join(f"{byte:08b}" for byte in codes), 0

    def take(count: int) -> int:
        nonlocal at
        at += count
        return int(bits[at - count : at], 2)

    total, width = take(32), take(5) + 1
    sizes = [take(4) + 1 for _ in range(4)]
    values, lengths, done = [], [], 0
    while done < total:
        run, length = take(1), take(sizes[take(2)]) + 1
        values += [take(width)] if run else [take(width) for _ in range(length)]
        lengths += [length] if run else [1] * length
        done += length
    return np.repeat(np.array(values, np.uint8), lengths).reshape(*size, 4)[..., 3] > 127


def _yolo(folder: Path) -> tuple[list[str], Masks]:
    try:
        names = yaml.safe_load((folder / "data.yaml").read_text(encoding="utf-8"))["names"]
        names = [names[k] for k in range(len(names))]
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{folder / 'data.yaml'}: has no names of classes ({error!r}); write them as YOLO has them") from error

    def read(path: Path, size: tuple[int, int]) -> np.ndarray:
        labels = Image.new("I", size[::-1], IGNORED)
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                k, *shares = line.split()
                corners = np.floor(np.array(shares, float).reshape(-1, 2) * size[::-1] + 1e-3).astype(int)
                if len(corners) < 3:
                    raise ValueError("a polygon has three corners or more")
                ImageDraw.Draw(labels).polygon(corners.ravel().tolist(), fill=int(k), outline=int(k))
            except ValueError as error:
                raise DataError(f"{path}: {line[:40]!r} is no class and polygon ({error}); correct it") from error
        return np.array(labels)

    paths = [path for path in sorted(folder.rglob("labels/**/*.txt")) if path.stat().st_size]
    return names, {path.stem: lambda size, path=path: read(path, size) for path in paths}


def _voc(folder: Path) -> tuple[list[str], Masks]:
    lines = [line.split(":") for line in label_spaces.read_words(folder / "labelmap.txt") if not line.startswith("#")]
    try:
        colours = [np.array(line[1].split(","), dtype=int) @ (65536, 256, 1) for line in lines]
    except (IndexError, ValueError) as error:
        raise DataError(f"{folder / 'labelmap.txt'}: a line is not NAME:RED,GREEN,BLUE:: ({error}); export it again") from error

    def read(path: Path) -> np.ndarray:
        codes = np.array(images.open_image(path).convert("RGB"), dtype=int) @ (65536, 256, 1)
        labels = np.full(codes.shape, -2)
        for k, colour in enumerate(colours):
            labels[codes == colour] = k
        if (labels == -2).any():
            raise DataError(f"{path}: has the colour {codes[labels == -2][0]:06x}, which labelmap.txt does not; export both together")
        return labels

    paths = sorted((folder / "SegmentationClass").glob("*.png"))
    return [line[0] for line in lines], {path.stem: lambda _, path=path: read(path) for path in paths}


def _maps(folder: Path) -> tuple[list[str], Masks]:
    classes = next((path for name in (segmenting.CLASSES, "classes.txt") if (path := folder / name).is_file()), None)
    if classes is None:
        raise DataError(
            f"{folder}: no corrected masks; give a .json of COCO or Label Studio, or a folder with labelmap.txt, data.yaml or classes.txt"
        )
    lines = label_spaces.read_words(classes, numbered=True)
    if classes.name != segmenting.CLASSES:
        names = label_spaces.own_words(lines, str(classes), lines=True).names
        return list(names), {path.stem: lambda _, path=path: images.read_mask(path) for path in sorted(folder.rglob("*.png"))}
    verdicts, results = review.verdicts(folder), review.results(folder)
    accepted = [name for name in results if (folder / f"{name}.labels.png").is_file()]  # not one of a tiled image
    accepted = [name for name in accepted if not (folder / review.VERDICTS).is_file() or verdicts.get(name) == "accept"]
    names, prompts = zip(*map(_class, lines))
    for name in accepted:
        if results[name].get("words_key", key := files.digest(names, prompts)) != key:
            raise DataError(
                f"{folder}: {name} was made with other words than {classes.name} lists; segment it again into a folder of its own"
            )
    return list(names), {
        Path(results[name]["image"]).stem: lambda _, name=name: images.read_mask(folder / f"{name}.labels.png") for name in accepted
    }


def _class(line: str) -> tuple[str, list[str]]:
    """Name and words of a line "name: word, word" of fmbseg-classes.txt; a name may have colons, and two classes may share words."""
    half = line[: len(line) // 2 - 1]
    name, _, words = (half, "", half) if line == f"{half}: {half}" else line.rpartition(": ")
    return (name, words.split(", ")) if name else (words, [words])
