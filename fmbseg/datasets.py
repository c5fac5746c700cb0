"""Data sets by name: the benchmarks of ``layouts.py``, the embedded sets, any folder, and unlabelled photographs.

A benchmark's truth is read as (height, width) ``uint8`` class indices of its label space, 255 ignored.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path

from fmbseg import embedded, images, layouts, storage, vocabulary, weights
from fmbseg.embedded import EMBEDDED
from fmbseg.errors import DataError, ParameterError, WeightsError
from fmbseg.layouts import LAYOUTS
from fmbseg.samples import Dataset, Sample
from fmbseg.truth import lookup
from fmbseg.vocabulary import LabelSpace, label_space

BENCHMARKS = (*LAYOUTS, *EMBEDDED, "drawn")
FOLDER_PARTS = ("images", "masks", "classes.txt")


def folder_set(folder: Path) -> Dataset:
    """images/ID.jpg, masks/ID.png and classes.txt (line n is class n); "background" as class 0 is background.

    Raises DataError or ParameterError for what is missing or no list of classes.
    """
    for part in FOLDER_PARTS:
        if not (folder / part).exists():
            raise DataError(f"{folder}: has no {part}; a folder data set holds images/, masks/ and classes.txt (a class a line)")
    space = vocabulary.own_words((folder / "classes.txt").read_text(encoding="utf-8").splitlines(), folder.name)
    if space.names[0] == "background":
        space = LabelSpace(space.name, space.names, space.prompts, space.palette, True)
    table = lookup({index: index for index in range(len(space))})
    pictures = images.find_images(folder / "images")
    stems = [path.stem for path in pictures]
    if repeated := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise DataError(f"{folder / 'images'}: several pictures are named {repeated[0]}; a mask belongs to one picture, so rename them")
    samples = layouts.pair(folder, pictures, lambda p: folder / "masks" / f"{p.stem}.png", table)
    return Dataset(folder.name, space, tuple(samples), str(folder.name))


def load_benchmark(name: str, data_root: str = "") -> Dataset:
    """A benchmark by name, an embedded one, or ``folder:NAME`` for a folder data set (under data_root, or any path).

    Raises ParameterError for an unknown name and DataError, with what is missing, when it is not there.
    """
    if name in EMBEDDED:
        return embedded.load(name)
    if name == "drawn":
        return embedded.drawn()
    if name.startswith("folder:"):
        path = Path(name.removeprefix("folder:")).expanduser()
        return folder_set(path if path.is_absolute() else Path(data_root or ".").expanduser() / path)
    if name not in LAYOUTS:
        raise ParameterError(f"benchmark {name!r}: unknown; known are {', '.join(BENCHMARKS)}, and folder:PATH")
    layout = LAYOUTS[name]
    if not data_root:
        raise DataError(f"{name}: needs data_root, the folder that holds {layout.folder} in its official layout")
    space = label_space(name)
    samples = layouts.read(name, Path(data_root).expanduser(), space)
    return Dataset(name, space, tuple(samples), f"{len(samples)} of the official {layout.images} images, under data_root")


# ---------------------------------------------------------------- unlabelled photographs

POOL = ("pool_objects_scenes", "pool_coco_45", "pool_pets_streets")
COLLECTIONS = {"embedded_pool": POOL, "embedded_objects": POOL, "embedded_coco": ("pool_coco_45",)}


def load_collection(name: str, data_root: str = "", evaluation: Sequence[str] | None = None) -> list[Sample]:
    """Unlabelled photographs: a collection's name, or any folder of pictures.

    Collections: ``embedded_pool`` (255), ``embedded_objects`` (155 of them), ``embedded_coco`` (45 of them, of COCO),
    ``coco_stuff_train`` and ``voc_photographs`` (both under data_root) and ``drawn``.

    A photograph that is also in an evaluation set that is here (same bytes or same file name) is left out.
    """
    if name == "drawn":
        return [Sample(s.name, s.image) for s in embedded.drawn().samples]
    if name in COLLECTIONS:
        found = [path for pool in COLLECTIONS[name] for path in images.find_images(weights.require(pool))]
        root = weights.require(POOL[0]).parent
        if name == "embedded_objects":  # 100 photographs of one town's streets and parks hold few kinds of things
            found = [path for path in found if path.parent.name != "enhancement"]
    else:
        under = Path(data_root).expanduser()
        own = {"coco_stuff_train": layouts.train_pictures, "voc_photographs": layouts.voc_pictures}
        root = own[name](under) if name in own else Path(name).expanduser()
        found = images.find_images(root)
    stems, hashes = _evaluation_pictures(tuple(evaluation or (*EMBEDDED, *(LAYOUTS if data_root else ()))), data_root)
    kept = [p for p in found if p.stem not in stems and storage.image_sha256(p) not in hashes]
    if not kept:
        raise DataError(f"{name}: every picture in it is an evaluation picture; give others to train on")
    short = ["__".join(p.relative_to(root).with_suffix("").parts) for p in kept]
    return [Sample(name if short.count(name) == 1 else "__".join(p.relative_to(root).parts), p) for name, p in zip(short, kept)]


@functools.lru_cache(maxsize=4)
def _evaluation_pictures(benchmarks: tuple[str, ...], data_root: str) -> tuple[frozenset[str], frozenset[str]]:
    """File names (those long enough to tell a picture) and hashes of the evaluation pictures that are here."""
    here = []
    for name in benchmarks:
        with contextlib.suppress(DataError, WeightsError):  # a benchmark that is not here
            here += [sample.image for sample in load_benchmark(name, data_root).samples]
    return frozenset(p.stem for p in here if len(p.stem) > 8), frozenset(storage.image_sha256(p) for p in here)
