"""Which images a command line names, and where the results of each are written: no two in one place, nothing overwritten."""

from __future__ import annotations

import os
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from fmbseg import files
from fmbseg.data import images
from fmbseg.errors import ParameterError


def find(given: Sequence[str], out: Path) -> dict[Path, Path]:
    """The images that a command line names, each with the path of its results under ``out``, less their suffixes.

    given: files, folders, and patterns such as "photos/*.jpg"; an image that is named twice counts once, and those that
    ``fmbseg segment`` wrote are not taken. Results of a folder keep its sub-folders. Where images of several folders have one
    name, the results of all keep their folders, from the one that all have in common.
    Raises ParameterError for a pattern without an image, and where a result would replace a file of the user's or of another image.
    """
    found: dict[str, tuple[Path, Path]] = {}  # of an absolute path, the path as it was given and the short name
    for name in given:
        if "://" in name:
            raise ParameterError(f"{name}: is an address on the web; download it and give the file")
        paths, is_folder = [Path(name)], Path(name).is_dir()
        if is_folder:
            paths = images.find_images(name)
        elif not Path(name).exists() and any(c in name for c in "*?["):
            paths = sorted(Path(match) for match in glob(name, recursive=True) if Path(match).suffix.lower() in images.SUFFIXES)
            if not paths:
                raise ParameterError(f"{name}: no image matches it; give files, folders, or a pattern such as 'photos/*.jpg'")
        paths = [path for path in paths if not files.is_result(path)]
        for path in paths:
            found.setdefault(os.path.abspath(path), (path, path.relative_to(name) if is_folder else Path(path.name)))
    if not found:
        raise ParameterError(f"{', '.join(given)}: only results of fmbseg segment; give the images themselves")
    short = [name for _, name in found.values()]
    if len({files.folded(str(name)) for name in short}) < len(short):
        common = os.path.commonpath([os.path.dirname(path) for path in found])
        short = [Path(path).relative_to(common) for path in found]
    names = files.distinct_names(short)
    places = {path: out / name for (path, _), name in zip(found.values(), names)}
    for path, place in places.items():
        there = [file for suffix in files.RESULT_SUFFIXES if (file := beside(place, suffix)).exists()]
        if there and (other := files.result_of(beside(place, ".json"))) != os.path.abspath(path):
            whose = f"the result of {other}" if other else "no result of fmbseg segment"
            raise ParameterError(f"{there[0]}: is {whose}, and that of {path} would replace it; give another --out, or delete it")
    return places


def beside(place: Path, suffix: str) -> Path:
    """A file of the results at ``place``, whose name may have dots of its own."""
    return place.with_name(place.name + suffix)
