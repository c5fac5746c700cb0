"""How mIoU grows with training steps: Eq. 1 as written, with a temperature, and with both terms in full.

    python benchmarks/loss_growth.py                            the embedded profile's images, labels and columns
    python benchmarks/loss_growth.py --steps 2000 --only ours   one setting, a shorter run

A linear module from fresh weights (the paper's start), SGD with momentum at a constant rate, on the pseudo labels that
the profile keeps; every setting sees the same batches. The record says what each reached after how many steps.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

from fmbseg import cli, profiles
from fmbseg.data import images
from fmbseg.runs import evaluate, label, parallel, records, train
from fmbseg.runs.cache import Models
from fmbseg.stage2 import training
from fmbseg.stage2.metrics import Confusion
from fmbseg.stage2.segmenter import AlignedEncoder, Segmenter
from fmbseg.viz import charts, figures

LITERAL = {"temperature": 1.0, "text_weight": None, "image_weight": None}
SETTINGS = {
    "literal, rate 0.05": LITERAL | {"learning_rate": 0.05},
    "literal, rate 5": LITERAL | {"learning_rate": 5.0},
    "literal weights, temperature 0.07, rate 0.5": LITERAL | {"temperature": 0.07, "learning_rate": 0.5},
    "ours, rate 0.05": {"temperature": 0.2, "text_weight": 1.0, "image_weight": 1.0, "learning_rate": 0.05},
    "ours, rate 0.5": {"temperature": 0.2, "text_weight": 1.0, "image_weight": 1.0, "learning_rate": 0.5},
}
MILESTONES = (30, 100, 300, 1000, 3000, 10_000, 20_000)


def seen(p, column) -> tuple[Segmenter, list]:
    """A segmenter whose module is replaced as training goes on, and (encoder patches of every window, truth) of each image."""
    models = Models.of(p)
    embedder = AlignedEncoder(models.encoder, torch.nn.Identity(), "growth", p.device)
    segmenter = Segmenter(embedder, models.clip, p, p.templates)
    samples = parallel.evenly_spaced(column.samples, p.eval_limit)
    windows = [segmenter.through_windows(images.read_image(s.image), embedder.encode) for s in samples]
    return segmenter, list(zip(windows, (s.truth() for s in samples)))


def grow(name: str, p, data: train.PatchDataset, texts: torch.Tensor, column, kept, steps: int, share: float) -> list[dict]:
    """mIoU of one setting after every milestone."""
    segmenter, seen_images = kept
    space = evaluate.protocol_space(column, p)
    classes = data.classes()
    some = parallel.evenly_spaced(range(len(data)), p.standardise_images)
    module = training.new_module((data.patches(i) for i in some), data.width, texts.shape[1], p, p.seed).train()
    optimiser, loss_of = training.optimiser_of(module, p), training.loss_function(p)
    row_of, drawn = training.rows_of(classes), torch.Generator().manual_seed(p.seed)
    rows, step, started = [], 0, time.perf_counter()
    while step < steps:
        for patches, labels in training.batches(data, p.images_per_batch, p.seed + step):
            z = module(patches.float()).permute(0, 2, 3, 1).flatten(0, 2)
            y = row_of[labels.flatten()]
            y[torch.rand(len(y), generator=drawn) >= share] = -1
            if (y >= 0).any():
                loss = loss_of(z[y >= 0], y[y >= 0], texts[list(classes)])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            step += 1
            if step in MILESTONES or step == steps:
                segmenter.embedder.alignment = module.eval()
                counts = Confusion(len(space))
                for windows, truth in seen_images:
                    counts.add(truth, segmenter.label(segmenter.aligned(windows), segmenter.texts(space)))
                module.train()
                rows.append({"setting": name, "step": step, "loss": loss.item(), "miou": round(counts.miou(), 2)})
                print(f"{name:45s} step {step:6d}  loss {loss.item():8.4f}  mIoU {counts.miou():6.2f}", flush=True)
            if step >= steps:
                break
    print(f"{name:45s} {(time.perf_counter() - started) / steps * 1000:.1f} ms a step, evaluation included", flush=True)
    return rows


def growth(frame: pd.DataFrame) -> Figure:
    """mIoU against training steps, a line a setting. frame: columns setting, step, miou."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    for i, (setting, one) in enumerate(frame.groupby("setting", sort=False)):
        style = {"color": charts.COLOURS[i % len(charts.COLOURS)], "marker": charts.MARKERS[i % len(charts.MARKERS)]}
        axis.plot(one["step"], one["miou"], label=setting, linewidth=1.2, markersize=4, **style)
    axis.set_xscale("log")
    axis.set_xlabel("steps of 5 images")
    axis.set_ylabel("mIoU (%)")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="embedded")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--only", default="", help="settings whose names begin so")
    parser.add_argument("--column", default="embedded_coco_object80", help="the benchmark that is measured")
    parser.add_argument("--share", type=float, default=0.25, help="share of a batch's patches, drawn at random, that enter the loss")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="any parameter; may be given again")
    parser.add_argument("--out", type=Path, help="file of the record (default: results/<profile>/benchmarks/loss_growth.json)")
    options = parser.parse_args()
    plain = {"module": "linear", "prealign": False, "dense_weight": 0.0, "optimiser": "sgd"}
    p = profiles.load("evaluate", options.profile, plain | cli.settings(options.set))
    samples = label.collection(p)
    store, _ = label.label(samples, p)
    samples = train.prepare([s for s in samples if store.has(s)], p)
    data, (column,) = train.PatchDataset(samples, store, p), evaluate.find_benchmarks([options.column], p.data_root)
    kept, texts = seen(p, column), Models.of(p).texts(store.space).prototypes()
    rows = []
    for name, values in SETTINGS.items():
        if name.startswith(options.only):
            rows += grow(name, p.model_copy(update=values), data, texts, column, kept, options.steps, options.share)
    frame = pd.DataFrame(rows)
    print(frame.pivot(index="setting", columns="step", values="miou").to_string())
    out = options.out or records.results_folder(p) / "benchmarks" / "loss_growth.json"
    protocol = {"rows": rows, "settings": SETTINGS, "momentum": p.momentum, "patch_share": options.share, "training_images": len(samples)}
    number = len(kept[1])
    record = records.Record(
        "benchmark", "loss_growth", p.model_dump(), column.name, images=number, protocol=protocol, notes=records.notes_of(p)
    )
    record.write(out.parent, out.stem)
    figures.save(growth(frame), out.with_suffix(".png"))
    print(f"record: {out}")


if __name__ == "__main__":
    main()
