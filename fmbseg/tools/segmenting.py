"""``fmbseg segment``: the images that a command line names, a place for the results of each (never the same for two, nothing of
the user's is overwritten), and the loop over them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from glob import glob
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from fmbseg import files
from fmbseg.data import images
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.data.samples import Sample
from fmbseg.errors import DataError, ParameterError
from fmbseg.params import LabelParams, MaskParams, SamParams, SegmentParams, UnlabelledParams
from fmbseg.runs import cache, modules, parallel
from fmbseg.runs.cache import Models
from fmbseg.runs.label import LabelStore
from fmbseg.runs.parallel import Failure
from fmbseg.schemas import SegmentRun
from fmbseg.stage1 import query_sam
from fmbseg.stage2 import segmenter
from fmbseg.stage2.segmenter import Placed, Segmentation
from fmbseg.tools import tiles, video
from fmbseg.tools.export import Labelled
from fmbseg.tools.instances import Regions

Overlay = Callable[[Path, np.ndarray, np.ndarray, LabelSpace], None]
"""Writes an overlay to a path, given image, labels and space."""

EXPORT, SUMMARY, CLASSES = "fmbseg-export", "fmbseg-summary.csv", "fmbseg-classes.txt"
"""In a folder of results: the folder for the formats of other tools, the table of all images and classes, and the classes, one a line."""


def find(given: Sequence[str], out: Path, as_video: bool = False, root: Path | None = None) -> dict[Path, Path]:
    """The images and videos that a command line names, each with the path of its results under ``out``, without suffix.

    given: files, folders, and patterns such as "photos/*.jpg". An image that is named twice counts once; images that
    ``fmbseg segment`` wrote do not count. Results of a folder keep its sub-folders. Where images of several folders have the same
    name, all results keep their folders, below the folder that all images share. as_video: a folder is one video, its images the frames.
    root: a folder that all images lie in; results keep their folders below it, whatever their names.

    Raises ParameterError for a pattern without an image, and where a result would replace a file of the user's or of another image.
    """
    found: dict[str, tuple[Path, Path]] = {}  # of an absolute path, the path as it was given and the short name
    for name in given:
        if "://" in name:
            raise ParameterError(f"{name}: is an address on the web; download it and give the file")
        paths, is_folder = [Path(name)], Path(name).is_dir() and not as_video
        if is_folder:
            paths = images.find_images(name)
        elif not Path(name).exists() and any(c in name for c in "*?["):
            suffixes = (*images.SUFFIXES, *video.SUFFIXES)
            paths = sorted(Path(match) for match in glob(name, recursive=True) if Path(match).suffix.lower() in suffixes)
            if not paths:
                raise ParameterError(f"{name}: no image matches it; give files, folders, or a pattern such as 'photos/*.jpg'")
        exported = (out / EXPORT).resolve()
        for path in paths:
            whole = Path(os.path.abspath(path))  # the folder of a video may be given as "." or ".."
            if not (files.is_result(whole) or path.resolve().is_relative_to(exported)):
                found.setdefault(str(whole), (path, path.relative_to(root or name) if root or is_folder else Path(whole.name)))
    if not found:
        raise ParameterError(f"{', '.join(given)}: only results of fmbseg segment; give the images themselves")
    short = [name for _, name in found.values()]
    if not root and len({files.folded(str(name)) for name in short}) < len(short):
        common = os.path.commonpath([os.path.dirname(path) for path in found])
        short = [Path(path).relative_to(common) for path in found]
    names = files.distinct_names(short)
    places = {path: out / name for (path, _), name in zip(found.values(), names)}
    for path, place in places.items():
        there = [file for suffix in files.ALL_SUFFIXES if (file := beside(place, suffix)).exists()]
        if there and (other := files.result(beside(place, ".json")).get("image")) != os.path.abspath(path):
            whose = f"the result of {other}" if other else "no result of fmbseg segment"
            raise ParameterError(f"{there[0]}: is {whose}, and that of {path} would replace it; give another --out, or delete it")
    return places


def beside(place: Path, suffix: str) -> Path:
    """A file of the results at ``place``, whose name may have dots of its own."""
    return place.with_name(place.name + suffix)


def run(
    places: dict[Path, Path],
    space: LabelSpace,
    module: Path,
    params: SegmentRun,
    overlay: Overlay,
    out: Path,
    paint: Callable[[np.ndarray, np.ndarray, LabelSpace], np.ndarray] | None = None,
) -> list[Path]:
    """Segment every image and video into its place, and write a summary of all to ``out``; returns those that have a result.

    Results that are there, of the same bytes, words, module and parameters, are not made again. paint: returns a frame of a
    video's overlay, given image, labels and space. Raises ParameterError where no image can be segmented.
    """
    modules.load(module)  # raises before any work where there is none
    key = files.digest(files.sha256_of(module), space.names, space.prompts, params.content(*_CONTENT))
    load = functools.partial(_loaded, module, params)
    work = functools.partial(_one, places=places, space=space, key=key, load=load, params=params, overlay=overlay)
    videos = [path for path in places if video.is_video(path)]
    tiled = [path for path in places if path not in videos and tiles.is_tiled(path, params.largest_whole)]
    if (several := [*videos, *tiled]) and params.regions != "none":
        raise ParameterError(f"regions = {params.regions!r}: masks do not vote in videos and in tiles ({several[0]}); leave it out")

    def large(path: Path) -> None:
        if path in tiled:
            work(path, tiled=True)
        else:
            video.segment(path, places[path], files.digest(key, video.content(path)), space, load, params, paint)
            tqdm.write(f"{path} -> {places[path]}/, {places[path]}.overlay.mp4, .json")

    failures = parallel.each(work, [path for path in places if path not in several], "segmenting", params.workers).failures
    for path in several:
        outcome = parallel.guarded(large, path)
        if isinstance(outcome, parallel.Failure):
            parallel.leave_out(outcome)
            failures.append(outcome)
    return _summarised(places, failures, space, out)


def _summarised(places: dict[Path, Path], failures: list[Failure], space: LabelSpace, out: Path) -> list[Path]:
    """Write the summary of all results and the list of classes; returns the images that have a result."""
    failed = {failure.item for failure in failures}
    made = [path for path in places if str(path) not in failed]
    if not made:
        raise ParameterError("no image could be segmented; the reasons are told above")
    rows = [row for path in made for row in _rows(path, beside(places[path], ".json"))]
    rows += [{"image": failure.item, "failed": failure.why} for failure in failures]
    with files.atomic_path(out / SUMMARY) as part:
        pd.DataFrame(rows, dtype=object).to_csv(part, index=False, errors="surrogateescape")  # names of files need not be UTF-8
    with files.atomic_path(out / CLASSES) as part:
        lines = [f"{name}: {', '.join(words)}\n" for name, words in zip(space.names, space.prompts)]
        part.write_text("".join(lines), encoding="utf-8")
    return made


_CONTENT = (SegmentParams, UnlabelledParams, MaskParams, SamParams)


def _one(
    path: Path,
    places: dict[Path, Path],
    space: LabelSpace,
    key: str,
    load: Callable[[], modules.Segmenter],
    params: SegmentRun,
    overlay: Overlay,
    tiled: bool = False,
) -> None:
    place, key = places[path], files.digest(key, files.sha256_of(path))
    if _is_whole(place, key, files.TILED_SUFFIXES if tiled else files.RESULT_SUFFIXES):
        return
    if tiled:
        tiles.segment(path, place, key, space, load, params, overlay)
        tqdm.write(f"{path} -> {place}{', '.join(files.TILED_SUFFIXES[1:])}, .json")
    else:
        image = images.read_image(path)
        result = load().segment(image, space, masks=cache.regions(path, Models.of(params), params))
        _write(place, path, image, result, key, overlay)
        tqdm.write(f"{path} -> {place}{', '.join(files.RESULT_SUFFIXES[1:])}, .json")


def _is_whole(place: Path, key: str, suffixes: tuple[str, ...]) -> bool:
    """Whether all of a result is there, made with this key; if not, what was made of the image in another way is deleted.

    Raises DataError where a label map that would be made again was changed since.
    """
    said, whole = files.result(beside(place, ".json")), all(beside(place, suffix).is_file() for suffix in suffixes)
    if whole and said.get("key") == key:
        return True
    for file in (beside(place, ".labels.png"), beside(place, ".labels.tif")):
        if "labels_sha256" in said and file.is_file() and files.file_sha256(file) != said["labels_sha256"]:
            raise DataError(f"{said['image']}: its label map {file} was changed by hand; move it away, or give another folder for results")
    for suffix in set(files.ALL_SUFFIXES) - set(suffixes):
        beside(place, suffix).unlink(missing_ok=True)
    return False


def _write(place: Path, path: Path, image: np.ndarray, result: Segmentation, key: str, overlay: Overlay) -> None:
    words = files.digest(result.space.names, result.space.prompts)
    said = {"image": os.path.abspath(path), "words_key": words} | segmenter.describe(result)
    files.write_json(beside(place, ".json"), said)  # marks the files beside it as ours; the key, written last, as complete
    images.write_label_map(beside(place, ".labels.png"), result.labels, result.space.palette)
    with files.atomic_path(beside(place, ".margin.png")) as part:
        Image.fromarray(result.confidence.levels).save(part, format="PNG")
    overlay(beside(place, ".overlay.png"), image, result.labels, result.space)
    files.write_json(beside(place, ".json"), said | {"labels_sha256": files.file_sha256(beside(place, ".labels.png")), "key": key})


def of_labels(samples: Sequence[Sample], store: LabelStore, params: LabelParams, overlay: Overlay, out: Path) -> list[Path]:
    """The same files of the pseudo labels of images, for people to look at and for ``review``; returns the images that have them.

    A pixel's similarity and margin are those of CLIP's dense features to the words, from which Stage 1 queried SAM. Results
    keep the sub-folders of the collection's folder. Images without a label are in the summary alone, with the reason. Raises
    ParameterError where none has one, and as ``find``.
    """
    sample_of = {sample.image: sample for sample in samples if store.has(sample)}
    if not sample_of:
        raise ParameterError(f"{store.folder}: holds no label of these images; the reasons are in {store.failed}")
    folder = Path(params.collection).expanduser()
    root = folder if all(path.is_relative_to(folder) for path in sample_of) else None  # else it is the name of a collection
    places = find([str(path) for path in sample_of], out, root=root)
    given = {"sample_of": sample_of, "places": places, "store": store, "models": Models.of(params), "params": params, "overlay": overlay}
    workers = 1 if parallel.on_gpu(params.device) else params.workers
    failures = parallel.each(functools.partial(_of_label, **given), list(places), "results of labels", workers).failures
    failures += [Failure(str(one), store.reason(one)) for one in samples if one.image not in sample_of]
    return _summarised(places, failures, store.space, out)


def _of_label(
    path: Path,
    sample_of: dict[Path, Sample],
    places: dict[Path, Path],
    store: LabelStore,
    models: Models,
    params: LabelParams,
    overlay: Overlay,
) -> None:
    place, sample = places[path], sample_of[path]
    key = files.digest(store.key, files.sha256_of(path), store.sha256(sample))
    if _is_whole(place, key, files.RESULT_SUFFIXES):
        return
    image, labels = images.read_image(path), store.read(sample)
    similarity = query_sam.class_similarity(cache.clip_features(path, models, params), models.texts(store.space))
    placed = Placed.whole(similarity, labels.shape)
    result = Segmentation(labels, store.space, placed, functools.cache(lambda: segmenter.confidence(placed, labels)))
    _write(place, path, image, result, key, overlay)


@functools.lru_cache(maxsize=1)
def _loaded(module: Path, params: SegmentRun) -> modules.Segmenter:
    return modules.Segmenter.load(module, params.device, params)


def _rows(path: Path, described: Path) -> list[dict]:
    """One row for the image, with its mean margin, and one for each of its classes."""
    said = files.read_json(described)
    whole = {"image": str(path), "class": "", "share": 1 - said["unlabelled"], "mean_margin": said.get("mean_margin")}
    keys = ("share", "mean_similarity", "mean_margin")
    return [whole, *({"image": str(path), "class": one["name"]} | {k: one.get(k) for k in keys} for one in said["classes"])]


def labelled(paths: Sequence[Path], places: dict[Path, Path], out: Path, regions: Mapping[Path, Regions] | None = None) -> list[Labelled]:
    """The results of images, for ``export``; a class's score is its mean margin. regions: those of ``sam_regions``."""
    given = regions or {}
    paths = [path for path in paths if not video.is_video(path)]
    names = files.flat_names([Path(f"{places[path].relative_to(out)}{path.suffix}") for path in paths])
    found = []
    for name, path in zip(names, paths):
        scores = {one["index"]: one["mean_margin"] for one in files.read_json(beside(places[path], ".json"))["classes"]}
        large = beside(places[path], ".labels.tif")
        read = functools.partial(images.read_mask, beside(places[path], ".labels.png"))
        found.append(Labelled(name, path, read, scores, given.get(path, tuple), large if large.is_file() else None))
    return found
