"""Unlabelled images to train on: collections by name, or any folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from fmbseg import files
from fmbseg.data import benchmarks, fetch, images
from fmbseg.data.benchmarks import EMBEDDED, LAYOUTS, UNLABELLED
from fmbseg.data.samples import Sample
from fmbseg.errors import DataError, ImageError, WeightsError, tell

POOL = ("pool_objects_scenes", "pool_coco_45", "pool_pets_streets")
COLLECTIONS = {"embedded_pool": POOL, "embedded_objects": POOL, "embedded_coco": ("pool_coco_45",)}


def load_collection(name: str, data_root: str = "", evaluated: Sequence[str] = ()) -> list[Sample]:
    """Unlabelled images: a collection's name, or any folder of images.

    Collections: ``embedded_pool`` (255), ``embedded_objects`` (155 of them), ``embedded_coco`` (45 of them, of COCO),
    ``coco_stuff_train`` and ``voc_images`` (both under data_root) and ``drawn``.

    Images that an evaluation set on this machine also holds (the same bytes, whatever their name) are left out with a warning,
    and so are files that cannot be read. evaluated: benchmarks of the run, besides all known ones. Raises WeightsError,
    DataError or ImageError when the collection is not here or no image is left.
    """
    if name == "drawn":
        return [Sample(s.name, s.image) for s in benchmarks.drawn().samples]
    if name in COLLECTIONS:
        found = [path for pool in COLLECTIONS[name] for path in images.find_images(fetch.require(pool))]
        root = fetch.require(POOL[0]).parent
        if name == "embedded_objects":  # without 100 images of one town's streets and parks, which show few kinds of things
            found = [path for path in found if path.parent.name != "enhancement"]
    else:
        under = Path(data_root).expanduser()
        layout = UNLABELLED.get(name)
        root = layout.require(name, under) / layout.parts["images"] if layout else Path(name).expanduser()
        found = images.find_images(root)
    sizes, others = _sizes(found), _sizes(_evaluation_images((*EMBEDDED, *(LAYOUTS if data_root else ()), *evaluated), data_root))
    if not sizes:
        raise DataError(f"{name}: none of its {len(found)} images can be read, such as {found[0]}; put them back, or give others")
    both = set(sizes.values()) & set(others.values())  # only files of one size can have the same bytes
    hashes = {files.sha256_of(p) for p, size in others.items() if size in both}
    kept = [p for p, size in sizes.items() if size not in both or files.sha256_of(p) not in hashes]
    _left_out[name, data_root, tuple(evaluated)] = len(sizes) - len(kept)
    if not kept:
        raise DataError(f"{name}: every image in it is one of a benchmark that fmbseg evaluates on; pseudo labels are made of others only")
    if len(kept) < len(sizes):
        tell(f"{name}: left out {len(sizes) - len(kept)} of {len(sizes)} images, which are evaluated on (the same bytes)")
    names = files.flat_names(
        [Path(str(p).removeprefix(os.path.join(root, ""))) for p in kept], taken=("labels",)
    )  # labels.json is a label folder's own
    return [Sample(name, p) for name, p in zip(names, kept)]


_left_out: dict[tuple[str, str, tuple[str, ...]], int] = {}


def left_out(name: str, data_root: str = "", evaluated: Sequence[str] = ()) -> int | None:
    """How many images ``load_collection`` with these arguments left out because they are evaluated on; None before it is called."""
    return _left_out.get((name, data_root, tuple(evaluated)))


def _evaluation_images(names: Iterable[str], data_root: str) -> list[Path]:
    found = []
    for name in dict.fromkeys(names):
        with contextlib.suppress(DataError, ImageError, WeightsError):  # a benchmark that is not here
            found += [sample.image for sample in benchmarks.load_benchmark(name, data_root).samples]
    return found


def _sizes(paths: Iterable[Path]) -> dict[Path, int]:
    """Size in bytes of each file, in their order; files that cannot be opened are left out with a warning."""
    found = {}
    for path in paths:
        try:
            opened = os.open(path, os.O_RDONLY)
            found[path] = os.fstat(opened).st_size
            os.close(opened)
        except OSError as error:
            tell(f"{path}: left out, for it cannot be read ({error.strerror})")
    return found
