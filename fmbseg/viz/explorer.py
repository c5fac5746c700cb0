"""The explorer (notebook 09) as a widget: controls for images, words, points and Stage 1; ``explore.py`` computes everything."""

from __future__ import annotations

import html
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets
import matplotlib
import numpy as np
import torch

from fmbseg.data import images, label_spaces
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.data.samples import Sample
from fmbseg.errors import FmbsegError
from fmbseg.schemas import ExploreRun
from fmbseg.stage1.pseudo_labels import paint
from fmbseg.stage2 import segmenter
from fmbseg.viz import explore, figures
from fmbseg.viz.explore import ALIGNED, CLIP, Explorer
from fmbseg.viz.panels import Panel, Panels, data_url

MOST_MAPS = 12  # words with a map each; more would be slow to draw and to look at
MOST_NAMES = 24  # crops with their vote written into them; more would cover the image
SMALL, LARGE = 220, 300  # widths in the page
RESOLUTIONS = {"half": 0.5, "as in the parameters": 1.0, "one and a half": 1.5, "double": 2.0}
HEAT = (matplotlib.colormaps[figures.SIMILARITY](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.uint8)


class Explore(ipywidgets.VBox):
    """The explorer as one widget. An error that the input causes is a sentence in ``notice``; what is shown stays.

    params: the notebook's; samples: the images to choose from. It takes seconds when an image or a resolution is first shown
    and when Stage 1's tab is first opened.
    """

    def __init__(self, params: ExploreRun, samples: Sequence[Sample]):
        self.params, self.explorer = params, Explorer(params)
        self._files: dict[str, Path | np.ndarray] = {sample.name: sample.image for sample in samples}
        self._controls(params)
        self.tabs = ipywidgets.Tab(
            [
                ipywidgets.VBox([_line(self.across, self.down), self.panels]),
                ipywidgets.VBox([_line(self.vocabulary, self.points), _line(self.chosen, self.find), self.stage]),
            ],
            titles=["Words and points", "Stage 1"],
        )
        rows = [
            _line(self.image_choice, self.upload),
            _line(self.words, self.background),
            _line(self.threshold, self.margin, self.opacity, self.resolution),
        ]
        super().__init__([*rows, self.notice, self.tabs])
        self._watch()
        self._new_image()

    def _controls(self, p: ExploreRun) -> None:
        names = list(self._files)
        first = p.image if p.image in names else names[0] if names else None
        self.image_choice = ipywidgets.Dropdown(options=names, value=first, description="Image", style=_LABEL, layout=_width(450))
        self.upload = ipywidgets.FileUpload(accept=",".join(images.SUFFIXES), description="Upload an image", layout=_width(180))
        self.words = _text("Words", p.words, "words, separated by commas; Enter shows them", 450)
        self.background = _text("Background", p.background, "words that together are background", 450)
        self.threshold = _slider("Threshold", 0.0, "no colour below this share of the range from lowest to highest similarity")
        self.margin = _slider("Margin", 0.0, "pixels whose class is nearer than the next one by less than this (cosine) get no class")
        self.opacity = _slider("Opacity", 0.6, "of the colours over the image")
        self.resolution = ipywidgets.Dropdown(options=RESOLUTIONS, value=1.0, description="Resolution", style=_LABEL, layout=_width(280))
        self.across = _slider("Point across", 0.5, "from the left edge to the right one; a click on an image sets it, too")
        self.down = _slider("Point down", 0.5, "from the top edge to the bottom one; a click on an image sets it, too")
        self.vocabulary = ipywidgets.Dropdown(
            options={"the words above": "", p.vocabulary: p.vocabulary}, description="Vote among", style=_LABEL, layout=_width(320)
        )
        self.points = ipywidgets.IntSlider(p.points, 1, max(20, p.points), description="Query points", style=_LABEL, layout=_width(300))
        self.chosen = ipywidgets.Dropdown(description="Class", style=_LABEL, layout=_width(320))
        self.find = ipywidgets.Button(description="Find automatic masks", layout=_width(190))
        self.notice = ipywidgets.HTML()
        self.panels, self.stage = Panels(), Panels(clickable=False)

    def _watch(self) -> None:
        for control in (
            self.words,
            self.background,
            self.threshold,
            self.margin,
            self.opacity,
            self.resolution,
            self.vocabulary,
            self.points,
        ):
            control.observe(self._draw, "value")
        self.tabs.observe(self._draw, "selected_index")
        self.chosen.observe(self._draw, "value")
        self.image_choice.observe(self._new_image, "value")
        self.upload.observe(self._uploaded, "value")
        self.panels.observe(self._clicked, "point")
        for slider in (self.across, self.down):
            slider.observe(self._moved, "value")
        self.find.on_click(self._find_masks)

    def _say(self, text: str, kind: str = "note") -> None:
        colour = {"note": "--jp-ui-font-color2, inherit", "error": "--jp-error-color1, #d32f2f"}[kind]
        self.notice.value = f'<span class="fmbseg-{kind}" style="color: var({colour}); line-height: 1.4">{html.escape(text)}</span>'

    def _answer(self, work: Callable[[], str]) -> bool:
        """Do the work and show its sentence, or that of an error that the input causes. Returns whether it was done."""
        try:
            said = work()
        except FmbsegError as error:
            self._say(str(error), "error")
            return False
        self._say(said)
        return True

    def _space(self) -> LabelSpace:
        words, background = self.words.value, self.background.value.strip() or None
        for name, given in (("Words", words), ("Background", background)):
            if given is not None:
                label_spaces.own_words(given, name)  # an error names the control
        return segmenter.words_space(words, background)

    def _new_image(self, *_) -> None:
        self._say("Reading the image ...")
        if self._answer(self._read):
            self._draw()

    def _read(self) -> str:
        chosen = self._files.get(self.image_choice.value)
        if chosen is not None:
            self.explorer.set_image(chosen if isinstance(chosen, np.ndarray) else images.read_image(chosen))
        return ""

    def _uploaded(self, change) -> None:
        if not change.new:
            return
        given = change.new[-1]
        name = f"{Path(given['name']).name} (uploaded)"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(given["name"]).name
            path.write_bytes(given["content"])
            try:
                self._files[name] = images.read_image(path)
            except FmbsegError as error:
                self._say(str(error).replace(f"{folder}/", ""), "error")
                return
        self.image_choice.options = list(self._files)
        if self.image_choice.value == name:
            self._new_image()
        self.image_choice.value = name

    def _clicked(self, change) -> None:
        for slider, value in zip((self.across, self.down), change.new):
            _set(slider, self._moved, value=value)
        self._draw()

    def _moved(self, *_) -> None:
        self.panels.point = [self.across.value, self.down.value]

    def _find_masks(self, *_) -> None:
        self._say("SAM looks for masks all over the image; this takes a while ...")
        if self._answer(lambda: f"{len(self.explorer.masks())} masks"):
            self._draw()

    def _draw(self, *_) -> None:
        """Draw the open tab again; where the words cannot be used, only show the error."""
        self._answer(self._drawn)

    def _drawn(self) -> str:
        space, started = self._space(), time.perf_counter()
        self.explorer.scale = self.resolution.value
        if not self.explorer.is_seen:
            self._say("The models run on the image; after that, words and sliders are answered at once ...")
            self.explorer.seen()
        image = self.explorer.image
        said = f"{image.shape[1]} x {image.shape[0]} pixels."
        if self.tabs.selected_index:
            sections = self._stage_sections(self._votes_space(space))
            self.stage.show(sections)
            if len(sections) == 1:
                said = f"No class has more than {self.params.min_votes} crops; try other words."
        else:
            self.panels.show(self._word_sections(space))
            if len(space) > MOST_MAPS:
                said += f" Maps of the first {MOST_MAPS} of {len(space)} classes."
        return f"{said} Answered in {time.perf_counter() - started:.2f} s."

    def _word_sections(self, space: LabelSpace) -> list[tuple[str, list[Panel]]]:
        maps, near = self.explorer.similarity(space), self.explorer.similar_to(*self.panels.point)
        best = ALIGNED if ALIGNED in maps else CLIP
        large, small = (_fit(self.explorer.image, 2 * width) for width in (LARGE, SMALL))
        labels = explore.segmentation(maps[best], large.shape[:2], self.threshold.value, self.margin.value)
        shown = data_url(figures.overlay(large, labels, space, self.opacity.value))
        original = Panel("image", data_url(large), "click a point", LARGE, cross=self.panels.point)
        sections = [("Image", [original, Panel("segmentation", shown, f"by {best}", LARGE, legend=_legend(labels, space))])]
        colour = {"threshold": self.threshold.value, "opacity": self.opacity.value, "table": HEAT}
        point = []
        for name, one in near.items():
            shown = data_url(explore.heat(small, one[0], explore.limits(one), **colour))
            point.append(Panel(name, shown, _range(one), SMALL, cross=self.panels.point))
        if self.explorer.missing:
            point.append(Panel(ALIGNED, "", self.explorer.missing, SMALL))
        sections.append(("Similar to the point", point))
        for k, word in enumerate(space.names[:MOST_MAPS]):
            row = []
            for name, all_words in maps.items():
                shown = data_url(explore.heat(small, all_words[k], explore.limits(all_words), **colour))
                row.append(Panel(name, shown, _range(all_words[k]), SMALL))
            sections.append((word, row))
        return sections

    def _votes_space(self, space: LabelSpace) -> LabelSpace:
        """The classes that Stage 1 looks for: every word by itself, background words included, or the profile's vocabulary."""
        if self.vocabulary.value:
            return label_spaces.vocabulary(self.vocabulary.value, self.explorer.params.words)
        return label_spaces.own_words([word for prompts in space.prompts for word in prompts])

    def _stage_sections(self, space: LabelSpace) -> list[tuple[str, list[Panel]]]:
        explorer, image = self.explorer, self.explorer.image
        winners, found = explorer.winners(space), {one.name: one for one in explorer.detected(space)}
        large, small = (_fit(image, 2 * width) for width in (LARGE, SMALL))
        kept = self.chosen.value if self.chosen.value in found else next(iter(found), None)
        _set(self.chosen, self._draw, options=[(f"{name} ({one.votes} votes)", name) for name, one in found.items()], value=kept)
        features = explorer.seen().features
        shown_names = winners if len(winners) <= MOST_NAMES else [""] * len(winners)
        boxes = [_shares(features.crop_box(crop), features.size, name) for crop, name in zip(features.crops, shown_names)]
        votes = ", ".join(f"{name} {count}" for name, count in explore.vote_counts(winners).items())
        sections = [("Crops and their votes", [Panel("votes", data_url(large), votes, LARGE, boxes=boxes)])]
        if kept is None:
            return sections
        if not explorer.is_outlined:
            self._say("SAM runs on the image ...")
        query = explorer.query(space, found[kept], self.points.value)
        stars = [(x / image.shape[1], y / image.shape[0]) for x, y in query.points.tolist()]
        row = [Panel("query points", data_url(small), f"{len(stars)} positions most like the word", SMALL, stars=stars)]
        for mask, score in zip(query.masks, query.scores):
            shown = data_url(_fit(explore.paint_mask(image, mask, self.opacity.value), 2 * SMALL))
            best = score == query.scores.max()
            row.append(Panel(f"confidence {score:.2f}", shown, "(chosen)" if best else "", SMALL, chosen=bool(best), stars=stars))
        sections.append((f"Stage 1.1: {kept}", row))
        self.find.disabled = explorer.has_masks
        if explorer.has_masks:
            labels, _ = paint(explorer.labelled(space), image.shape[:2])
            every = _fit(figures.colour_masks(image, explorer.masks(), self.opacity.value), 2 * LARGE)
            shown = data_url(_fit(figures.overlay(image, labels, space, self.opacity.value), 2 * LARGE))
            row = [Panel("automatic masks", data_url(every), f"{len(explorer.masks())} in arbitrary colours", LARGE)]
            row.append(Panel("labelled", shown, "among the detected classes", LARGE, legend=_legend(labels, space)))
            sections.append(("Stage 1.2", row))
        return sections


_LABEL = {"description_width": "90px"}


def _width(pixels: int) -> ipywidgets.Layout:
    return ipywidgets.Layout(width=f"{pixels}px", max_width="100%")


def _line(*controls: ipywidgets.Widget) -> ipywidgets.Box:
    return ipywidgets.Box(controls, layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"))


def _text(name: str, value: str, hint: str, width: int) -> ipywidgets.Text:
    return ipywidgets.Text(
        value, description=name, placeholder=hint, continuous_update=False, style=_LABEL, layout=_width(width), tooltip=hint
    )


def _slider(name: str, value: float, hint: str) -> ipywidgets.FloatSlider:
    return ipywidgets.FloatSlider(value, min=0, max=1, step=0.01, description=name, style=_LABEL, layout=_width(320), tooltip=hint)


def _set(control: ipywidgets.Widget, watcher: Callable, **values) -> None:
    """Set a control's traits without calling the function that watches its value."""
    control.unobserve(watcher, "value")
    for trait, value in values.items():
        setattr(control, trait, value)
    control.observe(watcher, "value")


def _fit(image: np.ndarray, side: int) -> np.ndarray:
    """An image scaled down to at most ``side`` pixels in width and height."""
    limit = min(side / max(image.shape[:2]), 1)
    return images.resize(image, tuple(max(round(s * limit), 1) for s in image.shape[:2]))


def _shares(box: tuple[float, float, float, float], size: tuple[int, int], name: str) -> tuple[float, float, float, float, str]:
    """(x, y, width, height) in pixels as shares of the (height, width) of an image, with a name."""
    x, y, width, height = box
    return x / size[1], y / size[0], width / size[1], height / size[0], name


def _range(one: torch.Tensor) -> str:
    """Lowest and highest similarity of a map."""
    low, high = (round(value, 2) + 0.0 for value in explore.limits(one))  # no -0.00
    return f"{low:.2f} to {high:.2f}"


def _legend(labels: np.ndarray, space: LabelSpace) -> list[tuple[str, str]]:
    """Classes that occur with their share of the image, the largest first, and their CSS colours."""
    counts = images.class_pixels(labels, len(space))
    order = [k for k in np.argsort(-counts, kind="stable") if counts[k]]
    return [(f"{space.names[k]} {100 * counts[k] / labels.size:.0f} %", "rgb({}, {}, {})".format(*space.palette[k])) for k in order]
