"""The per-image cache: a file is taken only for exactly what made it, and what is read is what was computed.

The models are stand-ins of a few lines, so that every value is known: each key is tested by what comes back.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fmbseg import files
from fmbseg.data import label_spaces
from fmbseg.models.clip import CropFeatures
from fmbseg.models.sam import AutomaticMask
from fmbseg.models.texts import class_texts
from fmbseg.params import COLLECTION_ONLY, SEVERAL_ONLY, SPEED_ONLY, EvaluateParams, LabelParams, PatchParams
from fmbseg.runs import cache
from fmbseg.stage1 import features

SPACE = label_spaces.own_words(["red", "green", "blue"])


class Clip:
    """The mean colour of every 16 x 16 cell; a word is the colour of its name; ``seen`` counts the passes."""

    stride, image_size = 16, 64

    def __init__(self, key="clip", factor=1.0):
        self.key, self.factor, self.seen = key, factor, 0

    def encode_crops(self, crops, path="value", residual=False):
        self.seen += 1
        maps = torch.nn.functional.avg_pool2d(crops.permute(0, 3, 1, 2).float() * self.factor, 16) + 1
        maps = maps + (10 * residual) + (20 * (path == "plain"))
        return CropFeatures(maps.mean(dim=(2, 3)), maps)

    def encode_text(self, prompts, unit=True):
        return torch.stack([torch.eye(3)[SPACE.names.index(p.split()[-1])] for p in prompts])


class Sam:
    """Masks the upper ``rows`` of any image."""

    def __init__(self, key="sam", rows=10):
        self.key, self.rows, self.set, self.embedding = key, rows, [], torch.full((1, 2), float(rows)).half()

    def set_image(self, image, embedding=None):
        self.shape = image.shape[:2]
        self.set.append(embedding)

    def mask(self):
        mask = np.zeros(self.shape, bool)
        mask[: self.rows] = True
        return mask

    def predict(self, points):
        return np.stack([self.mask()] * 3), np.array([0.5, 0.75, 0.25])

    def automatic_masks(self, image, *thresholds):
        self.shape = image.shape[:2]
        return [AutomaticMask(self.mask(), 0.875, 0.75, (1.5, 2.5))]


class Encoder:
    """The mean colour of every 8 x 8 patch."""

    patch = 8

    def __init__(self, key="encoder", factor=1.0):
        self.key, self.factor = key, factor

    def encode(self, pixels):
        return torch.nn.functional.avg_pool2d(pixels.permute(0, 3, 1, 2).float() * self.factor, 8)


def models(clip=None, sam=None, encoder=None):
    made = SimpleNamespace(clip=clip or Clip(), sam=sam or Sam(), encoder=encoder or Encoder(), device="cpu")
    made.texts = lambda space: class_texts(made.clip, space)
    return made


@pytest.fixture
def image(tmp_path, own_home):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 96, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def params():
    return LabelParams(short_side=64, crop_size=64, crop_stride=32, min_votes=0, points=2)


def kept(product):
    folder = files.home() / "cache" / product
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_features_are_those_of_the_method_in_fp16_and_made_once(image, params):
    used = models()
    made, again = cache.clip_features(image, used, params), cache.clip_features(image, used, params)
    direct = features.extract(np.array(Image.open(image)), Clip(), params)
    assert used.clip.seen == 1 and (made.size, made.crops) == (direct.size, direct.crops) and kept("clip") == 1
    assert torch.equal(made.map, direct.map.half().float()) and torch.equal(made.tokens, direct.tokens.half().float())
    assert torch.equal(again.map, made.map)
    cache.clip_features(image, used, params.model_copy(update={"crop_batch": 1, "limit": 3, "data_root": "x"}))
    assert used.clip.seen == 1  # how fast and of what, not what


@pytest.mark.parametrize("changed", [{"residual": True}, {"path": "plain"}, {"short_side": 96}, {"crop_stride": 16}])
def test_features_of_other_parameters_are_others(image, params, changed):
    one, other = cache.clip_features(image, models(), params), cache.clip_features(image, models(), params.model_copy(update=changed))
    direct = features.extract(np.array(Image.open(image)), Clip(), params.model_copy(update=changed))
    assert torch.equal(other.map, direct.map.half().float())
    assert one.crops != other.crops or not torch.equal(one.map, other.map)


def test_every_product_of_other_weights_is_another(image, params):
    first, second = models(), models(Clip("other", 0.5), Sam("other", 20), Encoder("other", 0.5))
    one, other = (cache.clip_features(image, m, params).map for m in (first, second))
    assert not torch.equal(one, other)
    for product in (cache.automatic_masks, lambda *a: cache.queries(a[0], SPACE, *a[1:])):
        (one,), (other,) = ([m for m in product(image, used, params)][:1] for used in (first, second))
        one, other = (getattr(found, "chosen", getattr(found, "mask", None)) for found in (one, other))
        assert one.sum() == 10 * 96 and other.sum() == 20 * 96
    one, other = (cache.encoder_patches(image, m, PatchParams(image_size=64)) for m in (first, second))
    assert torch.equal(one, 2 * other)
    sam_alone = models(sam=Sam("third", 30))
    assert cache.queries(image, SPACE, sam_alone, params)[0].chosen.sum() == 30 * 96


def test_every_product_of_another_image_or_version_is_another(image, params, monkeypatch):
    def everything():
        found = cache.queries(image, SPACE, models(), params), cache.automatic_masks(image, models(), params)
        return found, cache.encoder_patches(image, models(), PatchParams(image_size=64))

    everything()
    counts = [kept(p) for p in ("clip", "queries", "masks", "encoder")]
    assert counts == [1, 1, 1, 1]
    Image.fromarray(np.full((64, 96, 3), 9, np.uint8)).save(image)
    everything()
    assert [kept(p) for p in ("clip", "queries", "masks", "encoder")] == [2, 2, 2, 2]
    monkeypatch.setattr(cache, "VERSIONS", {name: version + 1 for name, version in cache.VERSIONS.items()})
    everything()
    assert [kept(p) for p in ("clip", "queries", "masks", "encoder")] == [3, 3, 3, 3]


def test_queries_come_back_as_they_were_and_depend_on_words_and_given_labels(image, params):
    made, again = (cache.queries(image, SPACE, models(), params) for _ in range(2))
    for one, other in zip(made, again, strict=True):
        assert one.detected == other.detected and one.scores.tolist() == other.scores.tolist() == [0.5, 0.75, 0.25]
        for name in ("points", "masks", "chosen"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))

    def names(space=SPACE, given=None, **changed):
        return [q.detected.name for q in cache.queries(image, space, models(), params.model_copy(update=changed), given)]

    assert names(given=(2,)) == ["blue"] and names(given=(0, 1)) == ["red", "green"] and names(given=()) == []
    assert names() == [q.detected.name for q in made] and names(min_votes=999) == []
    few = label_spaces.own_words(["blue", "green"])
    assert set(names(few)) <= {"blue", "green"} and names(few, given=(0,)) == ["blue"]
    assert [len(q.points) for q in cache.queries(image, SPACE, models(), params.model_copy(update={"points": 3}), (0,))] == [3]


def test_automatic_masks_come_back_as_they_were(image, params):
    (one,), (other,) = (cache.automatic_masks(image, models(), params) for _ in range(2))
    np.testing.assert_array_equal(one.mask, other.mask)
    assert (other.predicted_iou, other.stability, other.point) == (0.875, 0.75, (1.5, 2.5)) and kept("masks") == 1
    assert cache.automatic_masks(image, models(), params.model_copy(update={"min_area": 0.5})) == []
    assert len(cache.automatic_masks(image, models(), params.model_copy(update={"vocabulary": "voc21"}))) == 1 and kept("masks") == 2


def test_sams_embedding_is_kept_for_the_other_stage_where_that_is_wished(image, params):
    used, wished = models(), params.model_copy(update={"keep_embeddings": True})
    cache.queries(image, SPACE, used, wished, (0,))
    cache.automatic_masks(image, used, wished)
    assert used.sam.set[0] is None and used.sam.set[-1].tolist() == [[10, 10]] and kept("sam") == 1
    other = models(sam=Sam("other", 20))
    cache.automatic_masks(image, other, wished)
    assert other.sam.set == [None] and kept("sam") == 2  # never another SAM's


@pytest.mark.parametrize("side, grid", [(64, 8), (71, 8), (32, 4)])
def test_patches_are_of_the_side_that_was_asked_for(image, side, grid):
    cache.encoder_patches(image, models(), PatchParams(image_size=64))
    made = cache.encoder_patches(image, models(), PatchParams(image_size=side))
    assert made.shape == (3, grid, grid) and made.dtype == torch.float16 and kept("encoder") == (1 if grid == 8 else 2)


def test_run_length_codes_give_back_the_mask():
    mask = np.random.RandomState(0).rand(7, 5) > 0.5
    np.testing.assert_array_equal(cache.decode_rle(cache.encode_rle(mask)), mask)


def test_models_are_made_once_a_process_and_by_name(smoke):
    params = smoke(LabelParams)
    first, second = cache.Models.of(params), cache.Models.of(params)
    assert first == second and first.clip is second.clip and first.texts(SPACE) is second.texts(SPACE)
    assert cache.Models.of(smoke(LabelParams, precision="bf16")).clip.key == f"{first.clip.key} bf16"


def test_what_keys_leave_out_are_parameters():
    """A parameter that was renamed would come into every key by its old name's absence."""
    assert set(EvaluateParams.model_fields) >= (COLLECTION_ONLY | SPEED_ONLY | SEVERAL_ONLY)
    assert LabelParams(collection="a", limit=3).content(LabelParams) == LabelParams(collection="b").content(LabelParams)
