"""Masks that a person corrected, for training: from COCO, Label Studio, VOC (as CVAT exports it), YOLO-seg and label PNGs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

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


@dataclass(frozen=True)
class Mask:
    """A mask of a source.

    image: the path of its image, or of the mask where ``exact`` is not set, as far as the source has it, without suffix; read: a function
    of the image's (height, width) that returns its class indices; suffix: that of the image, where it is known.
    """

    image: PurePosixPath
    read: Callable[[tuple[int, int]], np.ndarray]
    suffix: str = ""
    exact: bool = False

    @classmethod
    def of(cls, image: str, read: Callable[[tuple[int, int]], np.ndarray], exact: bool = True) -> Mask:
        """A mask of an image whose path, with suffix, the source has."""
        path = PurePosixPath(image.replace("\\", "/"))
        return cls(path.with_suffix(""), read, path.suffix, exact)


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
    reviewed, only the accepted ones count. A mask belongs to the image of the same path, as far as the source has it, else of the
    same name (x__1 is x/1), else of the same file name without suffix. Background becomes unlabelled; so does an image that a person
    left without any object.

    Raises DataError for another source, for a class that is not in ``space``, for two masks of a sample, for a mask that may be of
    several, and where no mask belongs to a sample; ImageError for a mask whose size is not its image's.
    """
    names, masks = _read(source)
    words = {label_spaces.normal(word): k for k, own in enumerate(space.prompts) for word in own}
    words |= {label_spaces.normal(name): k for k, name in enumerate(space.names)}  # a name counts before a word of another class
    table = [IGNORED if label_spaces.is_background(name) else words.get(label_spaces.normal(name), -2) for name in names]
    if -2 in table:
        raise DataError(f"{source}: {names[table.index(-2)]!r} is none of the words that are trained; add it to --classes-file")
    known: dict[str, dict[str, Sample]] = {}
    for sample in samples:
        for name in (sample.name, sample.image.stem, sample.image.name):
            known.setdefault(name, {})[sample.name] = sample
    root = os.path.commonpath([sample.image.absolute().parent for sample in samples]) if samples else ""
    folder, found = files.home() / "corrected" / files.digest(str(source.resolve()), space.names), {}
    of_one: dict[str, list[tuple[int, Sample, Mask]]] = {}
    for mask in masks:
        named = known.get("__".join(mask.image.parts), {}) | known.get(mask.image.name, {})
        if sample := _image_of(mask, list(named.values()), root, source):
            of_one.setdefault(sample.name, []).append((_alike(mask, sample), sample, mask))
    for name, given in of_one.items():
        given.sort(key=lambda one: -one[0])
        (alike, sample, mask), *others = given
        if others and others[0][0] == alike:
            raise DataError(f"{source}: has two masks of {sample}, {mask.image} and {others[0][2].image}; take one of them away")
        size = images.image_size(sample.image)
        labels = mask.read(size)
        if labels.shape != size:
            raise ImageError(
                f"{source}: the mask of {mask.image} is {labels.shape[::-1]}, its image {size[::-1]} pixels; both must be of one size"
            )
        if labels.max(initial=0) >= len(table):
            raise DataError(f"{source}: the mask of {mask.image} holds {labels.max()}, and there are {len(table)} classes; correct it")
        found[name] = folder / f"{files.digest(name)}.png"
        images.write_label_map(found[name], np.array([*table, IGNORED])[labels], space.palette)
    if not found:
        raise DataError(
            f"{source}: none of its {len(masks)} masks belongs to an image of the collection; names of files and folders have to be the same"
        )
    if len(found) < len(masks):
        tell(f"{source}: {len(masks) - len(found)} of {len(masks)} masks belong to no image of the collection")
    return found


def _image_of(mask: Mask, known: Sequence[Sample], root: str, source: Path) -> Sample | None:
    """The image, among those of its name, that a mask belongs to: by its path, then by the name of the sample, then by the file name.

    root: the folder that all samples share. Raises DataError where several are left.
    """
    flat, own, folders = "__".join(mask.image.parts), mask.image.name, mask.image.parts[:-1]
    there = Path(f"{mask.image}{mask.suffix}")

    def fits(sample: Sample) -> bool:
        above = sample.image.absolute().parent
        if sample.name == flat or _ends(above.parts, folders) or own not in (sample.image.stem, sample.image.name):
            return True  # the last: it is the sample's name, with folders of its image
        if mask.exact and there.is_absolute() and there.is_file():  # another file: a copy is the same image
            return files.sha256_of(there) == files.sha256_of(sample.image)
        return (not mask.exact or there.is_absolute()) and _ends(folders, above.relative_to(root).parts)

    left = [sample for sample in known if fits(sample)]
    most = max((_alike(mask, sample) for sample in left), default=0)
    left = [sample for sample in left if _alike(mask, sample) == most]
    for better in (
        lambda sample: sample.name in (flat, own, own + mask.suffix),
        lambda sample: mask.suffix.lower() == sample.image.suffix.lower(),
    ):
        left = [sample for sample in left if better(sample)] or left
    if len(left) > 1:
        raise DataError(f"{source}: {mask.image} may be {left[0]} or {left[1]}; give images of different names")
    return left[0] if left else None


def _alike(mask: Mask, sample: Sample) -> int:
    """How well a mask fits an image: 2 by folders, 1 by the sample's name, 0 by the file name alone."""
    folders = mask.image.parts[:-1]
    if folders and _ends(sample.image.absolute().parent.parts, folders):
        return 2
    return int(sample.name in ("__".join(mask.image.parts), mask.image.name))


def _ends(parts: Sequence[str], last: Sequence[str]) -> bool:
    return len(last) <= len(parts) and tuple(parts[len(parts) - len(last) :]) == tuple(last)


def _read(source: Path) -> tuple[list[str], list[Mask]]:
    if source.suffix == ".json":
        made = files.read_json(source)
        return _label_studio(source, made) if isinstance(made, list) else _coco(source, made)
    readers = {"labelmap.txt": _voc, "data.yaml": _yolo}
    return next((read for name, read in readers.items() if (source / name).is_file()), _maps)(source)


def _coco(path: Path, made: Any) -> tuple[list[str], list[Mask]]:
    try:
        index = {one["id"]: k for k, one in enumerate(made["categories"])}
        outlines: dict[int, list[tuple[int, dict]]] = {one["id"]: [] for one in made["images"]}
        for one in made["annotations"]:
            outlines[one["image_id"]].append((index[one["category_id"]], one | {"iscrowd": 0}))
        given = [(str(one["file_name"]), (one["height"], one["width"]), outlines[one["id"]]) for one in made["images"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: no COCO annotations ({error!r} is missing); export them again") from error
    masks = [Mask.of(name, lambda _, of=of: read_instances(*of, IGNORED)) for name, *of in given]  # without outlines: a person emptied it
    return [one["name"] for one in made["categories"]], masks


def _label_studio(path: Path, tasks: list[Any]) -> tuple[list[str], list[Mask]]:
    """What persons annotated: of each task the last annotation that was not cancelled; predictions that nobody accepted are not taken."""
    names: dict[str, int] = {}
    masks = []
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
            where, local, file = task["data"]["image"].rpartition("?d=")
            file = unquote(file if local else urlsplit(file).path, errors="surrogateescape")
            if "/upload/" in file and not local:
                file = re.sub("^.*/([0-9a-f]{8}-)?", "", file)  # Label Studio puts a key before the name of a file that was uploaded
            if given:
                masks.append(Mask.of(file.lstrip("/"), lambda size, parts=parts: _brushed(parts, size), bool(local)))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: no export of Label Studio with brush masks ({error!r}); export it as JSON or as COCO") from error
    return list(names), masks


def _brushed(parts: Sequence[tuple[int, tuple[int, int], Sequence[int]]], size: tuple[int, int]) -> np.ndarray:
    """size: that of an image without a brush mask."""
    labels = np.full(parts[0][1] if parts else size, IGNORED, np.int32)
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


def _yolo(folder: Path) -> tuple[list[str], list[Mask]]:
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

    paths = sorted(folder.rglob("labels/**/*.txt"))
    return names, [Mask(_inside(path, folder, "labels"), lambda size, path=path: read(path, size)) for path in paths]


def _voc(folder: Path) -> tuple[list[str], list[Mask]]:
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

    paths = sorted((folder / "SegmentationClass").rglob("*.png"))
    return [line[0] for line in lines], [
        Mask(_inside(path, folder / "SegmentationClass"), lambda _, path=path: read(path)) for path in paths
    ]


def _maps(folder: Path) -> tuple[list[str], list[Mask]]:
    classes = next((path for name in (segmenting.CLASSES, "classes.txt") if (path := folder / name).is_file()), None)
    if classes is None:
        raise DataError(
            f"{folder}: no corrected masks; give a .json of COCO or Label Studio, or a folder with labelmap.txt, data.yaml or classes.txt"
        )
    lines = label_spaces.read_words(classes, numbered=True)
    if classes.name != segmenting.CLASSES:
        names = label_spaces.own_words(lines, str(classes), lines=True).names
        paths = sorted(folder.rglob("*.png"))
        return list(names), [Mask(_inside(path, folder), lambda _, path=path: images.read_mask(path)) for path in paths]
    verdicts, results = review.verdicts(folder), review.results(folder)
    accepted = [name for name in results if (folder / f"{name}.labels.png").is_file()]  # not one of a tiled image
    accepted = [name for name in accepted if not (folder / review.VERDICTS).is_file() or verdicts.get(name) == "accept"]
    if not accepted and (folder / review.VERDICTS).is_file():
        raise DataError(f"{folder}: {review.VERDICTS} accepts no result that is there; accept some on the page of fmbseg review")
    names, prompts = zip(*map(_class, lines))
    for name in accepted:
        if results[name].get("words_key", key := files.digest(names, prompts)) != key:
            raise DataError(
                f"{folder}: {name} was made with other words than {classes.name} lists; segment it again into a folder of its own"
            )
    return list(names), [
        Mask.of(results[name]["image"], lambda _, name=name: images.read_mask(folder / f"{name}.labels.png")) for name in accepted
    ]


def _inside(path: Path, folder: Path, without: str = "") -> PurePosixPath:
    """A path below a folder, without suffix and without folders of one name."""
    return PurePosixPath(*(part for part in path.relative_to(folder).with_suffix("").parts if part != without))


def _class(line: str) -> tuple[str, list[str]]:
    """Name and words of a line "name: word, word" of fmbseg-classes.txt; a name may have colons, and two classes may share words."""
    half = line[: len(line) // 2 - 1]
    name, _, words = (half, "", half) if line == f"{half}: {half}" else line.rpartition(": ")
    return (name, words.split(", ")) if name else (words, [words])
