"""Unlabelled images to train on: collections by name, or any folder."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path

from fmbseg import files
from fmbseg.data import benchmarks, embedded, fetch, images
from fmbseg.data.benchmarks import LAYOUTS
from fmbseg.data.embedded import EMBEDDED
from fmbseg.data.samples import Sample
from fmbseg.errors import DataError, WeightsError

POOL = ("pool_objects_scenes", "pool_coco_45", "pool_pets_streets")
COLLECTIONS = {"embedded_pool": POOL, "embedded_objects": POOL, "embedded_coco": ("pool_coco_45",)}


def load_collection(name: str, data_root: str = "", evaluation: Sequence[str] | None = None) -> list[Sample]:
    """Unlabelled images: a collection's name, or any folder of images.

    Collections: ``embedded_pool`` (255), ``embedded_objects`` (155 of them), ``embedded_coco`` (45 of them, of COCO),
    ``coco_stuff_train`` and ``voc_images`` (both under data_root) and ``drawn``.

    An image that is also in an evaluation set that is here (same bytes or same file name) is left out. evaluation: names of
    those sets; none: all known ones. Raises WeightsError, DataError or ImageError when the collection is not here or empty.
    """
    if name == "drawn":
        return [Sample(s.name, s.image) for s in embedded.drawn().samples]
    if name in COLLECTIONS:
        found = [path for pool in COLLECTIONS[name] for path in images.find_images(fetch.require(pool))]
        root = fetch.require(POOL[0]).parent
        if name == "embedded_objects":  # 100 images of one town's streets and parks hold few kinds of things
            found = [path for path in found if path.parent.name != "enhancement"]
    else:
        under = Path(data_root).expanduser()
        own = {"coco_stuff_train": benchmarks.train_folder, "voc_images": benchmarks.voc_folder}
        root = own[name](under) if name in own else Path(name).expanduser()
        found = images.find_images(root)
    stems, hashes = _evaluation_images(tuple(evaluation or (*EMBEDDED, *(LAYOUTS if data_root else ()))), data_root)
    kept = [p for p in found if p.stem not in stems and files.sha256_of(p) not in hashes]
    if not kept:
        raise DataError(f"{name}: every image in it is an evaluation image; give others to train on")
    names = files.flat_names([p.relative_to(root) for p in kept], taken=("labels",))  # labels.json is a label folder's own
    return [Sample(name, p) for name, p in zip(names, kept)]


@functools.lru_cache(maxsize=4)
def _evaluation_images(names: tuple[str, ...], data_root: str) -> tuple[frozenset[str], frozenset[str]]:
    """File names (those long enough to tell an image) and hashes of the evaluation images that are here."""
    here = []
    for name in names:
        with contextlib.suppress(DataError, WeightsError):  # a benchmark that is not here
            here += [sample.image for sample in benchmarks.load_benchmark(name, data_root).samples]
    return frozenset(p.stem for p in here if len(p.stem) > 8), frozenset(files.sha256_of(p) for p in here)
