"""How fast the explorer (notebook 09) answers: seconds from a change of a control to the finished images.

    python benchmarks/interaction.py
    python benchmarks/interaction.py --profile smoke --repeats 10

Wall time (median and worst) and processor time (median) of each kind of change, once the image is in; then what
happens once an image. The browser's own drawing and the way there are not in it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable

import torch

from fmbseg import profiles
from fmbseg.runs import label
from fmbseg.viz import explorer

from throughput import hardware  # isort: skip


def machine() -> str:
    """Name of the processor, how many cores this process may use, how many threads it does, and how busy they are."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return f"{hardware('cpu')}, {torch.get_num_threads()} threads, load {load}"


def measure(change: Callable[[], None], repeats: int) -> tuple[list[float], list[float]]:
    """(wall, processor) seconds of each of several runs."""
    wall, processor = [], []
    for _ in range(repeats):
        started = time.perf_counter(), time.process_time()
        change()
        wall.append(time.perf_counter() - started[0])
        processor.append(time.process_time() - started[1])
    return wall, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="embedded")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    p = profiles.load("explore", options.profile)
    once = {}
    started = time.perf_counter()
    widget = explorer.Explore(p, label.collection(p))
    once["start: models loaded, first image in"] = time.perf_counter() - started
    counter = itertools.count()
    shares = itertools.cycle((0.2, 0.35, 0.5, 0.65, 0.8))
    changes = {
        "a new word": lambda: setattr(widget.words, "value", f"{p.words}, word {next(counter)}"),
        "known words": lambda: setattr(widget.words, "value", (p.words, f"{p.words}, word 0")[next(counter) % 2]),
        "threshold": lambda: setattr(widget.threshold, "value", next(shares)),
        "opacity": lambda: setattr(widget.opacity, "value", next(shares)),
        "a point": lambda: setattr(widget.panels, "point", [next(shares), next(shares)]),
    }
    found = {name: measure(change, options.repeats) for name, change in changes.items()}
    started = time.perf_counter()
    widget.tabs.selected_index = 1
    once["Stage 1 opened: SAM sees the image"] = time.perf_counter() - started
    found["Stage 1: known words"] = measure(changes["known words"], options.repeats)
    started = time.perf_counter()
    widget.find.click()
    once["automatic masks"] = time.perf_counter() - started
    found["Stage 1: known words, with automatic masks"] = measure(changes["known words"], options.repeats)
    print(machine())
    height, width = widget.explorer.image.shape[:2]
    module = "with" if widget.explorer.segmenter else "without"
    print(f"profile {options.profile}, image of {width} x {height} pixels, {module} a trained module, words: {p.words}")
    print(f"{'change':45s}{'median s':>10s}{'worst s':>10s}{'CPU s':>10s}")
    for name, (wall, processor) in found.items():
        print(f"{name:45s}{statistics.median(wall):10.3f}{max(wall):10.3f}{statistics.median(processor):10.3f}")
    for name, seconds in once.items():
        print(f"{name:45s}{seconds:10.1f}   once")


if __name__ == "__main__":
    main()
