"""Masks that a person corrected come back into a training, whatever tool they come from."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from fmbseg import files
from fmbseg.data.images import IGNORED
from fmbseg.data.label_spaces import own_words
from fmbseg.errors import DataError, ImageError
from fmbseg.runs import modules, train
from fmbseg.tools import corrected, export, review

SPACE = own_words("sky=heavens|sky, sun, lawn=grass, house, tree")  # other order and names than the corrections have


@pytest.fixture
def exported(toy, own_home, tmp_path):
    """What the tools would give back of four images, in every format."""
    export.export(export.of_store(toy.samples[:4], toy.store), toy.store.space, list(export.FORMATS), tmp_path)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "classes.txt").write_text("sky\ngrass\nsun\nhouse\n")
    for sample in toy.samples[:4]:
        shutil.copy(toy.store.path(sample), plain / f"{sample.image.stem}.png")
    return tmp_path


@pytest.mark.parametrize("source", ["coco.json", "coco-polygons.json", "voc", "plain"])
def test_masks_come_back_pixel_by_pixel(toy, exported, source):
    found = corrected.take(exported / source, toy.samples, SPACE)
    mixed = corrected.MixedStore(toy.store, found)
    assert set(found) == {sample.name for sample in toy.samples[:4]}
    turn = np.array([0, 2, 1, 3, IGNORED])  # sky, grass, sun, house, and nothing
    for sample in toy.samples:
        labels = toy.store.read(sample)
        np.testing.assert_array_equal(mixed.read(sample), turn[labels] if sample.name in found else labels)
        assert mixed.has(sample)


def test_a_training_takes_them_in_the_place_of_pseudo_labels_and_says_so(toy, exported, tmp_path):
    params = toy.params.model_copy(update={"epochs": 1})
    turned = own_words(toy.store.space.names)
    found = corrected.take(exported / "plain", toy.samples[:1], turned)
    labels = np.array(Image.open(found[toy.samples[0].name]))
    plain = train.fit(toy.samples, toy.store, params, tmp_path / "plain.safetensors")
    for wrong, same in ((False, True), (True, False)):
        if wrong:
            Image.fromarray(np.where(labels == 0, 3, labels).astype(np.uint8)).save(found[toy.samples[0].name])
        path = tmp_path / f"mixed-{wrong}.safetensors"
        made = train.fit(toy.samples, corrected.MixedStore(toy.store, found), params, path)
        pairs = zip(made.alignment.state_dict().values(), plain.alignment.state_dict().values())
        assert all(bool((one == other).all()) for one, other in pairs) == same
        assert modules.load(path)[1]["notes"][-1] == "1 images with masks that a person corrected: not annotation-free"


def test_of_reviewed_results_the_accepted_ones_are_taken(toy, own_home, tmp_path):
    for sample in toy.samples[:3]:
        place = tmp_path / "sub" / f"{sample.name}.x"
        place.parent.mkdir(exist_ok=True)
        shutil.copy(toy.store.path(sample), f"{place}.labels.png")
        said = {"image": str(sample.image), "key": "k", "height": 1, "width": 1, "mean_margin": 0.0, "classes": []}
        files.write_json(f"{place}.json", said)
    (tmp_path / "fmbseg-classes.txt").write_text("sky: heavens, sky\ngrass: grass\nsun: sun\nhouse: house\n")
    assert len(corrected.take(tmp_path, toy.samples, SPACE)) == 3
    names = [f"sub/{sample.name}.x" for sample in toy.samples[:3]]
    (tmp_path / review.VERDICTS).write_text(f"result,image,verdict\n{names[0]},,reject\n{names[1]},,accept\n")
    assert set(corrected.take(tmp_path, toy.samples, SPACE)) == {toy.samples[1].name}


def test_what_cannot_be_taken_is_said(toy, exported, tmp_path):
    plain, samples = exported / "plain", toy.samples
    with pytest.raises(DataError, match="'sun' is none of the words that are trained; add it"):
        corrected.take(plain, samples, own_words("sky, grass, house"))
    with pytest.raises(DataError, match="none of its 4 masks belongs to an image of the collection"):
        corrected.take(plain, samples[4:], SPACE)
    with pytest.raises(DataError, match="no corrected masks; give a COCO .json, or a folder"):
        corrected.take(exported, samples, SPACE)
    (tmp_path / "other.json").write_text(json.dumps({"images": [{}], "annotations": [], "categories": []}))
    with pytest.raises(DataError, match="no COCO annotations .*id.* is missing"):
        corrected.take(tmp_path / "other.json", samples, SPACE)
    mask = plain / f"{samples[0].image.stem}.png"
    size = Image.open(mask).size
    Image.fromarray(np.full(size[::-1], 4, np.uint8)).save(mask)
    with pytest.raises(DataError, match="holds 4, and there are 4 classes"):
        corrected.take(plain, samples, SPACE)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(mask)
    with pytest.raises(ImageError, match=r"is \(9, 9\), its image"):
        corrected.take(plain, samples, SPACE)
    shown = exported / "voc" / "SegmentationClass" / f"{samples[0].name}.png"
    Image.fromarray(np.full((*size[::-1], 3), 7, np.uint8)).save(shown)
    with pytest.raises(DataError, match="has the colour 070707, which labelmap.txt does not"):
        corrected.take(exported / "voc", samples, SPACE)
