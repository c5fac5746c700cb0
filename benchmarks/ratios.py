"""What fmbseg's own code costs beside the least that it could: ratios, measured side by side in one process.

    python benchmarks/ratios.py                      all of them; record in results/embedded/benchmarks/ratios.json
    python benchmarks/ratios.py loss                 one of them

Both sides of a ratio take turns on one thread, and the best of the turns counts (of SAM and Stage 1, the median), so that other load
meets both alike. Rows that are not measured keep what the record says of them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from fmbseg import files, profiles
from fmbseg.data import benchmarks, images, label_spaces
from fmbseg.data.samples import Sample
from fmbseg.models import sam_decoder
from fmbseg.models.sam import load_sam, read_sam
from fmbseg.runs import modules, records, train
from fmbseg.runs.cache import Models
from fmbseg.runs.modules import Segmenter
from fmbseg.schemas import EvaluateRun
from fmbseg.stage1 import pseudo_labels
from fmbseg.stage2 import losses, metrics, training
from fmbseg.stage2.segmenter import words_space

from throughput import keep, peak_memory, reset_peak  # isort: skip


def best(turns: int, of: Callable[[list[float]], float] = min, **sides: Callable[[], object]) -> dict[str, float]:
    """Processor seconds of each side's best turn (or what else ``of`` makes of them); they take turns, after one that is not counted."""
    taken = {name: [] for name in sides}
    for _ in range(turns + 1):
        for name, work in sides.items():
            started = time.process_time()
            work()
            taken[name].append(time.process_time() - started)
    return {name: of(seconds[1:]) for name, seconds in taken.items()}


def row(what: str, target: float, over: float, under: float) -> dict:
    """One line of the record: seconds (or bytes) of both sides and their ratio."""
    made = {"what": what, "ratio": round(over / under, 3), "target": target, "over": round(over, 4), "under": round(under, 4)}
    print(f"{what}: {made['ratio']} (target {target}; {over:.4g} / {under:.4g})", flush=True)
    return made


def real_image(number: int = 0) -> np.ndarray:
    """(480, 640, 3), as most of COCO's."""
    sample = benchmarks.load_benchmark("embedded_coco_object81").samples[number]
    return images.resize(images.read_image(sample.image), (480, 640))


# ---------------------------------------------------------------- the loss, by blocks


def patches(n: int, width: int = 512, classes: int = 80) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, texts = (F.normalize(torch.randn(m, width, generator=generator), dim=1) for m in (n, classes))
    return z.requires_grad_(), torch.randint(classes, (n,), generator=generator), texts


def plain_log_sum_others(z: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The whole product at once, differentiated by torch."""
    return torch.logsumexp((z @ z.T / temperature).fill_diagonal_(-torch.inf), dim=1)


def peak_of_loss(n: int) -> None:
    """Print the bytes by which TSupCon's forward and backward over n patches raise this process's memory at most (Linux)."""
    losses.tsupcon(*patches(64), temperature=0.2).backward()
    reset_peak("cpu")
    before = peak_memory()
    losses.tsupcon(*patches(n), temperature=0.2).backward()
    print(peak_memory() - before)


def loss(turns: int) -> list[dict]:
    def step(others: Callable | None) -> Callable[[], None]:
        z, labels, texts = patches(4096)

        def work() -> None:
            z.grad = None
            blocks, losses.log_sum_others = losses.log_sum_others, others or losses.log_sum_others
            losses.tsupcon(z, labels, texts, temperature=0.2).backward()
            losses.log_sum_others = blocks

        return work

    taken = best(turns, blocks=step(None), plain=step(plain_log_sum_others))
    peak = {n: int(subprocess.check_output([sys.executable, __file__, "--peak-of-loss", str(n)])) for n in (4096, 32768)}
    return [
        row("TSupCon, 4,096 patches, forward and backward: seconds in blocks / seconds of the plain product", 1.3, *taken.values()),
        row("TSupCon, forward and backward: peak bytes of 32,768 patches / of 4,096 patches", 10, peak[32768], peak[4096]),
    ]


# ---------------------------------------------------------------- segmentation


def segment(turns: int) -> list[dict]:
    segmenter, image = Segmenter.load(modules.SHIPPED), real_image()
    pixels = []
    segmenter.through_windows(image, lambda one: pixels.append(one) or segmenter.embedder.encode(one))
    rows = []
    for vocabulary, count, target in (("coco_stuff171", 20, 1.1), ("coco_panoptic133", 133, 1.3), ("coco_stuff171", 171, 1.4)):
        space = words_space(label_spaces.vocabulary(vocabulary).names[:count])
        segmenter.texts(space)  # once for all images
        taken = best(
            turns,
            segment=lambda space=space: segmenter.segment(image, space),
            forward=lambda: [segmenter.embedder.encoder.encode(one) for one in pixels],
        )
        rows.append(row(f"segment an image, {count} classes / the encoder's forward passes", target, *taken.values()))
    return rows


def words(turns: int) -> list[dict]:
    segmenter, image = Segmenter.load(modules.SHIPPED), real_image()
    found = label_spaces.vocabulary("lvis1203+ade847+context459+coco_stuff171").names[:2000]
    assert len(found) == 2000
    space = words_space(found)
    texts = best(1, texts=lambda: segmenter.clip.encode_text([f"a photo of a {word}" for word in found[:256]]))["texts"]
    print(f"text features of 256 words: {texts:.2f} s")
    taken = best(turns, segment=lambda: segmenter.segment(image, space))["segment"]
    return [
        row("segment an image of 640 x 480 into 2,000 words: seconds / 3", 1.0, taken, 3),
        row("segment an image of 640 x 480 into 2,000 words: peak bytes of the process / 2 GB", 1.0, peak_memory(), 2e9),
    ]


# ---------------------------------------------------------------- counting


def counting(turns: int) -> list[dict]:
    from torchmetrics.classification import MulticlassJaccardIndex

    random = np.random.default_rng(0)
    truth, prediction = (random.integers(0, 171, (24, 32), np.int16).repeat(20, 0).repeat(20, 1) for _ in range(2))
    truth[:40] = images.IGNORED
    confusion, metric = metrics.Confusion(171), MulticlassJaccardIndex(171, ignore_index=images.IGNORED)
    given = torch.from_numpy(prediction), torch.from_numpy(truth)
    taken = best(5 * turns, ours=lambda: confusion.add(truth, prediction), theirs=lambda: metric.update(*given))
    return [row("count an image of 640 x 480, 171 classes / torchmetrics' MulticlassJaccardIndex", 0.15, *taken.values())]


# ---------------------------------------------------------------- training


class Truth:
    """What a training reads of a label store: here the truth of an evaluation set, so that every patch counts."""

    def read(self, sample: Sample) -> np.ndarray:
        return sample.truth()


def training_step(turns: int) -> list[dict]:
    """A training of 20 images, 1 epoch (4 steps of 5 images, read from the cache), against the bare steps on the same batches in memory."""
    dataset, rows = benchmarks.load_benchmark("embedded_coco_panoptic133"), []
    for module in ("linear", "mlp", "transformer"):
        params = profiles.load("train", "embedded", {"module": module, "epochs": 1})
        data = train.PatchDataset(train.prepare(dataset.samples, params), Truth(), params)
        classes, texts = data.classes(), Models.of(params).texts(dataset.space).prototypes()
        texts, table, loss_of = texts[list(classes)], training.rows_of(classes), training.loss_function(params)
        start = training.new_module((data.patches(i) for i in range(len(data))), data.width, texts.shape[1], params)
        loaded = [(patches.float(), table[y.flatten()]) for patches, y in training.batches(data, params.images_per_batch, params.seed)]

        def bare(start=start, loaded=loaded, texts=texts, loss_of=loss_of, epochs=params.epochs) -> None:
            for patches, y in loaded * epochs:
                start.zero_grad()
                z = start(patches).permute(0, 2, 3, 1).flatten(0, 2)
                loss_of(z[y >= 0], y[y >= 0], texts).backward()

        taken = best(turns, train=lambda given=(data, classes, texts, start, params): training.train(*given), bare=bare)
        what = f"training step, {module} module, input included / its forward and backward plus loss"
        rows.append(row(what, 1.3, *taken.values()))
    return rows


# ---------------------------------------------------------------- SAM and Stage 1


def sam(turns: int) -> list[dict]:
    """SAM's encoder and its automatic masks, each turn of another image, beside the package's own on the same network."""
    from segment_anything import SamAutomaticMaskGenerator

    params, several = profiles.load("evaluate", "embedded"), [real_image(number) for number in range(turns + 1)]
    ours, package = load_sam(params.sam), read_sam(params.sam).eval()
    square = torch.from_numpy(several[0]).permute(2, 0, 1)[None].float()
    square = package.preprocess(F.interpolate(square, (768, 1024), mode="bilinear"))
    with torch.no_grad():
        encoders = best(
            turns, statistics.median, ours=lambda: ours.model.image_encoder(square), package=lambda: package.image_encoder(square)
        )
    rows = [row("SAM's image encoder / the package's own call", 0.75, *encoders.values())]

    given, batch = (params.predicted_iou, params.stability, params.box_nms), params.points_per_batch
    generator = SamAutomaticMaskGenerator(package, params.points_per_side, batch, *given[:2], box_nms_thresh=given[2])
    made, expected, mine, theirs = [], [], iter(several), iter(several)
    taken = best(
        turns,
        statistics.median,
        ours=lambda: made.append(ours.automatic_masks(next(mine), params.points_per_side, batch, *given)),
        package=lambda: expected.append(generator.generate(next(theirs))),
    )
    overlaps = [
        max(((one["segmentation"] & mask.mask).sum() / (one["segmentation"] | mask.mask).sum() for mask in masks), default=0)
        for masks, package_masks in zip(made, expected)
        for one in package_masks
    ]
    same = f"{sum(o >= 0.99 for o in overlaps)} of its {len(overlaps)} masks with IoU >= 0.99, {sum(map(len, made))} made"
    points = f"{params.points_per_side**2} points, {batch} at once"
    return [*rows, row(f"automatic masks of an image, {points} / the package's generator", 0.55, *taken.values()) | {"masks": same}]


def stage1(turns: int) -> list[dict]:
    """Stage 1 of an image in memory beside the calls of its models alone, with the same inputs."""
    params = profiles.load("evaluate", "embedded")
    models, space = Models.of(params), label_spaces.vocabulary(params.vocabulary, params.words)
    clip, segmenter, texts = models.clip, models.sam, models.texts(space)
    shown = itertools.cycle((real_image(0), real_image(1)))  # in turns, so that SAM's encoder sees an image anew each time
    places = [(clip, "_encode"), (segmenter.model.image_encoder, "forward"), (sam_decoder, "decode")]

    def ratio(what: str, stages: str) -> dict:
        staged = params.model_copy(update={"stages": stages})
        replayed = itertools.cycle([calls(next(shown), staged) for _ in range(2)])
        taken = best(
            turns, statistics.median, stage1=lambda: label(next(shown), staged), models=lambda: [call() for call in next(replayed)]
        )
        return row(f"{what} of an image / the forward passes of CLIP, SAM's encoder and its decoder", 1.15, *taken.values())

    def label(image: np.ndarray, staged: EvaluateRun) -> None:
        pseudo_labels.label_image(image, clip, segmenter, texts, staged)

    def calls(image: np.ndarray, staged: EvaluateRun) -> list[Callable[[], object]]:
        noted = []

        def noting(call: Callable) -> Callable:
            return lambda *given: noted.append(lambda: call(*given)) or call(*given)

        with contextlib.ExitStack() as stack:
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, noting(getattr(owner, name))))
            label(image, staged)
        return noted

    with torch.inference_mode():
        return [ratio("Stage 1.1", "1.1"), ratio("Stages 1.1 and 1.2", "both")]


MEASURED = {
    "loss": loss,
    "segment": segment,
    "words": words,
    "counting": counting,
    "training": training_step,
    "sam": sam,
    "stage1": stage1,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("which", nargs="*", metavar="WHICH", help=f"of {', '.join(MEASURED)} (default: all)")
    parser.add_argument("--turns", type=int, default=7, help="turns of each side; the best counts")
    parser.add_argument("--out", type=Path, help="file of the record (default: results/embedded/benchmarks/ratios.json)")
    parser.add_argument("--peak-of-loss", type=int, metavar="PATCHES", help=argparse.SUPPRESS)  # what `loss` calls, in a process of its own
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.which) - set(MEASURED))
    if unknown:
        parser.error(f"no such ratio: {', '.join(unknown)}; known are {', '.join(MEASURED)}")
    torch.set_num_threads(1)
    if options.peak_of_loss:
        return peak_of_loss(options.peak_of_loss)
    started, params = time.perf_counter(), profiles.load("evaluate", "embedded")
    rows = [one for which in options.which or MEASURED for one in MEASURED[which](options.turns)]
    out = options.out or records.results_folder(params) / "benchmarks" / "ratios.json"
    if out.is_file():
        before = files.read_json(out)["protocol"]["ratios"]
        rows = [one for one in before if one["what"] not in {new["what"] for new in rows}] + rows
    keep("ratios", params, {"threads": 1, "turns": options.turns, "ratios": rows}, started, out)


if __name__ == "__main__":
    main()
