"""Masks that a person corrected, on their way back into a training: from COCO files, VOC folders (as CVAT exports them) and label PNGs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fmbseg import files
from fmbseg.data import images, label_spaces
from fmbseg.data.images import IGNORED
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.data.samples import Sample, read_instances
from fmbseg.errors import DataError, ImageError, tell
from fmbseg.runs.label import LabelStore
from fmbseg.tools import review, segmenting

Masks = dict[str, Callable[[], np.ndarray]]
"""File name of an image, without folders and suffix -> a function that returns its (height, width) class indices."""


class MixedStore(LabelStore):
    """The pseudo labels of a store, with corrected masks in the place of those of some images.

    corrected: sample's name -> its label map, as ``take`` gives them.
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
    """Write the corrected masks of a source that belong to samples as label maps of ``space``: {sample's name: file}.

    source: a COCO .json; a folder with labelmap.txt and SegmentationClass/; or one with classes.txt and a PNG an image, such as
    results of ``fmbseg segment``, of which only the accepted ones are taken where there is a review. An image is found by its file's name
    without suffix. Background is unlabelled. Raises DataError for another source, a class that is none of ``space``, and where
    nothing belongs to a sample, ImageError for a mask of another size than its image.
    """
    names, masks = _coco(source) if source.suffix == ".json" else _voc(source) if (source / "labelmap.txt").is_file() else _maps(source)
    words = {label_spaces.normal(word): k for k, own in enumerate(space.prompts) for word in (*own, space.names[k])}
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
            labels, size = read(), images.image_size(sample.image)
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


def _coco(path: Path) -> tuple[list[str], Masks]:
    made = files.read_json(path)
    try:
        index = {one["id"]: k for k, one in enumerate(made["categories"])}
        outlines: dict[int, list[tuple[int, dict]]] = {one["id"]: [] for one in made["images"]}
        for one in made["annotations"]:
            outlines[one["image_id"]].append((index[one["category_id"]], one | {"iscrowd": 0}))
        sizes = {Path(one["file_name"]).stem: ((one["height"], one["width"]), outlines[one["id"]]) for one in made["images"]}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: no COCO annotations ({error!r} is missing); export them again") from error
    masks = {stem: lambda given=given: read_instances(*given, IGNORED) for stem, given in sizes.items() if given[1]}
    return [one["name"] for one in made["categories"]], masks


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
    return [line[0] for line in lines], {path.stem: lambda path=path: read(path) for path in paths}


def _maps(folder: Path) -> tuple[list[str], Masks]:
    classes = next((path for name in (segmenting.CLASSES, "classes.txt") if (path := folder / name).is_file()), None)
    if classes is None:
        raise DataError(f"{folder}: no corrected masks; give a COCO .json, or a folder with labelmap.txt or classes.txt and PNGs")
    names = label_spaces.own_words(label_spaces.read_words(classes, numbered=True), str(classes), lines=True).names
    if classes.name != segmenting.CLASSES:
        return list(names), {path.stem: lambda path=path: images.read_mask(path) for path in sorted(folder.rglob("*.png"))}
    verdicts, results = review.verdicts(folder), review.results(folder)
    accepted = [name for name in results if (folder / f"{name}.labels.png").is_file()]  # not one of a tiled image
    accepted = [name for name in accepted if not verdicts or verdicts.get(name) == "accept"]
    return list(names), {
        Path(results[name]["image"]).stem: lambda name=name: images.read_mask(folder / f"{name}.labels.png") for name in accepted
    }
