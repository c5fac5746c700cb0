"""How time and memory grow: with the number of images, classes and patches, and with the size of an image.

    python benchmarks/scaling.py            record and chart: results/embedded/benchmarks/scaling.json and scaling.svg
    python benchmarks/scaling.py images     one of them

The images are simulated, up to the 118,287 of COCO; what label and train do beside the models is measured with constants in place of
the models. One thread; processor seconds of the best of the turns, and the bytes by which a turn raises the process's memory at most. The slope
is that of the least-squares line through the logarithms: 1 is linear growth, 0 none.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from fmbseg import files, profiles
from fmbseg.data import collections, images, label_spaces
from fmbseg.data.samples import Sample
from fmbseg.runs import label, modules, packs, train
from fmbseg.runs.modules import Segmenter
from fmbseg.schemas import TrainRun
from fmbseg.stage1.pseudo_labels import PseudoLabel
from fmbseg.stage2 import losses
from fmbseg.stage2.segmenter import words_space

from ratios import patches, real_image  # isort: skip
from throughput import keep, peak_memory, reset_peak  # isort: skip

Work = Callable[[], object]
MEASURED: dict[str, tuple[str, str, Callable[[], Iterator[tuple[int, Work]]], bool]] = {}
"""name -> (what is done, unit of its size, its (size, work) one after the other, whether the first turn is the only one)."""

COLLECTIONS = (1_183, 11_829, 118_287)
"""Numbers of images: COCO's training set, its tenth and its hundredth part."""


def measured(what: str, unit: str, once: bool = False):
    def add(sizes: Callable[[], Iterator[tuple[int, Work]]]):
        MEASURED[sizes.__name__] = what, unit, sizes, once
        return sizes

    return add


@measured("list and check a folder of images", "images")
def collection() -> Iterator[tuple[int, Work]]:
    for n in COLLECTIONS:
        with tempfile.TemporaryDirectory() as folder:
            for i in range(n):
                Path(folder, f"{i:012d}.jpg").touch()
            yield n, lambda folder=folder: collections.load_collection(folder)


@measured("find and read 1,000 packed pseudo labels", "images")
def labels() -> Iterator[tuple[int, Work]]:
    for n in (1_000, 4_000, 16_000):
        with tempfile.TemporaryDirectory() as folder:
            for start in range(0, n, packs.PACK):
                made = [Path(folder, f"{i:012d}.png") for i in range(start, start + packs.PACK)]
                for path in made:
                    path.write_bytes(b"label")
                packs.Packs(Path(folder, "packed")).add(made)
            here, some = packs.Packs(Path(folder, "packed")), [f"{i * n // 1000:012d}.png" for i in range(1000)]
            here.read(some[0])  # the first finds out where all lie
            yield n, lambda here=here, some=some: [here.read(name) for name in some]


@contextmanager
def bookkeeping(n: int) -> Iterator[tuple[TrainRun, list[Sample]]]:
    """Parameters and n images of 8 x 8 pixels in a home of their own, with constants in the place of Stage 1 and the encoder."""
    pixel = io.BytesIO()
    Image.new("RGB", (8, 8)).save(pixel, "png")
    p = profiles.load("train", "smoke", {"reference_images": 0, "keep_features": False, "epochs": 1, "images_per_batch": 64})
    made = PseudoLabel(np.arange(64, dtype=np.int16).reshape(8, 8) % 3, [], [], [])
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, FMBSEG_HOME=folder), ExitStack() as stack:
        for name, constant in (
            ("label.label_cached", lambda *_: made),
            ("cache.encode", lambda pixels, _: torch.arange(64.0).reshape(1, 16, 2, 2).repeat(len(pixels), 1, 1, 1).half()),
            ("cache.encoder_pixels", lambda path, *_: torch.full((8, 8, 3), len(images.read_image(path)), dtype=torch.uint8)),
        ):
            stack.enter_context(mock.patch(f"fmbseg.runs.{name}", constant))
        place = Path(folder, "images")
        place.mkdir()
        for i in range(n):
            (place / f"{i:012d}.png").write_bytes(pixel.getvalue() + b"%d" % i)  # no two of the same bytes
        p = p.model_copy(update={"collection": str(place), "results_dir": folder})
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield p, label.collection(p)


@measured("all of label but the models", "images", once=True)
def labelling() -> Iterator[tuple[int, Work]]:
    for n in COLLECTIONS:
        with bookkeeping(n) as (p, samples):
            yield n, lambda p=p, samples=samples: label.label(samples, p)


@measured("all of train but the encoder, one epoch", "images", once=True)
def training() -> Iterator[tuple[int, Work]]:
    for n in COLLECTIONS:
        with bookkeeping(n) as (p, samples):
            store, _ = label.label(samples, p)
            yield n, lambda p=p, samples=samples, store=store: train.train(samples, store, p, Path(p.results_dir, "module.safetensors"))


@measured("segment an image of 640 x 480", "classes")
def classes() -> Iterator[tuple[int, Work]]:
    segmenter, image = Segmenter.load(modules.SHIPPED), real_image()
    names = label_spaces.vocabulary("coco_stuff171").names
    for k in (10, 40, 160):
        space = words_space(names[:k])
        segmenter.texts(space)  # once for all images
        yield k, lambda space=space: segmenter.segment(image, space)


@measured("TSupCon, forward and backward", "patches")
def loss() -> Iterator[tuple[int, Work]]:
    for n in (512, 2048, 8192):
        given = patches(n)
        yield n, lambda given=given: losses.tsupcon(*given, temperature=0.2).backward()


@measured("segment an image into 20 classes", "pixels")
def size() -> Iterator[tuple[int, Work]]:
    segmenter, space = Segmenter.load(modules.SHIPPED), words_space(label_spaces.vocabulary("coco_stuff171").names[:20])
    segmenter.texts(space)
    for height, width in ((240, 320), (480, 640), (960, 1280), (1920, 2560)):
        image = images.resize(real_image(), (height, width))
        yield height * width, lambda image=image: segmenter.segment(image, space)


def measure(work: Work, turns: int, once: bool = False) -> tuple[float, int]:
    """(processor seconds of the best turn, bytes by which memory rose at most in any turn), after one turn that is not counted.

    once: the first turn is the only one, for a second finds all done.
    """
    if not once:
        work()
    seconds, peaks = [], []
    for _ in range(1 if once else turns):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or freed memory that the process still holds would hide the peak
        reset_peak("cpu")
        before, started = peak_memory(), time.process_time()
        work()
        seconds.append(time.process_time() - started)
        peaks.append(peak_memory() - before)
    return min(seconds), max(peaks)


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    return round(float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-9)), 1)[0]), 2)


def chart(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(1, len(rows), figsize=(3.2 * len(rows), 3), layout="constrained", squeeze=False)
    for axis, row in zip(axes[0], rows):
        axis.loglog(row["sizes"], row["seconds"], "o-", label=f"seconds, slope {row['slope_of_seconds']}")
        axis.loglog(row["sizes"], np.array(row["bytes"]) / 1e9, "s--", label=f"GB, slope {row['slope_of_bytes']}")
        axis.set_title(row["what"], fontsize=9)
        axis.set_xlabel(row["unit"])
        axis.legend(fontsize=8)
    with files.atomic_path(path) as part:
        figure.savefig(part, format="svg", metadata={"Date": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("which", nargs="*", choices=[[], *MEASURED], help=f"of {', '.join(MEASURED)} (default: all)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each; the best counts")
    parser.add_argument("--out", type=Path, help="file of the record (default: results/embedded/benchmarks/scaling.json)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started, params, rows = time.perf_counter(), profiles.load("evaluate", "embedded"), []
    for name in options.which or MEASURED:
        what, unit, sizes, once = MEASURED[name]
        found = [(n, *measure(work, options.turns, once)) for n, work in sizes()]
        numbers, seconds, peaks = (list(column) for column in zip(*found))
        rows.append({"what": what, "unit": unit, "sizes": numbers, "seconds": [round(s, 5) for s in seconds], "bytes": peaks})
        rows[-1] |= {"slope_of_seconds": slope(numbers, seconds), "slope_of_bytes": slope(numbers, peaks)}
        print(rows[-1], flush=True)
    out = keep("scaling", params, {"threads": 1, "turns": options.turns, "growth": rows}, started, options.out)
    chart(rows, out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
