"""Masks that a person corrected come back into a training, whatever tool they come from."""

import json
import shutil

import numpy as np
import pytest
from label_studio_converter import brush
from PIL import Image
from test_export import SPACE as TOOLS
from test_export import items, objects  # noqa: F401

from fmbseg import files
from fmbseg.data.images import IGNORED
from fmbseg.data.label_spaces import own_words
from fmbseg.data.samples import Sample
from fmbseg.errors import DataError, ImageError
from fmbseg.runs import modules, train
from fmbseg.tools import corrected, export, review

COMES_BACK = ["coco", "coco-polygons", "voc", "label-studio", "yolo"]
SPACE = own_words("sky=heavens|sky, sun, lawn=grass, house, tree")  # other order and names than the corrections have


@pytest.fixture
def exported(toy, own_home, tmp_path):
    """What the tools would give back of four images, in every format."""
    export.export(export.of_store(toy.samples[:4], toy.store), toy.store.space, COMES_BACK, tmp_path)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "classes.txt").write_text("sky\ngrass\nsun\nhouse\n")
    for sample in toy.samples[:4]:
        shutil.copy(toy.store.path(sample), plain / f"{sample.image.stem}.png")
    tasks = files.read_json(tmp_path / "label-studio" / "tasks.json")
    for task in tasks:  # what a person accepts becomes an annotation
        task["annotations"] = [{"result": [], "was_cancelled": False}, {"result": task["predictions"][0]["result"]}]
        task["annotations"].append({"result": [], "was_cancelled": True})
    tasks[0]["data"]["image"] = f"/data/upload/7/0a1b2c3d-{toy.samples[0].image.name}"
    files.write_json(tmp_path / "label-studio.json", tasks)
    return tmp_path


@pytest.mark.parametrize("source", ["coco.json", "coco-polygons.json", "voc", "plain", "label-studio.json", "yolo"])
def test_masks_come_back_pixel_by_pixel(toy, exported, source):
    found = corrected.take(exported / source, toy.samples, SPACE)
    mixed = corrected.MixedStore(toy.store, found)
    assert set(found) == {sample.name for sample in toy.samples[:4]}
    turn = np.array([0, 2, 1, 3, IGNORED])  # sky, grass, sun, house, and nothing
    for sample in toy.samples:
        labels = toy.store.read(sample)
        np.testing.assert_array_equal(mixed.read(sample), turn[labels] if sample.name in found else labels)
        assert mixed.has(sample)


@pytest.mark.parametrize("source", ["coco.json", "label-studio.json", "yolo"])
def test_an_image_that_a_person_emptied_has_no_label(toy, exported, source):
    first = toy.samples[0]
    made, tasks = files.read_json(exported / "coco.json"), files.read_json(exported / "label-studio.json")
    left = [{k: v for k, v in one.items() if k != "area"} for one in made["annotations"] if one["image_id"] != 1]
    files.write_json(exported / "coco.json", made | {"annotations": left})
    tasks[0]["annotations"] = [{"result": []}]
    files.write_json(exported / "label-studio.json", tasks)
    (exported / "yolo/labels" / f"{first.name}.txt").write_text("")
    mixed = corrected.MixedStore(toy.store, corrected.take(exported / source, toy.samples, own_words(toy.store.space.names)))
    assert mixed.has(first) and (mixed.read(first) == IGNORED).all() and (toy.store.read(first) != IGNORED).any()
    np.testing.assert_array_equal(mixed.read(toy.samples[1]), toy.store.read(toy.samples[1]))  # also without areas


def test_a_training_takes_them_in_the_place_of_pseudo_labels_and_says_so(toy, exported, tmp_path):
    params = toy.params.model_copy(update={"epochs": 1})
    turned = own_words(toy.store.space.names)
    found = corrected.take(exported / "plain", toy.samples[:1], turned)
    labels = np.array(Image.open(found[toy.samples[0].name]))
    plain = train.fit(toy.samples, toy.store, params, tmp_path / "plain.safetensors")
    for wrong, same in ((False, True), (True, False)):
        if wrong:
            Image.fromarray(np.where(labels == 0, 3, labels).astype(np.uint8)).save(found[toy.samples[0].name])
        path = tmp_path / f"{'mixed' if wrong else 'plain'}.safetensors"  # of the same masks, but without the note, is there
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
    (tmp_path / review.VERDICTS).write_text(f"result,image,verdict,key\n{names[0]},,accept,k\n{names[1]},,accept,another\n")
    assert set(corrected.take(tmp_path, toy.samples, SPACE)) == {toy.samples[0].name}
    (tmp_path / review.VERDICTS).write_text(f"result,image,verdict,key\n{names[1]},,accept,another\n")
    with pytest.raises(
        DataError, match="fmbseg-review.csv accepts no result that is there; accept some on the page"
    ):  # all were made again since: nobody accepted what is there
        corrected.take(tmp_path, toy.samples, SPACE)
    for rows in ("", f"{names[0]},,reject\n{names[1]},,reject\n"):
        (tmp_path / review.VERDICTS).write_text(f"result,image,verdict\n{rows}")
        with pytest.raises(DataError, match="accepts no result that is there"):
            corrected.take(tmp_path, toy.samples, SPACE)


def result_of(toy, sample, folder, **said):
    """A sample's label map as ``segment`` leaves it in a folder."""
    folder.mkdir(exist_ok=True)
    shutil.copy(toy.store.path(sample), folder / f"{sample.name}.labels.png")
    whole = {"image": str(sample.image), "key": "k", "height": 1, "width": 1, "mean_margin": 0.0, "classes": []}
    files.write_json(folder / f"{sample.name}.json", whole | said)


def test_a_result_that_was_made_with_other_words_is_refused(toy, own_home, tmp_path):
    names, prompts = ["sky", "light: red", "sun", "house"], [["sky", "heavens"], ["light: red"], ["sun"], ["house", "sun"]]
    (tmp_path / "fmbseg-classes.txt").write_text("sky: sky, heavens\nlight: red: light: red\nsun: sun\nhouse: house, sun\n")
    space = own_words("house, sky, sun, light: red")
    result_of(toy, toy.samples[0], tmp_path, words_key=files.digest(names, prompts))
    result_of(toy, toy.samples[1], tmp_path)  # of before there was a key
    found = corrected.take(tmp_path, toy.samples, space)
    read = corrected.MixedStore(toy.store, found).read(toy.samples[0])
    np.testing.assert_array_equal(read, np.array([1, 3, 2, 0, IGNORED])[toy.store.read(toy.samples[0])])
    result_of(toy, toy.samples[2], tmp_path, words_key=files.digest(["sea", *names], [["sea"], *prompts]))
    with pytest.raises(
        DataError, match="was made with other words than fmbseg-classes.txt lists; segment it again into a folder of its own"
    ):
        corrected.take(tmp_path, toy.samples, space)


PLACES = {"1": "1.jpg", "x__1": "x/1.jpg", "y__1": "y/1.jpg", "y__2": "y/2.jpg"}


def placed(folder, *names):
    """Images of the same file name in several folders: samples, and a label map each whose pixels are all of one class of SPACE."""
    samples = []
    for k, (name, path) in enumerate(PLACES.items()):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), 50 * k, np.uint8)).save(folder / path)
        if not names or name in names:
            samples.append(Sample(name, folder / path))
    return samples


def classes_of(found):
    return {name: SPACE.names[np.array(Image.open(path))[0, 0]] for name, path in found.items()}


EACH = dict(zip(PLACES, ("sky", "sun", "lawn", "house")))


def everywhere(samples):
    return [export.Labelled(s.name, s.image, lambda s=s: np.full((4, 4), SPACE.names.index(EACH[s.name]), np.int16)) for s in samples]


@pytest.mark.parametrize("source", ["coco.json", "voc", "yolo", "yolo/train", "label-studio.json", "plain", "flat", "results"])
def test_a_mask_belongs_to_the_image_of_its_path(own_home, tmp_path, source):
    samples = placed(tmp_path / "photos")
    export.export(everywhere(samples), SPACE, ["coco", "voc", "yolo", "label-studio"], tmp_path)
    tasks = files.read_json(tmp_path / "label-studio/tasks.json")
    files.write_json(tmp_path / "label-studio.json", [task | {"annotations": task["predictions"]} for task in tasks])
    for name, path in PLACES.items():
        pixels = Image.fromarray(np.full((4, 4), SPACE.names.index(EACH[name]), np.uint8))
        for place in (f"plain/{path}.png".replace(".jpg", ""), f"flat/{name}.png", f"results/{name}.labels.png"):
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            pixels.save(tmp_path / place)
        said = {"image": str(tmp_path / "photos" / path), "key": "k", "height": 4, "width": 4, "mean_margin": 0.0, "classes": []}
        files.write_json(tmp_path / f"results/{name}.json", said)
    for folder, name in (("plain", "classes.txt"), ("flat", "classes.txt"), ("results", "fmbseg-classes.txt")):
        (tmp_path / folder / name).write_text("".join(f"{name}: {name}\n" for name in SPACE.names))
    if source == "yolo/train":  # a part of it, as trainers divide them
        (tmp_path / "yolo/labels").rename(tmp_path / "yolo/part")
        (tmp_path / "yolo/labels").mkdir()
        (tmp_path / "yolo/part").rename(tmp_path / "yolo/labels/train")
    assert classes_of(corrected.take(tmp_path / source.split("/")[0], samples, SPACE)) == EACH
    if source in ("coco.json", "label-studio.json", "results"):  # these say which image it is: never that of another folder
        for one in samples[1:3]:
            lone = [Sample("1", one.image)]
            assert classes_of(corrected.take(tmp_path / source, lone, SPACE)) == {"1": EACH[one.name]}
            if source != "results":
                continue
            (tmp_path / "results" / f"{one.name}.json").unlink()
            with pytest.raises(DataError, match="none of its"):
                corrected.take(tmp_path / source, lone, SPACE)
        if source == "results":  # the images were moved
            (tmp_path / "photos").rename(tmp_path / "moved")
            assert classes_of(corrected.take(tmp_path / source, placed(tmp_path / "moved", "y__2", "x__1"), SPACE)) == {"y__2": "house"}


def test_masks_that_may_be_of_several_images_and_two_of_one_are_refused(own_home, tmp_path):
    samples = placed(tmp_path / "photos")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/classes.txt").write_text("sky\n")
    pixels = Image.fromarray(np.zeros((4, 4), np.uint8))
    pixels.save(tmp_path / "plain/1.png")
    with pytest.raises(DataError, match="1 may be .*x/1.jpg or .*y/1.jpg; give images of different names"):
        corrected.take(tmp_path / "plain", samples[1:], SPACE)
    assert list(corrected.take(tmp_path / "plain", samples[1:2], SPACE)) == ["x__1"]
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "plain/1.png")
    pixels.save(tmp_path / "plain/x__1.png")  # fits better
    assert list(corrected.take(tmp_path / "plain", samples[1:2], SPACE)) == ["x__1"]
    for folder in ("plain/a", "plain/b"):
        (tmp_path / folder).mkdir()
        pixels.save(tmp_path / folder / "2.png")
    with pytest.raises(DataError, match="has two masks of .*y/2.jpg, a/2 and b/2; take one of them away"):
        corrected.take(tmp_path / "plain", [Sample("2", samples[3].image)], SPACE)
    export.export(everywhere(samples[2:3] + samples[:1]), SPACE, ["coco"], tmp_path)
    made = files.read_json(tmp_path / "coco.json")
    assert made["images"][0]["file_name"] == "y/1.jpg"
    files.write_json(tmp_path / "coco.json", made | {"images": made["images"][:1], "annotations": made["annotations"][:1]})
    with pytest.raises(DataError, match="none of its 1 masks belongs to an image of the collection; names of files and folders have"):
        corrected.take(tmp_path / "coco.json", samples[1:2], SPACE)


def test_what_cannot_be_taken_is_said(toy, exported, tmp_path):
    plain, samples = exported / "plain", toy.samples
    with pytest.raises(DataError, match="'sun' is none of the words that are trained; add it"):
        corrected.take(plain, samples, own_words("sky, grass, house"))
    with pytest.raises(DataError, match="none of its 4 masks belongs to an image of the collection"):
        corrected.take(plain, samples[4:], SPACE)
    with pytest.raises(DataError, match="no corrected masks; give a .json of COCO or Label Studio"):
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


def test_brush_masks_of_label_studio_and_polygons_of_yolo_come_back(items, tmp_path):  # noqa: F811
    for item in items:
        for mask in (item.read() == k for k in (1, 2, 3)):
            coded = brush.encode_rle((mask.reshape(-1, 1) * np.array([10, 20, 30, 255], np.uint8)).ravel())
            for codes in (coded, export.brush_rle(mask)):
                np.testing.assert_array_equal(corrected.brush_mask(codes, mask.shape), mask)
    single = f"{8:032b}{7:05b}" + f"{2:04b}" * 4 + "000111" + "".join(f"{n:08b}" for n in (1, 2, 3, 255, 9, 9, 9, 0))  # without runs
    codes = [int(single[at : at + 8].ljust(8, "0"), 2) for at in range(0, len(single), 8)]
    assert (
        corrected.brush_mask(codes, (1, 2)).tolist() == [[True, False]] == (brush.decode_rle(codes).reshape(1, 2, 4)[..., 3] > 0).tolist()
    )
    export.export(items, TOOLS, ["yolo"], tmp_path)
    names, masks = corrected._yolo(tmp_path / "yolo")
    assert names == ["person", "cat", "bird"] and [str(mask.image) for mask in masks] == ["none", "one", "three", "two"]
    masks = {str(mask.image): mask.read for mask in masks}
    for item in items:
        read = masks[item.name](item.read().shape)
        np.testing.assert_array_equal(np.where(read == IGNORED, 0, read + 1), objects(item))


def test_what_tools_write_otherwise_is_said(toy, exported):
    file, other = exported / "label-studio.json", exported / "label-studio" / "tasks.json"
    with pytest.raises(DataError, match="no export of Label Studio with brush masks .*annotations"):
        corrected.take(other, toy.samples, SPACE)
    tasks = files.read_json(file)
    tasks[0]["annotations"][1]["result"][0]["type"] = "polygonlabels"
    files.write_json(file, tasks)
    with pytest.raises(DataError, match="holds polygonlabels, and only brush masks are read; export from Label Studio as COCO"):
        corrected.take(file, toy.samples, SPACE)
    next((exported / "yolo" / "labels").iterdir()).write_text("0 0.5 0.5 1 1\n")
    with pytest.raises(DataError, match="'0 0.5 0.5 1 1' is no class and polygon"):
        corrected.take(exported / "yolo", toy.samples, SPACE)
    (exported / "yolo" / "data.yaml").write_text("train: images\n")
    with pytest.raises(DataError, match="data.yaml: has no names of classes"):
        corrected.take(exported / "yolo", toy.samples, SPACE)


def test_names_with_signs_of_addresses_come_back_from_label_studio(own_home, tmp_path):
    samples = []
    for name in ("a#1 & b", "50%25", "c=e+f", "ü"):
        (tmp_path / "x y").mkdir(exist_ok=True)
        samples.append(Sample(name, tmp_path / "x y" / f"{name}.png"))
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(samples[-1].image)
    samples.append(Sample("z", tmp_path / "z.png"))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(samples[-1].image)
    drawn = [export.Labelled(s.name, s.image, lambda: np.ones((4, 4), np.int16)) for s in samples]
    export.export(drawn, SPACE, ["label-studio"], tmp_path)
    tasks = files.read_json(tmp_path / "label-studio/tasks.json")
    assert tasks[0]["data"]["image"] == "/data/local-files/?d=x%20y/a%231%20%26%20b.png"
    files.write_json(tmp_path / "tasks.json", [task | {"annotations": task["predictions"]} for task in tasks])
    assert set(corrected.take(tmp_path / "tasks.json", samples, SPACE)) == {s.name for s in samples}
