"""What is installed, which weights and data are here, what is missing and the command that brings it."""

from __future__ import annotations

import shutil

import torch

from fmbseg import datasets, records, storage, weights
from fmbseg.errors import FmbsegError


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
    free = shutil.disk_usage(next(p for p in (storage.home(), *storage.home().parents) if p.exists())).free / 1e9
    lines += [f"files:   {storage.home()} ({free:.0f} GB free; FMBSEG_HOME sets another place)", "", "weights and photographs"]
    for weight in weights.TABLE:
        here = weights.is_here(weight)
        damaged = weights.verify(weight) if here and weight.source != "hub" else []
        what = f"{weight.name:20s}{weight.use:22s}{'/'.join(weight.profiles) or '-':10s}{weight.megabytes:6.0f} MB"
        if damaged:
            lines.append(f"  damaged  {what}   ->  fmbseg fetch {weight.name} --again   ({', '.join(damaged)})")
        else:
            lines.append(_line(here, what, f"fmbseg fetch {weight.name}"))
    lines += ["", f"benchmarks{' under ' + data_root if data_root else ''}"]
    for name in datasets.BENCHMARKS:
        try:
            found = datasets.load_benchmark(name, data_root)
            lines.append(_line(True, f"{name:28s}{len(found.samples)} images, {len(found.space)} classes"))
        except FmbsegError as error:
            lines.append(_line(False, name, str(error).removeprefix(f"{name}: ")))
    return "\n".join(lines)
