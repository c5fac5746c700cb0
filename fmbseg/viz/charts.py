"""Charts of numbers: losses, tables, comparisons. Functions of frames that return a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fmbseg.viz.figures import InlineFigure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's colours, which differ also without full colour vision; variants differ in marker and place too."""
MARKERS = "osD^vPX*"  # one more than colours: no pair of the two comes twice among many


def loss_curve(steps: pd.DataFrame, smooth: int = 10) -> Figure:
    """Loss a step, its running mean, and the learning rate."""
    figure = InlineFigure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot(steps["step"], steps["loss"], color="0.75", label="loss")
    axis.plot(steps["step"], steps["loss"].rolling(smooth, min_periods=1).mean(), color="#0072b2", label=f"mean of {smooth} steps")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    rate = axis.twinx()
    rate.plot(steps["step"], steps["learning_rate"], color="#d55e00", linestyle=":", label="learning rate (right)")
    rate.set_ylim(bottom=0)
    handles = axis.get_legend_handles_labels()[0] + rate.get_legend_handles_labels()[0]
    axis.legend(handles=handles, loc="upper right", fontsize=8)
    return figure


def table_figure(frame: pd.DataFrame) -> Figure:
    """mIoU of every method as bars, one group a column."""
    wide = frame.pivot_table(index=["dataset", "images"], columns="row", values="miou", sort=False)
    figure = InlineFigure(figsize=(1.5 + 2.2 * len(wide), 3.4), layout="constrained")
    axis = figure.subplots()
    colours = matplotlib.colormaps["cividis"](np.linspace(0.05, 0.95, wide.shape[1]))
    wide.plot.bar(ax=axis, color=colours, edgecolor="0.3", width=0.8, rot=0)
    axis.set_xticklabels([f"{name.removeprefix('embedded_')}\nn={int(images)}" for name, images in wide.index], fontsize=8)
    axis.set_ylabel("mIoU (%)")
    axis.set_xlabel("; ".join(sorted(set(frame["notes"]) - {""})), fontsize=8)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def curves(frame: pd.DataFrame, smooth: int = 10) -> Figure:
    """Running mean of the loss of every variant, a panel each (the losses differ in scale); one line a seed.

    frame: columns variant, seed, step, loss.
    """
    variants = list(dict.fromkeys(frame["variant"]))
    figure = InlineFigure(figsize=(3.2 * len(variants), 2.8), layout="constrained")
    for axis, variant in zip(figure.subplots(1, len(variants), squeeze=False)[0], variants):
        for i, (seed, one) in enumerate(frame[frame["variant"] == variant].groupby("seed")):
            mean = one["loss"].rolling(smooth, min_periods=1).mean()
            axis.plot(one["step"], mean, color=COLOURS[i % len(COLOURS)], linewidth=1, label=f"seed {seed}")
        axis.set_title(variant, fontsize=9)
        axis.set_xlabel("step")
    figure.axes[0].set_ylabel(f"loss (mean of {smooth} steps)")
    figure.axes[-1].legend(fontsize=7)
    return figure


def seeds(summary: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """mIoU of every variant, a panel a benchmark: a point a seed, a bar for the mean.

    summary: the frame of ``ablations.summary``; runs: a row a run, columns dataset, method, miou.
    """
    datasets = list(dict.fromkeys(summary["dataset"]))
    figure = InlineFigure(figsize=(3.4 * len(datasets), 3), layout="constrained")
    for axis, dataset in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets):
        of_dataset = summary[summary["dataset"] == dataset]
        axis.bar(of_dataset["variant"], of_dataset["mean"], color="0.85", edgecolor="0.4", width=0.6)
        for i, variant in enumerate(of_dataset["variant"]):
            values = runs[(runs["dataset"] == dataset) & (runs["method"] == variant)]["miou"]
            axis.scatter([i] * len(values), values, color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], zorder=3)
        axis.set_title(f"{dataset.removeprefix('embedded_')}, n={int(of_dataset['images'].max())}", fontsize=9)
        axis.tick_params(axis="x", labelrotation=20, labelsize=8)
    figure.axes[0].set_ylabel("mIoU (%)")
    return figure


def groups(frame: pd.DataFrame, measures: Sequence[str]) -> Figure:
    """Bars of several measures, a panel each; a row of the frame is a group along the axis, a column a bar of each group."""
    figure = InlineFigure(figsize=(4.2 * len(measures), 3.4), layout="constrained")
    for axis, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures):
        part = frame.xs(measure, axis=1, level=-1)
        colours = matplotlib.colormaps["cividis"](np.linspace(0.15, 0.9, part.shape[1]))
        part.plot.bar(ax=axis, color=colours, edgecolor="0.3", width=0.8, legend=False)
        axis.set_title(f"{measure} (%)", fontsize=9)
        axis.set_xlabel("")
        axis.set_xticks(range(len(part)), [" ".join(map(str, i)) if isinstance(i, tuple) else str(i) for i in part.index])
        axis.tick_params(axis="x", labelrotation=30, labelsize=7)
    figure.axes[0].legend(fontsize=7)
    return figure


def classes(frame: pd.DataFrame) -> Figure:
    """IoU of every class (rows) by every method (columns), as points on a line a class."""
    figure = InlineFigure(figsize=(6.5, 0.6 + 0.28 * len(frame)), layout="constrained")
    axis = figure.subplots()
    for i, method in enumerate(frame.columns):
        axis.scatter(
            frame[method], range(len(frame)), color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], label=method, alpha=0.85
        )
    axis.set_yticks(range(len(frame)), frame.index, fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="y", color="0.9")
    axis.set_xlabel("IoU (%)")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
