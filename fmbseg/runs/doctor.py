"""Report of installed packages, weights and data, with the command that brings each missing part."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch

from fmbseg import files
from fmbseg.data import benchmarks, fetch, images
from fmbseg.errors import FmbsegError
from fmbseg.runs import records

LOOKED_AT = 2000
"""How many masks of a folder data set, evenly spread, are read; this takes seconds."""


def _line(good: bool, what: str, how: str = "") -> str:
    return f"  {'ok     ' if good else 'missing'}  {what}{'' if good else '   ->  ' + how}"


def _found(what: str, wrong: str) -> str:
    return f"  check    {what}   ->  {wrong}" if wrong else _line(True, what)


def report(data_root: str = "") -> str:
    """The whole report as text."""
    lines = ["packages"]
    for package, version in records.versions().items():
        good = version != "not installed"
        lines.append(_line(good, f"{package} {version}", f"pip install -c constraints.txt {package}"))
    devices = ["cpu"] + [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    lines += ["", f"devices: {', '.join(devices)}"]
    free = shutil.disk_usage(next(p for p in (files.home(), *files.home().parents) if p.exists())).free / 1e9
    lines += [f"files:   {files.home()} ({free:.0f} GB free; FMBSEG_HOME sets another place)", "", "weights and images"]
    for weight in fetch.TABLE:
        here = fetch.is_here(weight)
        damaged = fetch.verify(weight) if here and weight.source != "hub" else []
        what = f"{weight.name:20s}{weight.use:22s}{'/'.join(weight.profiles) or '-':10s}{weight.megabytes:6.0f} MB"
        if damaged:
            lines.append(f"  damaged  {what}   ->  fmbseg fetch {weight.name} --again   ({', '.join(damaged)})")
        else:
            lines.append(_line(here, what, f"fmbseg fetch {weight.name}"))
    return "\n".join([*lines, "", *_data(data_root)])


def _data(data_root: str) -> list[str]:
    """Benchmarks and training images with their number of images; for missing ones the official source."""
    root = Path(data_root).expanduser() if data_root else None
    lines = [f"benchmarks under {root}" if root else "benchmarks (give --data-root FOLDER for those in official layouts)"]
    wanted: dict[str, str] = {}
    for name in benchmarks.BENCHMARKS:
        layout = benchmarks.LAYOUTS.get(name)
        try:
            found = benchmarks.load_benchmark(name, data_root)
            official = f" of the official {layout.images}" if layout else ""
            incomplete = [s for s in found.samples if not (s.image.is_file() and (s.mask is None or s.mask.is_file()))]
            what = f"{name:28s}{len(found.samples) - len(incomplete)}{official} images, {len(found.space)} classes"
            gaps = f"{len(incomplete)} images or masks are not there, such as {incomplete[0]}" if incomplete else ""
            lines.append(_found(what, gaps))
        except (FmbsegError, OSError) as error:
            missing = layout.missing(root) if layout and root else []
            if layout and (missing or not root):
                wanted[layout.source] = layout.folder
                there = layout.count(root) if root else 0
                what = ", ".join(missing) or layout.folder
                lines.append(_line(False, f"{name:28s}{f'{there} images are here; ' if there else ''}no {what}", "see below"))
            else:
                lines.append(_line(False, name, str(error).removeprefix(f"{name}: ")))
    if root:
        lines += [_folder_line(folder) for folder in (root, *sorted(root.glob("*"))) if _may_be_set(folder)]
    lines += ["", "images to train on"]
    for name, layout in benchmarks.UNLABELLED.items():
        there = layout.count(root) if root else 0
        lines.append(_line(there > 0, f"{name:28s}{there} of the official {layout.images} images", layout.source))
    if wanted:
        lines += ["", "official sources of the benchmarks that are missing"]
        lines += [f"  {folder:24s}{bring}" for bring, folder in wanted.items()]
    return lines


def _may_be_set(folder: Path) -> bool:
    """Whether a folder is meant as a folder data set: it has two of the three parts, or it cannot be read."""
    there = sum(os.path.exists(folder / part) for part in benchmarks.FOLDER_PARTS)
    return folder.is_dir() and (there >= 2 or not os.access(folder, os.R_OK | os.X_OK))


def _folder_line(folder: Path) -> str:
    """A folder data set, with faults of its classes and of its masks (at most LOOKED_AT are read)."""
    try:
        found = benchmarks.folder_set(folder)
        pixels, failed = np.zeros(len(found.space), int), []
        looked_at = found.samples[:: -(-len(found.samples) // LOOKED_AT)]
        for sample in looked_at:
            try:
                pixels += images.class_pixels(sample.truth(), len(found.space))
            except FmbsegError as error:
                failed.append(f"{error}")
        told = [f"{len(failed)} of {len(looked_at)} masks cannot be used, such as {failed[0]}"] if failed else []
        told += [absent] if (absent := benchmarks.unseen(found, pixels)) else []
        return _found(f"{'folder:' + folder.name:28s}{len(found.samples)} images, {len(found.space)} classes", "; ".join(told))
    except (FmbsegError, OSError) as error:
        return _line(False, f"folder:{folder.name}", str(error))
