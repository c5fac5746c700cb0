"""The explorer without a browser: what it computes on a real image, and what its widget says."""

import datetime

import numpy as np
import pytest
import torch
from conftest import EMBEDDED
from PIL import Image

from fmbseg import files
from fmbseg.data import fetch, images
from fmbseg.data.images import IGNORED
from fmbseg.errors import ImageError, ParameterError
from fmbseg.models import texts as texts_of
from fmbseg.models.encoders import load_encoder
from fmbseg.params import ModuleParams, make
from fmbseg.runs import cache, modules
from fmbseg.schemas import ExploreRun
from fmbseg.stage1 import detection, query_sam
from fmbseg.stage2 import segmenter
from fmbseg.stage2.alignment import Alignment
from fmbseg.viz import explore
from fmbseg.viz.explore import ALIGNED, CLIP
from fmbseg.viz.figures import colour_masks

VALUES = EMBEDDED | {"profile": "embedded", "max_side": 320, "segment_short_side": 224, "window": 224, "window_stride": 112}
VALUES |= {"short_side": 256, "min_votes": 0}
ENCODER = "efficientnet_lite2"
TABLE = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)


@pytest.fixture(scope="module")
def params():
    return make(ExploreRun, VALUES)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The fetched weights and an untrained module, in a home of its own."""
    fetch.require("mobile_sam")
    real, home = files.home(), tmp_path_factory.mktemp("home")
    (home / "weights").symlink_to(real / "weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMBSEG_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def module(home, params):
    torch.manual_seed(0)
    described = {"key": "untrained", "encoder": ENCODER, "clip": params.clip, "crop_input": params.crop_input, "templates": "one"}
    made = Alignment(load_encoder(ENCODER).width, 384, ModuleParams(module="linear"))
    return modules.save(modules.place(params.profile), made, described)


@pytest.fixture(scope="module")
def explorer(module, params, real_image):
    made = explore.Explorer(params)
    made.set_image(real_image)
    return made


@pytest.fixture(scope="module")
def space():
    return segmenter.words_space("bird, person, sky")


def test_both_models_answer_and_a_large_image_is_scaled_down(explorer, space, real_image):
    assert max(real_image.shape) > 320 and max(explorer.image.shape) == 320 and explorer.missing == ""
    maps = explorer.similarity(space)
    assert list(maps) == [CLIP, ALIGNED]
    for one in maps.values():
        assert len(one) == 3 and one.abs().max() <= 1.001 and one.std() > 0.001
    features = explorer.seen().features
    expected = query_sam.class_similarity(features, texts_of.class_texts(explorer.clip, space, "one"))
    assert torch.allclose(maps[CLIP], expected, atol=1e-5)


def test_the_image_goes_through_the_models_once_a_resolution(explorer, space, monkeypatch):
    explorer.similarity(space)
    seen = explorer.seen()
    calls = []
    monkeypatch.setattr(explore.features, "extract", lambda image, clip, p: calls.append(p.short_side) or seen.features)
    explorer.similarity(segmenter.words_space("cat, dog"))
    explorer.similar_to(0.1, 0.9)
    explorer.winners(space)
    assert calls == [] and explorer.is_seen
    try:
        explorer.scale = 0.5
        assert not explorer.is_seen
        explorer.similarity(space)
        explorer.similarity(space)
        assert calls == [128]
    finally:
        explorer.scale = 1.0
    assert explorer.seen() is seen


def test_what_was_asked_last_is_kept(explorer, space, real_image, params):
    maps, near = explorer.similarity(space), explorer.similar_to(0.2, 0.3)
    assert explorer.similarity(segmenter.words_space("bird, person, sky")) is maps and explorer.similar_to(0.2, 0.3) is near
    assert explorer.similarity(segmenter.words_space("bird, sky")) is not maps and explorer.similar_to(0.2, 0.4) is not near
    other = explore.Explorer(params)
    other.set_image(real_image)
    first = other.similarity(space)
    other.set_image(real_image[:, ::-1].copy())
    assert not torch.equal(other.similarity(space)[CLIP], first[CLIP])


def test_only_new_words_are_encoded(explorer, monkeypatch):
    cache = explore.WordCache(explorer.clip, "seven")
    seen, encode = [], explorer.clip.encode_text
    monkeypatch.setattr(explorer.clip, "encode_text", lambda prompts, unit: seen.append(len(prompts)) or encode(prompts, unit))
    cache.texts(segmenter.words_space("cat, dog"))
    space = segmenter.words_space("dog, house", "cat, sky")
    texts = cache.texts(space)
    cache.texts(space)
    assert seen == [2 * 7, 2 * 7]
    expected = texts_of.class_texts(explorer.clip, space, "seven")
    assert texts.names == expected.names and torch.equal(texts.owner, expected.owner)
    assert torch.allclose(texts.features, expected.features, atol=1e-4)


def test_a_patch_is_most_similar_to_itself(explorer):
    for x, y in ((0.3, 0.7), (0.0, 0.0), (1.0, 1.0)):
        near = explorer.similar_to(x, y)
        one = near[CLIP][0]
        row, column = (min(int(v * n), n - 1) for v, n in zip((y, x), one.shape))
        assert one[row, column] == pytest.approx(1, abs=1e-4) and one.max() == one[row, column] > one.min() + 0.1
        aligned = near[ALIGNED][0]
        row, column = (min(int(v * n), n - 1) for v, n in zip((y, x), aligned.shape))
        assert aligned[row, column] > torch.quantile(aligned, 0.95)


def test_a_point_in_several_windows_is_their_mean():
    window = explore.EmbeddedImage((4, 6), (4, 6), (segmenter.Window(0, 0, 4, 4), segmenter.Window(0, 2, 4, 4)), ())
    maps = tuple(torch.arange(4.0).reshape(1, 2, 2) + shift for shift in (0, 10))
    made = explore.EmbeddedImage(window.size, window.scaled, window.windows, maps)
    assert explore.patch_at(made, 0, 0).tolist() == [0] and explore.patch_at(made, 1, 1).tolist() == [13]
    assert explore.patch_at(made, 2.5 / 6, 3.5 / 4).tolist() == [(3 + 12) / 2]


def test_threshold_is_a_share_of_the_way_from_lowest_to_highest():
    maps = torch.tensor([[[0.0, 1.0, 2.0, 10.0]], [[5.0, 0.0, 0.0, 0.0]]]) + 20
    assert explore.limits(maps) == (20, 30)
    assert explore.segmentation(maps, (1, 4), 0).tolist() == [[1, 0, 0, 0]]
    assert explore.segmentation(maps, (1, 4), 0.5).tolist() == [[1, IGNORED, IGNORED, 0]]
    best, second = maps.topk(2, dim=0).values
    narrow = (best - second)[0].tolist()
    least = sorted(narrow)[2]
    assert [k != IGNORED for k in explore.segmentation(maps, (1, 4), 0, least)[0]] == [value >= least for value in narrow]
    assert explore.segmentation(maps, (1, 4), 1).tolist() == [[IGNORED, IGNORED, IGNORED, 0]]


def test_heat_mixes_colour_and_image_over_the_threshold_only():
    image = np.full((1, 4, 3), 100, dtype=np.uint8)
    one = torch.tensor([[0.0, 0.5, 0.8, 2.0]])
    shown = explore.heat(image, one, (0, 1), 0.5, 1, TABLE)[0, :, 0]
    assert shown.tolist() == [100, 127, 204, 255]
    assert explore.heat(image, one, (0, 1), 0, 0, TABLE).tolist() == image.tolist()
    assert explore.heat(image, one, (0, 1), 0, 0.5, TABLE)[0, 3, 0] == 177
    with np.errstate(all="raise"):
        assert explore.heat(image, torch.zeros(1, 4), (0, 0), 0, 1, TABLE).max() == 0  # a flat map


def test_stage_1_of_any_words(explorer, space):
    winners = explorer.winners(space)
    assert len(winners) == len(explorer.seen().features.crops) and set(winners) <= set(space.names)
    counts = explore.vote_counts(winners)
    assert sum(counts.values()) == len(winners) and list(counts.values()) == sorted(counts.values(), reverse=True)
    found = explorer.detected(space)
    assert [d.votes for d in found] == list(counts.values())
    query = explorer.query(space, found[0], 3)
    assert query.points.shape == (3, 2) and query.masks.shape == (3, *explorer.image.shape[:2]) and explorer.is_outlined
    assert explorer.query(space, found[0], 3) is query and len(explorer.query(space, found[0], 4).points) == 4
    painted = explore.paint_mask(explorer.image, query.chosen, 1)
    assert (painted[query.chosen] == [230, 159, 0]).all() and (painted[~query.chosen] == explorer.image[~query.chosen]).all()


def test_crops_vote_on_the_scale_that_stage_1_votes_on(module, params, space, real_image, tmp_path, monkeypatch):
    for name, one in (("a", real_image), ("b", real_image[:, ::-1])):
        Image.fromarray(one).save(tmp_path / f"{name}.png")
    params = params.model_copy(update={"collection": str(tmp_path), "reference_images": 2})
    made = explore.Explorer(params)  # makes what votes need, so that the first image does not wait for it
    made.set_image(real_image)
    assert len(cache.vote_content(params)) == 2
    scale = detection.Scale(torch.tensor([9.0, 9.0, -9.0]), torch.ones(3))
    monkeypatch.setattr(cache, "vote_scale", lambda texts, p: scale if p is params and texts.names == space.names else None)
    assert set(made.winners(space)) == {"sky"} and [d.name for d in made.detected(space)] == ["sky"]


def test_automatic_masks_once_an_image_and_labels_for_any_words(explorer, space, monkeypatch):
    assert not explorer.has_masks
    masks = explorer.masks()
    monkeypatch.setattr(explore.label_masks, "automatic_masks", lambda *_: pytest.fail("again"))
    assert masks and explorer.masks() is masks and explorer.has_masks
    labelled = explorer.labelled(space)
    assert len(labelled) == len(masks) and {one.detected.name for one in labelled} <= {d.name for d in explorer.detected(space)}
    shown = colour_masks(explorer.image, masks)
    covered = np.logical_or.reduce([m.mask for m in masks])
    assert (shown[~covered] == explorer.image[~covered]).all() and (shown[covered] != explorer.image[covered]).any()


def test_a_new_image_forgets_the_last_one(module, params, real_image, monkeypatch):
    monkeypatch.setattr(explore.label_masks, "automatic_masks", lambda *_: [])
    made = explore.Explorer(params)
    with pytest.raises(ParameterError, match="no image yet"):
        made.seen()
    made.set_image(real_image)
    first = made.seen()
    assert made.masks() == [] and made.has_masks and made.is_outlined
    made.set_image(real_image[:, ::-1].copy())
    assert not made.is_seen and not made.has_masks and not made.is_outlined and made.seen().features.map.shape == first.features.map.shape
    with pytest.raises(ImageError):
        made.set_image(real_image[..., 0])


def test_without_a_module_one_sentence_and_only_clip(home, params, real_image, space, monkeypatch, tmp_path):
    for text, message in ((None, "fmbseg train --profile embedded"), (b"no module", "damaged")):
        path = tmp_path / "alignment.safetensors"
        if text:
            path.write_bytes(text)
        monkeypatch.setattr(modules, "place", lambda *_, path=path: path)
        monkeypatch.setattr(modules, "SHIPPED", tmp_path / "none")
        made = explore.Explorer(params)
        assert message in made.missing and made.segmenter is None
        made.set_image(real_image)
        assert list(made.similarity(space)) == list(made.similar_to(0.5, 0.5)) == [CLIP]


@pytest.fixture(scope="module")
def widget(module, params, sample):
    from fmbseg.viz import explorer

    return explorer.Explore(make(ExploreRun, VALUES | {"words": "bird, sky"}), [sample])


def shown(panels):
    return [(section["title"], panel["title"]) for section in panels.sections for panel in section["panels"]]


def test_the_widget_shows_every_word_by_both_models(widget):
    widget.words.value = "bird,  tall   grass"
    assert shown(widget.panels)[4:] == [(w, m) for w in ("bird", "tall grass") for m in (CLIP, ALIGNED)]
    assert "Answered in" in widget.notice.value and all(
        panel["src"].startswith("data:image/jpeg;base64,") for section in widget.panels.sections for panel in section["panels"]
    )
    widget.background.value = "sky, sea"
    assert ("background", CLIP) in shown(widget.panels)
    widget.background.value = ""


def test_bad_words_are_one_sentence_and_the_images_stay(widget):
    widget.words.value = "bird, sky"
    before = widget.panels.sections
    for words, background, sentence in (
        ("", "", "Words: no word given"),
        ("sky, sky", "", "Words: given more than once: sky"),
        ("sky", "sea, sea", "Background: given more than once: sea"),
        ("sky", "sky", "also among the classes: sky"),
        ("<b>, <b>", "", "&lt;b&gt;"),
    ):
        widget.words.value, widget.background.value = words, background
        assert sentence in widget.notice.value and "fmbseg-error" in widget.notice.value
    widget.words.value, widget.background.value = "bird, sky", ""
    assert "fmbseg-error" not in widget.notice.value and len(widget.panels.sections) == len(before)


def test_point_and_its_sliders_are_one(widget):
    widget.panels.point = [0.25, 0.75]
    assert (widget.across.value, widget.down.value) == (0.25, 0.75)
    widget.down.value = 0.5
    assert widget.panels.point == [0.25, 0.5]
    crosses = [panel["cross"] for section in widget.panels.sections[:2] for panel in section["panels"] if panel["cross"]]
    assert crosses == [[0.25, 0.5]] * 3


def uploaded(name, content):
    now = datetime.datetime.now(datetime.UTC)
    return {"name": name, "type": "image/png", "size": len(content), "content": memoryview(content), "last_modified": now}


def test_upload(widget, real_image, tmp_path):
    for width in (200, 150):  # another image of the same name takes the first one's place
        Image.fromarray(real_image[:100, :width]).save(tmp_path / "own.png")
        widget.upload.value = (uploaded("own.png", (tmp_path / "own.png").read_bytes()),)
        assert widget.image_choice.value == "own.png (uploaded)" and widget.explorer.image.shape == (100, width, 3)
        widget.upload.value = ()
    widget.upload.value = (uploaded("../broken.png", b"x"),)
    assert "broken.png: cannot be read as an image" in widget.notice.value and "/tmp" not in widget.notice.value
    assert widget.image_choice.value == "own.png (uploaded)"


def test_stage_1_tab(widget, sample):
    widget.image_choice.value = sample.name
    widget.words.value, widget.tabs.selected_index = "bird, sky", 1
    try:
        titles = [title for _, title in shown(widget.stage)]
        assert titles[:2] == ["votes", "query points"] and sum(t.startswith("confidence") for t in titles) == 3
        assert [p["chosen"] for s in widget.stage.sections for p in s["panels"]].count(True) == 1
        widget.points.value = 2
        assert len(widget.stage.sections[1]["panels"][0]["stars"]) == 2
        widget.find.click()
        assert [title for _, title in shown(widget.stage)][-2:] == ["automatic masks", "labelled"] and widget.find.disabled
    finally:
        widget.tabs.selected_index = 0
    assert images.SUFFIXES[0] in widget.upload.accept


def test_no_class_with_enough_crops_is_said_and_nothing_else_is_shown(module, sample):
    from fmbseg.viz import explorer

    made = explorer.Explore(make(ExploreRun, VALUES | {"words": "bird, sky", "min_votes": 10_000}), [sample])
    made.tabs.selected_index = 1
    assert "No class has more than 10000 crops; try other words." in made.notice.value
    assert [section["title"] for section in made.stage.sections] == ["Crops and their votes"]
