"""What is installed, which weights and data are here, what is missing and the command that brings it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from fmbseg import files
from fmbseg.data import benchmarks, fetch
from fmbseg.errors import FmbsegError
from fmbseg.runs import records


def _line(good: bool, what: str, how: str = "") -> str:
    return f"  {'ok     ' if good else 'missing'}  {what}{'' if good else '   ->  ' + how}"


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
    """Which benchmarks and images are here, how many of how many, what is missing and where it officially comes from."""
    root = Path(data_root).expanduser() if data_root else None
    lines = [f"benchmarks under {root}" if root else "benchmarks (give --data-root FOLDER for those in official layouts)"]
    wanted: dict[str, str] = {}
    for name in benchmarks.BENCHMARKS:
        layout = benchmarks.LAYOUTS.get(name)
        try:
            found = benchmarks.load_benchmark(name, data_root)
            official = f" of the official {layout.images}" if layout else ""
            lines.append(_line(True, f"{name:28s}{len(found.samples)}{official} images, {len(found.space)} classes"))
        except FmbsegError as error:
            missing = layout.missing(root) if layout and root else []
            if layout and (missing or not root):
                wanted[layout.folder] = layout.source
                there = layout.count(root) if root else 0
                what = ", ".join(missing) or layout.folder
                lines.append(_line(False, f"{name:28s}{f'{there} images are here; ' if there else ''}no {what}", "see below"))
            else:
                lines.append(_line(False, name, str(error).removeprefix(f"{name}: ")))
    if root:
        for folder in sorted(p for p in root.glob("*") if all((p / part).exists() for part in benchmarks.FOLDER_PARTS)):
            lines.append(_folder_line(folder))
    lines += ["", "images to train on"]
    there = benchmarks.TRAIN.count(root) if root else 0
    lines.append(
        _line(there > 0, f"{'coco_stuff_train':28s}{there} of the official {benchmarks.TRAIN.images} images", benchmarks.TRAIN.source)
    )
    if wanted:
        lines += ["", "official sources of the benchmarks that are missing"]
        lines += [f"  {folder:24s}{bring}" for folder, bring in wanted.items()]
    return lines


def _folder_line(folder: Path) -> str:
    try:
        found = benchmarks.folder_set(folder)
        return _line(True, f"{'folder:' + folder.name:28s}{len(found.samples)} images, {len(found.space)} classes")
    except FmbsegError as error:
        return _line(False, f"folder:{folder.name}", str(error))
