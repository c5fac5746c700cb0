"""Figures: what is written in them."""

import warnings

import numpy as np

from fmbseg.data import label_spaces
from fmbseg.viz import figures


def test_names_of_any_letters_are_written_or_numbered(tmp_path, capfd):
    """No boxes, no formula, no name that a legend leaves out; what no font here can write is the class's number, said once."""
    space = label_spaces.own_words(["cat", "$x^2$ and $", "_hidden", "\U0001f98a\u732b", "caf\u00e9"])
    labels = np.repeat(np.arange(5, dtype=np.uint8), 20)[:, None].repeat(60, axis=1)
    figures.tell.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.label_figure(np.zeros((100, 60, 3), np.uint8), {"labels": labels}, space)
        figures.save(figure, tmp_path / "figure.png")
    written = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert sorted(written) == sorted(["cat", r"\$x^2\$ and \$", "\u200b_hidden", "class 3", "caf\u00e9"])
    assert sorted(written) == sorted(text.get_text() for text in figure.axes[1].texts)
    assert capfd.readouterr().err.count("no font here") == 1
