"""Figures 2 to 5 and the images of every step: functions of data that return a matplotlib Figure."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from fmbseg import files
from fmbseg.data.images import IGNORED, class_pixels, resize_map
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.errors import tell
from fmbseg.models.sam import AutomaticMask
from fmbseg.stage1.features import ImageFeatures
from fmbseg.stage1.label_masks import LabelledMask
from fmbseg.stage1.pseudo_labels import paint
from fmbseg.stage1.query_sam import QueryMask
from fmbseg.stage1.windows import Window

STARS = {"marker": "*", "s": 90, "c": "#00e676", "edgecolors": "black", "linewidths": 0.7}
SIMILARITY = "viridis"  # one hue order, even lightness: readable without colour vision and in print

SCRIPTS = ("Noto Sans CJK", "Source Han Sans", "WenQuanYi", "Hiragino", "Microsoft YaHei", "Malgun Gothic", "Arial Unicode", "Noto Sans")
"""Beginnings of the names of fonts with other scripts than Latin, Greek and Cyrillic."""


@functools.cache
def fonts() -> list[str]:
    """DejaVu Sans, then the installed fonts of other scripts: matplotlib takes each letter from the first font that has it."""
    here = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *sorted(name for name in here if name.startswith(SCRIPTS))]


@functools.cache
def _letters() -> frozenset[int]:
    return frozenset().union(*(font_manager.get_font(font_manager.findfont(name)).get_charmap() for name in fonts()))


def readable(name: str, index: int) -> str:
    """A class's name for matplotlib, or "class INDEX", with one warning, where no font here has its letters."""
    if any(ord(letter) not in _letters() for letter in name):
        tell(f"no font here has the letters of some class names: figures say class numbers; install {SCRIPTS[0]} or {SCRIPTS[1]}")
        return f"class {index}"
    plain = name.replace("$", r"\$")  # else it would be a formula
    return f"\u200b{plain}" if plain.startswith("_") else plain  # legends leave out names that begin with "_"


class InlineFigure(Figure):
    """A figure that a notebook shows without pyplot, which would keep every figure open."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png", dpi=80)
        return stream.getvalue()


def panels(count: int, columns: int = 4, size: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` images without axes, at most ``columns`` a row."""
    columns = min(columns, max(count, 1))
    rows = -(-max(count, 1) // columns)
    figure = InlineFigure(figsize=(columns * size, rows * size), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).flat)
    for axis in axes:
        axis.set_axis_off()
    return figure, axes[:count]


def _show(axis: Axes, image: np.ndarray, title: str, **style: Any) -> None:
    axis.imshow(image, **style)
    axis.set_title(title, fontsize=9)


def save(figure: Figure, path: str | Path) -> Figure:
    """Write a figure as PNG, atomically, and return it, so that a notebook's cell shows it."""
    with files.atomic_path(path) as part:
        figure.savefig(part, dpi=110, format="png", metadata={"Software": None})
    return figure


def overlay(image: np.ndarray, labels: np.ndarray, space: LabelSpace, opacity: float = 0.6) -> np.ndarray:
    """The label map's colours over the image; unlabelled pixels show the image faded."""
    colours = np.append(space.palette, [[255] * 3], axis=0)  # IGNORED is the last
    share = np.where(labels == IGNORED, 0.35, opacity)[..., None]
    return ((1 - share) * image + share * colours[labels]).astype(np.uint8)


def colour_masks(image: np.ndarray, masks: Sequence[AutomaticMask], opacity: float = 0.6) -> np.ndarray:
    """Automatic masks over the image, each in an arbitrary colour, small ones on top: (height, width, 3) ``uint8``."""
    colours = np.random.RandomState(0).randint(60, 255, (len(masks), 3))
    painted = image.astype(float)
    for mask, colour in sorted(zip(masks, colours), key=lambda pair: -pair[0].area):
        painted[mask.mask] = (1 - opacity) * image[mask.mask] + opacity * colour
    return painted.astype(np.uint8)


def _orange(mask: np.ndarray) -> np.ndarray:
    """(height, width, 4) RGBA to lay a mask over its image: orange inside, transparent outside."""
    return np.where(mask[..., None], np.array([0.9, 0.6, 0.0, 0.6]), np.zeros(4))


def legend(axis: Axes, labels: Sequence[np.ndarray], space: LabelSpace, limit: int = 12) -> None:
    """Names of the classes that occur, the largest first."""
    counts = sum(class_pixels(one, len(space)) for one in labels)
    shown = [k for k in np.argsort(-counts) if counts[k] > 0][:limit]
    handles = [Patch(facecolor=space.palette[k] / 255, edgecolor="0.3", label=readable(space.names[k], k)) for k in shown]
    if handles:
        prop = {"family": fonts(), "size": 7}
        axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.02), ncols=3, prop=prop, frameon=False, borderaxespad=0)


def _write(axis: Axes, x: float, y: float, text: str) -> None:
    box = {"facecolor": "white", "alpha": 0.75, "pad": 1.0, "lw": 0}
    axis.text(x, y, text, ha="center", va="center", fontsize=7, family=fonts(), bbox=box, clip_on=True)


def name_regions(axis: Axes, labels: np.ndarray, space: LabelSpace, smallest: float = 0.02) -> None:
    """Write each class's name on its region, so that classes do not differ by colour alone.

    The name is at the class's pixel that is nearest to the median of all its pixels. Classes that cover less than the share
    ``smallest`` of the image are only in the legend.
    """
    for k in np.unique(labels[labels != IGNORED]):
        rows, columns = np.nonzero(labels == k)
        if len(rows) < smallest * labels.size:
            continue
        nearest = np.argmin((rows - np.median(rows)) ** 2 + (columns - np.median(columns)) ** 2)
        _write(axis, columns[nearest], rows[nearest], readable(space.names[k], k))


def contact_sheet(paths: Sequence[Path]) -> Figure:
    """Small images side by side."""
    figure, axes = panels(len(paths), columns=8, size=1.4)
    for axis, path in zip(axes, paths):
        axis.imshow(Image.open(path).convert("RGB").resize((160, 120)))
    return figure


def crops_and_votes(image: np.ndarray, features: ImageFeatures, winners: Sequence[str]) -> Figure:
    """The overlapping crops (Sec. 3.2), each with the name of its class in the middle."""
    figure, (axis,) = panels(1, size=5)
    axis.imshow(image)
    for crop, name in zip(features.crops, winners):
        x, y, width, height = features.crop_box(crop)
        axis.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="white", linewidth=1.2, alpha=0.8))
        _write(axis, x + width / 2, y + height / 2, name)
    axis.set_title(f"{len(features.crops)} crops and their votes", fontsize=9)
    return figure


def similarity_maps(image: np.ndarray, rows: dict[str, torch.Tensor], names: Sequence[str]) -> Figure:
    """Figure 3: for every row of maps, (K, h, w), the image and one panel a class, on one scale a row."""
    figure, axes = panels((1 + len(names)) * len(rows), columns=1 + len(names), size=2.7)
    for r, (title, maps) in enumerate(rows.items()):
        first, *of_classes = axes[r * (1 + len(names)) : (r + 1) * (1 + len(names))]
        _show(first, image, title)
        upscaled = resize_map(maps[None].float(), image.shape[:2])[0].numpy()
        low, high = np.percentile(upscaled, [1, 99.8])
        for axis, one, name in zip(of_classes, upscaled, names):
            _show(axis, one, name, cmap=SIMILARITY, vmin=low, vmax=high)
    return figure


def points_figure(image: np.ndarray, similarity: torch.Tensor, points: np.ndarray, name: str) -> Figure:
    """Left half of Figure 2: the similarity map of one class, (h, w), beside the image, with the query points as stars."""
    figure, axes = panels(2, columns=2, size=4)
    upscaled = resize_map(similarity[None, None].float(), image.shape[:2])[0, 0].numpy()
    for axis, shown, title in zip(axes, (image, upscaled), (f"query points of {name}", "similarity")):
        _show(axis, shown, title, cmap=SIMILARITY)
        axis.scatter(*points.T, **STARS)
    return figure


def weights_figure(image: np.ndarray, mask: np.ndarray, weight: torch.Tensor, name: str) -> Figure:
    """One mask over the image, and the share of every position of the map that it covers, (h, w): the weights of its mean feature."""
    figure, (left, right) = panels(2, columns=2, size=3.6)
    left.imshow(image)
    _show(left, _orange(mask), f"mask, labelled {name}")
    _show(right, weight.numpy(), "its share of every position", cmap=SIMILARITY, vmin=0, vmax=1)
    return figure


def windows_figure(image: np.ndarray, places: Sequence[Window]) -> Figure:
    """Sliding windows, in pixels, over their image, each in its own colour."""
    figure, (axis,) = panels(1, size=5)
    axis.imshow(image)
    for i, place in enumerate(places):
        box = ((place.left, place.top), place.width, place.height)
        axis.add_patch(Rectangle(*box, fill=False, edgecolor=f"C{i % 10}", linewidth=3, linestyle=(4 * i, (6, 6)), label=f"window {i}"))
    axis.set_title(f"{len(places)} windows of {places[0].width} x {places[0].height} pixels", fontsize=9)
    return figure


def query_figure(image: np.ndarray, query: QueryMask, similarity: torch.Tensor | None = None) -> Figure:
    """Figures 2 and 5: the query points as stars, and SAM's three masks with their confidence; the chosen one is marked.

    similarity: (h, w), of the class; if given, the first panel shows it in place of the image.
    """
    figure, axes = panels(1 + len(query.masks), columns=4, size=3)
    first = image if similarity is None else resize_map(similarity[None, None].float(), image.shape[:2])[0, 0].numpy()
    for i, axis in enumerate(axes):
        axis.imshow(image if i else first, cmap=SIMILARITY)
        axis.scatter(*query.points.T, **STARS)
        if i == 0:
            axis.set_title(f"{query.detected.name} ({query.detected.votes} votes)", fontsize=9)
            continue
        mask, best = query.masks[i - 1], query.scores[i - 1] == query.scores.max()
        _show(axis, _orange(mask), f"confidence {query.scores[i - 1]:.2f}{' (chosen)' if best else ''}")
    return figure


def automatic_figure(image: np.ndarray, masks: Sequence[AutomaticMask], labelled: Sequence[LabelledMask], space: LabelSpace) -> Figure:
    """SAM's automatic masks in arbitrary colours, and in the colours of their classes."""
    figure, (left, right) = panels(2, columns=2, size=4)
    _show(left, colour_masks(image, masks), f"{len(masks)} automatic masks")
    labels, _ = paint(list(labelled), image.shape[:2])
    _show(right, overlay(image, labels, space), "labelled among the detected classes")
    legend(right, [labels], space)
    return figure


def label_figure(image: np.ndarray, maps: dict[str, np.ndarray], space: LabelSpace) -> Figure:
    """The image beside label maps, such as truth and prediction (Figure 4), with one legend."""
    figure, axes = panels(1 + len(maps), columns=5, size=3.2)
    _show(axes[0], image, "image")
    for axis, (title, labels) in zip(axes[1:], maps.items()):
        _show(axis, overlay(image, labels, space), title)
        name_regions(axis, labels, space)
        legend(axis, [labels], space)
    return figure


def save_overlay(path: Path, image: np.ndarray, labels: np.ndarray, space: LabelSpace) -> None:
    """Write the image beside its label map (``label_figure``)."""
    save(label_figure(image, {"segmentation": labels}, space), path)


def predictions_figure(columns: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], space: LabelSpace, smallest: float = 0.05) -> Figure:
    """Figure 4: a column an image, (image, truth, prediction) from top to bottom, with one legend a column.

    It shows the classes of the truth and those that cover at least the share ``smallest`` of the prediction. Other pixels of the
    prediction are faded, and its title says how many classes they have.
    """
    figure, axes = panels(3 * len(columns), columns=len(columns), size=3.4)
    figure.set_figheight(3 * (3.4 * max(image.shape[0] / image.shape[1] for image, _, _ in columns) + 0.2) + 0.5)
    for c, (image, truth, prediction) in enumerate(columns):
        axes[c].imshow(image)
        counts = class_pixels(prediction, len(space))
        shown = [k for k in np.flatnonzero(counts) if counts[k] >= smallest * prediction.size or (truth == k).any()]
        others = np.count_nonzero(counts) - len(shown)
        prediction = np.where(np.isin(prediction, shown), prediction, IGNORED)
        named = f"FMbSeg (faded: {others} other classes)" if others else "FMbSeg"
        for row, (title, labels) in enumerate((("ground truth", truth), (named, prediction)), 1):
            axis = axes[row * len(columns) + c]
            _show(axis, overlay(image, labels, space, opacity=0.75), title)
            name_regions(axis, labels, space)
        legend(axis, [truth, prediction], space)
    return figure
