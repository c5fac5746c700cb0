"""Figures: what is written in them."""

import warnings

import numpy as np
import torch

from fmbseg.data import label_spaces
from fmbseg.stage1.detection import Detected
from fmbseg.stage1.query_sam import QueryMask
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


def test_a_query_shows_the_image_or_the_similarity_and_marks_the_chosen_mask():
    image, masks = np.full((40, 60, 3), 7, np.uint8), np.zeros((3, 40, 60), bool)
    points, scores = np.array([[50, 30], [10, 5]], np.float32), np.array([0.5, 0.9, 0.7])
    query, similarity = QueryMask(Detected(0, "cat", 4), points, masks, scores, masks[1]), torch.arange(6.0).view(2, 3)
    for given in (None, similarity):
        axes = figures.query_figure(image, query, given).axes
        titles = ["cat (4 votes)", "confidence 0.50", "confidence 0.90 (chosen)", "confidence 0.70"]
        assert [axis.get_title() for axis in axes] == titles
        assert all(np.array_equal(axis.images[0].get_array(), image) for axis in axes[1:])
        assert all(np.array_equal(axis.collections[0].get_offsets(), points) for axis in axes)
        shown = axes[0].images[0].get_array()
        if given is None:
            assert np.array_equal(shown, image)
        else:
            assert shown.shape == (40, 60) and (shown[0, 0], shown[-1, -1]) == (0, 5)
