"""Videos and folders of frames: a label map a frame, the overlay, the mean over frames, and what a stopped run goes on with."""

import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from fmbseg import cli, files
from fmbseg.data import images
from fmbseg.runs import modules
from fmbseg.schemas import SegmentRun
from fmbseg.stage2.segmenter import Segmenter, words_space
from fmbseg.tools import review, segmenting, video
from fmbseg.viz import figures

av = pytest.importorskip("av", reason='PyAV is not installed: pip install -e ".[video]"')

WORDS = words_space("person, dog, car, tree, grass, street", "sky, wall")
SMALL = {"segment_short_side": 96, "window": 96, "window_stride": 96}


def write(path, shown, rate=Fraction(10), turn=0, **more):
    with av.open(str(path), "w", **more) as made:
        stream = made.add_stream("libx264", rate=rate, height=shown[0].shape[0], width=shown[0].shape[1], options={"crf": "5"})
        stream.pix_fmt = "yuv444p"
        if turn:
            stream.set_display_rotation(turn)
        for image in shown:
            made.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        made.mux(stream.encode())
    return path


@pytest.fixture
def shown(real_image):
    """Six frames of a slow pan over a real image, with noise."""
    noise = np.random.default_rng(0).normal(0, 12, (6, 161, 200, 3))
    return [(real_image[40:201, 4 * t : 4 * t + 200] + noise[t]).clip(0, 255).astype(np.uint8) for t in range(6)]


@pytest.fixture
def clip(shown, tmp_path):
    return write(tmp_path / "clip.mp4", shown)


def params(**values):
    return SegmentRun(profile="embedded", **SMALL, **values)


def run(path, out, **values):
    places = segmenting.find([str(path)], out, as_video=True)
    segmenting.run(places, WORDS, modules.SHIPPED, params(**values), None, out, figures.overlay)
    return files.read_json(segmenting.beside(places[path], ".json"))


def decoded(path):
    with av.open(str(path)) as opened:
        return [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)], opened.streams.video[0].average_rate


def maps(folder):
    return {path.name.removesuffix(".labels.png"): images.read_mask(path) for path in sorted(folder.iterdir())}


def test_every_frame_has_its_label_map_and_its_overlay(clip, tmp_path):
    said, given = run(clip, tmp_path / "cut"), dict(video.frames(clip))
    segmenter, made = modules.Segmenter.load(modules.SHIPPED, params=params()), maps(tmp_path / "cut/clip")
    expected = {name: segmenter.segment(image, WORDS).labels for name, image in given.items()}
    assert list(made) == list(given) == [f"{number:06d}" for number in range(6)]
    assert all((made[name] == expected[name]).all() for name in given)
    overlay, rate = decoded(tmp_path / "cut/clip.overlay.mp4")
    assert rate == 10 and len(overlay) == 6 and overlay[0].shape == (161, 200, 3)
    for name, frame in zip(given, overlay):
        assert np.abs(frame.astype(int) - figures.overlay(given[name], expected[name], WORDS)).mean() < 6
    whole = np.stack(list(expected.values()))
    assert {one["name"]: one["pixels"] for one in said["classes"]} == {WORDS.names[k]: int((whole == k).sum()) for k in np.unique(whole)}
    assert sum(one["share"] for one in said["classes"]) == pytest.approx(1, abs=1e-3)
    assert (said["frames"], said["rate"], said["height"], said["width"], said["unlabelled"]) == (6, 10, 161, 200, 0)
    with pytest.raises(files.DataError):
        review.results(tmp_path / "cut")  # pages of a review show images
    with pytest.raises(images.ImageError, match="holds no image"):
        segmenting.find([str(tmp_path / "cut")], tmp_path / "again")  # what was written is no image of the user's


def test_the_mean_is_over_frames_before_and_after(clip, tmp_path):
    run(clip, tmp_path / "cut", average=1, every=2)
    given = [image for _, image in video.frames(clip)][::2]
    segmenter, made = modules.Segmenter.load(modules.SHIPPED, params=params()), maps(tmp_path / "cut/clip")
    similar = [segmenter.segment(image, WORDS).similarity for image in given]
    assert list(made) == ["000000", "000002", "000004"]
    for (name, labels), window in zip(made.items(), ([0, 1], [0, 1, 2], [1, 2])):
        mean = torch.stack([similar[k] for k in window]).mean(dim=0)
        best = images.resize_map(mean[None], labels.shape)[0].argmax(dim=0).numpy()
        assert (labels == best).mean() > 0.9995, name
    frames, rate = decoded(tmp_path / "cut/clip.overlay.mp4")
    assert len(frames) == 3 and rate == 5


def test_the_mean_takes_flicker_away(real_image, tmp_path):
    noise = np.random.default_rng(0).normal(0, 25, (6, *real_image.shape))
    still = write(tmp_path / "still.mp4", [(real_image + one).clip(0, 255).astype(np.uint8) for one in noise])

    def flicker(**values):
        run(still, tmp_path / "cut", **values)
        labels = np.stack(list(maps(tmp_path / "cut/still").values()))
        return (labels[1:] != labels[:-1]).mean()

    assert 0 < flicker(average=2) < 0.7 * flicker()


def test_centred_items_hold_their_neighbours():
    assert list(video.centred("abcd", 0)) == [(one, [one]) for one in "abcd"]
    assert ["".join(near) for _, near in video.centred("abcd", 1)] == ["ab", "abc", "bcd", "cd"]
    assert [now + "".join(near) for now, near in video.centred("ab", 5)] == ["aab", "bab"] and list(video.centred("", 2)) == []


@pytest.fixture
def segmented(monkeypatch):
    """Counts the frames that are segmented; stops before one."""
    seen, real = [], Segmenter.decide

    def one(self, image, *rest):
        if len(seen) == one.stop_after:
            raise KeyboardInterrupt
        seen.append(image)
        return real(self, image, *rest)

    one.stop_after, one.seen = None, seen
    monkeypatch.setattr(Segmenter, "decide", one)
    return one


def test_a_stopped_video_goes_on_at_the_frame_where_it_was(clip, tmp_path, segmented):
    segmented.stop_after = 4
    with pytest.raises(KeyboardInterrupt):
        run(clip, tmp_path / "cut", average=1)
    kept = maps(tmp_path / "cut/clip")
    assert len(kept) == 4 and not (tmp_path / "cut/clip.overlay.mp4").exists()
    segmented.stop_after = None
    run(clip, tmp_path / "cut", average=1)
    assert len(segmented.seen) == 6
    gone_on = maps(tmp_path / "cut/clip")
    run(clip, tmp_path / "cut", average=1)
    assert len(segmented.seen) == 6 and len(decoded(tmp_path / "cut/clip.overlay.mp4")[0]) == 6
    run(clip, tmp_path / "other", average=1)
    fresh = maps(tmp_path / "other/clip")
    assert fresh.keys() == gone_on.keys() and all((fresh[name] == gone_on[name]).all() for name in fresh)
    segmented.seen.clear()
    run(clip, tmp_path / "cut", every=3)  # nothing of other parameters is taken, and nothing of it stays
    assert len(segmented.seen) == 2 and list(maps(tmp_path / "cut/clip")) == ["000000", "000003"]
    (tmp_path / "cut/clip/000003.labels.png").unlink()
    run(clip, tmp_path / "cut", every=3)
    assert len(segmented.seen) == 3 and len(maps(tmp_path / "cut/clip")) == 2


def test_a_folder_of_frames_is_a_video_where_that_is_asked(shown, tmp_path, capsys):
    (tmp_path / "walk").mkdir()
    for number, image in enumerate(shown[:3]):
        Image.fromarray(image).save(tmp_path / f"walk/f{number}.png")
    arguments = ["segment", str(tmp_path / "walk"), "--classes", "person, dog", "--out", str(tmp_path / "cut"), "--format", "coco"]
    arguments += [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    assert cli.main([*arguments, "--video", "--average", "1"]) == 0
    told = capsys.readouterr()
    assert "--format coco: is of images alone, so nothing was written; give frames as a folder without --video" in told.out
    assert (
        "1 of 1 images segmented" in told.out
        and not (tmp_path / "cut/fmbseg-export").exists()
        and "3/3" in told.err
        and "0image" not in told.err
    )  # no bar of no images
    assert list(maps(tmp_path / "cut/walk")) == ["f0", "f1", "f2"] and len(decoded(tmp_path / "cut/walk.overlay.mp4")[0]) == 3
    assert "walk" in (tmp_path / "cut/fmbseg-summary.csv").read_text()
    run(tmp_path / "walk", tmp_path / "again", every=2)
    assert list(maps(tmp_path / "again/walk")) == ["f0", "f2"]
    with pytest.raises(segmenting.ParameterError, match="holds files that fmbseg segment did not write"):
        run(tmp_path / "walk", tmp_path)  # the label maps would lie among the frames
    Image.fromarray(shown[0][:100]).save(tmp_path / "walk/f3.png")
    assert cli.main([*arguments, "--video"]) == 2
    assert "frame f3 has 200 x 100 pixels and the first 200 x 161; all must be of one size" in capsys.readouterr().out


def test_a_video_that_was_held_upright_is_turned(shown, tmp_path):
    turned = write(tmp_path / "turned.mov", [np.rot90(image, -1) for image in shown], turn=90)
    for (_, image), expected in zip(video.frames(turned), shown, strict=True):
        assert image.shape == expected.shape and np.abs(image.astype(int) - expected).mean() < 8


def test_what_is_no_video_is_said(clip, tmp_path, capsys, monkeypatch):
    arguments = ["--classes", "person, dog", "--out", str(tmp_path / "cut")]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    assert cli.main(["segment", str(tmp_path / "broken.mp4"), *arguments]) == 2
    assert "broken.mp4: cannot be decoded (Invalid data found" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "av", None)
    assert cli.main(["segment", str(clip), *arguments]) == 2
    assert f'{clip}: needs PyAV, which is not installed; run: pip install "fmbseg[video]"' in capsys.readouterr().out
