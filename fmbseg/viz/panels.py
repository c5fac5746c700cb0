"""The explorer's canvas: sections of captioned images, which can be clicked."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import anywidget
import numpy as np
import traitlets
from PIL import Image

from fmbseg import files


def data_url(image: np.ndarray) -> str:
    """A (height, width, 3) ``uint8`` image as a data URL (JPEG)."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


@dataclass(frozen=True)
class Panel:
    """One image with its caption. Places are shares of width and height, in [0, 1] from the top left.

    src: the image as ``data_url``, or empty for a caption alone; width: in pixels of the page; chosen: whether it is framed;
    boxes: (x, y, width, height, text) of each; stars: (x, y) of each; cross: (x, y) of a chosen point; legend: (name, CSS
    colour) of each class.
    """

    title: str
    src: str
    note: str = ""
    width: int = 220
    chosen: bool = False
    boxes: Sequence[tuple[float, float, float, float, str]] = ()
    stars: Sequence[tuple[float, float]] = ()
    cross: tuple[float, float] | None = None
    legend: Sequence[tuple[str, str]] = ()


class Panels(anywidget.AnyWidget):
    """Sections, each a title over a row of panels.

    sections: set by ``show``; clickable: whether clicks count; point: the last click, (x, y) in [0, 1].
    """

    _esm = files.ASSETS / "panels.js"
    _css = files.ASSETS / "panels.css"
    sections = traitlets.List().tag(sync=True)
    clickable = traitlets.Bool(True).tag(sync=True)
    point = traitlets.List(traitlets.Float(), default_value=[0.5, 0.5]).tag(sync=True)

    def show(self, sections: Sequence[tuple[str, Sequence[Panel]]]) -> None:
        """Replace all sections by these, (title, panels) each; sections without a panel are left out."""
        self.sections = [{"title": title, "panels": [asdict(panel) for panel in panels]} for title, panels in sections if panels]
