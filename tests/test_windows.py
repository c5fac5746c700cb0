import numpy as np
import pytest
import torch

from fmbseg.data.images import resize_map
from fmbseg.stage1.windows import Window, placing, side_by_side, stitch, windows

SIZES = [(10, 10, 4, 2), (11, 7, 4, 3), (32, 45, 16, 8), (5, 30, 8, 4), (30, 5, 8, 5), (3, 3, 8, 4), (8, 8, 8, 4), (9, 9, 8, 8)]


@pytest.mark.parametrize("height, width, size, stride", SIZES)
def test_windows_cover_the_map_and_stay_inside(height, width, size, stride):
    seen = np.zeros((height, width), int)
    places = windows(height, width, size, stride)
    for w in places:
        assert 0 <= w.top <= w.top + w.height <= height and 0 <= w.left <= w.left + w.width <= width
        assert (w.height, w.width) == (min(size, height), min(size, width))
        seen[w.top : w.top + w.height, w.left : w.left + w.width] += 1
    assert seen.min() >= 1
    assert len(set(places)) == len(places)


def test_last_window_is_shifted_inward_row_by_row():
    assert [(w.top, w.left) for w in windows(4, 11, 4, 3)] == [(0, 0), (0, 3), (0, 6), (0, 7)]
    assert [(w.top, w.left) for w in windows(6, 8, 4, 4)] == [(0, 0), (0, 4), (2, 0), (2, 4)]
    assert [w.left for w in windows(4, 10, 4, 3)] == [0, 3, 6]


def test_small_side_gets_one_window_of_its_length():
    assert windows(3, 10, 6, 4) == [Window(0, 0, 3, 6), Window(0, 4, 3, 6)]
    assert windows(2, 3, 6, 4) == [Window(0, 0, 2, 3)]


@pytest.mark.parametrize("height, width, size, stride", SIZES)
def test_stitching_gives_back_what_was_cut(height, width, size, stride):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ramp = torch.stack([rows, columns, torch.full_like(rows, 7)]).float()
    places = windows(height, width, size, stride)
    assert torch.equal(stitch(((w, w.of(ramp)) for w in places), height, width), ramp)


def test_overlaps_are_averaged():
    tiles = [(Window(0, 0, 1, 2), torch.tensor([[[1.0, 1.0]]])), (Window(0, 1, 1, 2), torch.tensor([[[4.0, 4.0]]]))]
    assert stitch(tiles, 1, 3).tolist() == [[[1.0, 2.5, 4.0]]]


def test_windows_that_do_not_cover_are_refused():
    for tiles in ([(Window(0, 0, 2, 2), torch.ones(1, 2, 2))], []):
        with pytest.raises(ValueError, match="do not cover"):
            stitch(tiles, 2, 3)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("height, width, size, stride", SIZES)
def test_matrices_place_windows_as_stitching_does(height, width, size, stride, mode):
    places = windows(height, width, size, stride)
    maps = torch.randn(len(places), 2, 3, 5, generator=torch.Generator().manual_seed(0)).unbind()
    expected = stitch(
        ((w, resize_map(m[None], (w.height, w.width), mode)[0]) for w, m in zip(places, maps)),
        height,
        width,
    )
    down = placing((w.top for w in places), places[0].height, 3, height, mode)
    across = placing((w.left for w in places), places[0].width, 5, width, mode)
    torch.testing.assert_close(down @ side_by_side(places, maps) @ across.T, expected, atol=1e-5, rtol=1e-5)
