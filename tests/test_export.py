"""What is written for other tools, read back by their own readers, pixel by pixel."""

import xml.etree.ElementTree as ET
from pathlib import Path

import cv2
import numpy as np
import pytest
import supervision as sv
import yaml
from label_studio_converter import brush
from PIL import Image
from pycocotools.coco import COCO

from fmbseg import files
from fmbseg.data.images import IGNORED
from fmbseg.errors import ParameterError
from fmbseg.stage2.segmenter import words_space
from fmbseg.tools import export
from fmbseg.tools.export import Labelled

SPACE = words_space("person=person|man, cat, bird", "wall, floor")


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """Label maps of noise, of blocks with holes, and of nothing, beside images in two folders."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    holes = np.full((60, 90), IGNORED, np.int16)
    holes[5:55, 5:85] = 1
    holes[10:50, 10:40], holes[20:30, 50:60], holes[35:40, 52:57] = 2, 0, IGNORED
    holes[15:20, 15:20], holes[25:45, 20:30], holes[0, 0], holes[59] = 3, 1, 2, 3
    noise = rng.choice([0, 1, 2, 3, IGNORED], (37, 23)).astype(np.int16)
    rough = np.kron(rng.choice([1, 2], (9, 11), p=[0.8, 0.2]), np.ones((5, 4))).astype(np.int16)
    made = []
    for name, labels in {"a/one": holes, "b/two": noise, "b/three": rough, "b/none": np.full((20, 30), IGNORED, np.int16)}.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*labels.shape, 3), dtype=np.uint8)).save(path)
        regions = [np.roll(rough == 1, 7, axis=0)[: labels.shape[0], : labels.shape[1]], labels == 2, labels == 3]
        regions = [np.pad(one, [(0, n - m) for n, m in zip(labels.shape, one.shape)]) for one in regions]
        made.append(Labelled(path.stem, path, lambda labels=labels: labels, {1: 0.25, 2: 0.125}, lambda regions=regions: regions))
    return made


def objects(item):
    """Unlabelled pixels and the background are no objects."""
    labels = item.read()
    return np.where((labels == 0) | (labels == IGNORED), 0, labels)


@pytest.mark.parametrize("polygons", [False, True])
@pytest.mark.parametrize("way", ["", "parts", "sam"])
def test_coco_is_read_back_by_pycocotools(items, tmp_path, polygons, way):
    export.export(items, SPACE, ["coco-polygons" if polygons else "coco"], tmp_path, way)
    coco = COCO(str(next(tmp_path.iterdir())))
    assert [(c["id"], c["name"]) for c in coco.loadCats([2, 3, 4])] == [(2, "person"), (3, "cat"), (4, "bird")]
    assert coco.loadCats([2])[0]["words"] == ["person", "man"]
    most = 0
    for item, entry in zip(items, coco.loadImgs(coco.getImgIds())):
        assert entry["file_name"] == f"{item.image.parent.name}/{item.image.name}"
        seen = np.zeros((entry["height"], entry["width"]), np.uint8)
        found = coco.loadAnns(coco.getAnnIds(entry["id"]))
        for one in found:
            mask = coco.annToMask(one).astype(bool)
            assert not seen[mask].any() and one["area"] == mask.sum() and isinstance(one["segmentation"], list) == polygons
            rows, columns = np.nonzero(mask)
            assert one["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert one.get("score") == item.scores.get(one["category_id"] - 1)
            seen[mask] = one["category_id"] - 1
        np.testing.assert_array_equal(seen, objects(item))
        most = max(most, len(found))
        assert len(found) == sum(1 for _ in item.objects(SPACE, way)[1])
    assert most == 3 if not way else most > 100


@pytest.mark.parametrize("way", ["", "sam"])
def test_yolo_is_read_back_by_supervision_and_by_fill_poly(items, tmp_path, way):
    export.export(items, SPACE, ["yolo"], tmp_path, way)
    folder = tmp_path / "yolo"
    assert yaml.safe_load((folder / "data.yaml").read_text()) == {
        "train": "images",
        "val": "images",
        "names": {0: "person", 1: "cat", 2: "bird"},
    }
    read = sv.DetectionDataset.from_yolo(str(folder / "images"), str(folder / "labels"), str(folder / "data.yaml"), force_masks=True)
    assert read.classes == ["person", "cat", "bird"]
    found = {Path(path).stem: annotations for path, _, annotations in read}
    for item in items:
        rounded, cut = (np.zeros(item.read().shape, np.uint8) for _ in range(2))
        for mask, k in zip(found[item.name].mask if len(found[item.name]) else (), found[item.name].class_id):
            rounded[np.asarray(mask)] = k + 1
        for line in (folder / "labels" / f"{item.name}.txt").read_text().splitlines():
            k, *shares = line.split()
            vertices = np.array(shares, np.float32).reshape(-1, 2) * cut.shape[::-1]
            assert len(vertices) >= 3
            cv2.fillPoly(cut, [vertices.astype(np.int32)], int(k) + 1)
        np.testing.assert_array_equal(rounded, objects(item))
        np.testing.assert_array_equal(cut, objects(item))
        assert (folder / "images" / item.image.name).read_bytes() == item.image.read_bytes()


def test_voc_is_read_back_by_its_colours(items, tmp_path):
    export.export(items, SPACE, ["voc"], tmp_path)
    head, *lines = (tmp_path / "voc" / "labelmap.txt").read_text().splitlines()
    assert head == "# label:color_rgb:parts:actions" and lines[0] == "background:0,0,0::"
    names, colours = zip(*(line.split(":")[:2] for line in lines))
    assert names == SPACE.names and len(set(colours)) == len(colours)
    assert (tmp_path / "voc/ImageSets/Segmentation/default.txt").read_text().split() == [item.name for item in items]
    for item in items:
        shown = Image.open(tmp_path / "voc" / "SegmentationClass" / f"{item.name}.png")
        np.testing.assert_array_equal(np.array(shown), objects(item))
        rgb, seen = np.array(shown.convert("RGB")), np.full(item.read().shape, 99)
        for k, colour in enumerate(colours):
            seen[(rgb == np.array(colour.split(","), int)).all(axis=2)] = k
        np.testing.assert_array_equal(seen, objects(item))
    with pytest.raises(ParameterError, match="^a:b: names with a colon cannot be written"):
        export.export(items, words_space(["a:b"]), ["voc"], tmp_path)
    with pytest.raises(ParameterError, match="^--format voc: 255 classes, and its palette holds 254"):
        export.export(items, words_space([f"word {i}" for i in range(255)]), ["voc"], tmp_path)
    assert len(np.unique(export.label_spaces.palette(254), axis=0)) == 254


def test_voc_numbers_the_instances_of_an_image_large_ones_first(items, tmp_path, capsys):
    export.tell.cache_clear()  # it speaks once a process
    export.export(items, SPACE, ["voc"], tmp_path, "parts")
    for item in items:
        ids = np.array(Image.open(tmp_path / "voc" / "SegmentationObject" / f"{item.name}.png"))
        made = sorted((int(mask.sum()) for _, mask in item.objects(SPACE, "parts")[1]), reverse=True)
        assert np.bincount(ids[ids > 0], minlength=1)[1:].tolist() == made[: export.MOST_IDS]
        for _, mask in item.objects(SPACE, "parts")[1]:
            assert len(np.unique(ids[mask])) == 1 and (ids[mask].max() == 0 or (ids == ids[mask][0]).sum() == mask.sum())
        assert not ids[objects(item) == 0].any()
    assert "two: its " in capsys.readouterr().err and len(made) == 0
    export.export(items, SPACE, ["voc"], tmp_path / "whole")
    assert not (tmp_path / "whole/voc/SegmentationObject").exists()


@pytest.mark.parametrize("way", ["", "parts"])
def test_label_studio_is_read_back_by_its_converter(items, tmp_path, way):
    export.export(items, SPACE, ["label-studio"], tmp_path, way)
    labels = ET.parse(tmp_path / "label-studio" / "config.xml").findall("./BrushLabels[@name='tag'][@toName='image']/Label")
    assert [label.get("value") for label in labels] == ["person", "cat", "bird"]
    tasks = files.read_json(tmp_path / "label-studio" / "tasks.json")
    for item, task in zip(items, tasks):
        assert task["data"]["image"] == f"/data/local-files/?d={item.image.parent.name}/{item.image.name}"
        (prediction,), seen = task["predictions"], np.zeros(item.read().shape, int)
        for one in prediction["result"]:
            k = SPACE.names.index(one["value"]["brushlabels"][0])
            assert (one["original_height"], one["original_width"]) == seen.shape and one.get("score") == item.scores.get(k)
            values = brush.decode_rle(one["value"]["rle"]).reshape(*seen.shape, 4)
            seen[values[..., 3] == 255] = k
        np.testing.assert_array_equal(seen, objects(item))
        ids = {one["id"] for one in prediction["result"]}
        assert len(ids) == len(prediction["result"]) == sum(1 for _ in item.objects(SPACE, way)[1])
        assert prediction.get("score") == (0.125 if prediction["result"] else None)
    large = np.zeros((300, 400), bool)
    large[:, :390] = True  # a run is longer than 16 bits
    large[150:] = True
    np.testing.assert_array_equal(brush.decode_rle(export.brush_rle(large)).reshape(300, 400, 4)[..., 0] == 255, large)


def test_an_unknown_format_is_refused():
    assert export.formats("coco, yolo", SPACE) == ["coco", "yolo"]
    with pytest.raises(ParameterError, match="^--format png: unknown; known are coco, coco-polygons, yolo, voc, label-studio, geojson$"):
        export.formats("coco,png", SPACE)
    with pytest.raises(ParameterError, match="^a:b: names with a colon cannot be written"):
        export.formats("coco,voc", words_space(["a:b"]))
    assert export.formats("coco", words_space(["a:b"])) == ["coco"]


def test_a_class_of_the_user_that_is_called_background_is_no_object(items, tmp_path):
    pytest.importorskip("rasterio")
    space, formats = words_space("cat, Background, bird"), list(export.FORMATS)
    labels = np.array([[0, 0, 1, 2], [IGNORED, 1, 1, 2]], np.int16)
    export.export([Labelled("one", items[0].image, lambda: labels)], space, formats, tmp_path)
    assert [one["category_id"] for one in files.read_json(tmp_path / "coco.json")["annotations"]] == [1, 3]
    assert yaml.safe_load((tmp_path / "yolo/data.yaml").read_text())["names"] == {0: "cat", 1: "bird"}
    assert [line[0] for line in (tmp_path / "yolo/labels/one.txt").read_text().splitlines()] == ["0", "1"]
    assert [line.split(":")[0] for line in (tmp_path / "voc/labelmap.txt").read_text().splitlines()[1:]] == ["background", "cat", "bird"]
    shown = Image.open(tmp_path / "voc/SegmentationClass/one.png")
    assert np.array(shown).tolist() == [[1, 1, 0, 2], [0, 0, 0, 2]]
    config = ET.parse(tmp_path / "label-studio/config.xml")
    assert [label.get("value") for label in config.iter("Label")] == ["cat", "bird"]
    (task,) = files.read_json(tmp_path / "label-studio/tasks.json")
    assert [one["value"]["brushlabels"] for one in task["predictions"][0]["result"]] == [["cat"], ["bird"]]
    drawn = files.read_json(tmp_path / "geojson/one.geojson")["features"]
    assert {one["properties"]["class"] for one in drawn} == {"cat", "bird"}


def test_what_an_earlier_call_wrote_is_removed_and_nothing_else(items, tmp_path):
    pytest.importorskip("rasterio")
    formats = ["yolo", "voc", "geojson"]
    export.export(items, SPACE, formats, tmp_path, "parts")
    own = [tmp_path / name for name in ("yolo/images/own.png", "yolo/notes.txt", "voc/SegmentationClass/own.txt", "geojson/own.json")]
    for path in own:
        path.write_bytes(items[0].image.read_bytes())
    export.export(items[1:], SPACE, formats, tmp_path)
    assert len(list(tmp_path.rglob("one.*"))) == 5  # others may write there, too
    export.export(items[1:], SPACE, formats, tmp_path, fresh=True)
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert set(own) <= left and not [path for path in left if path.stem == "one" or path.parent.name == "SegmentationObject"]
    assert {path.stem for path in (tmp_path / "voc/SegmentationClass").glob("*.png")} == {item.name for item in items[1:]}
    copy = tmp_path / "yolo/images/two.png"
    export.export([Labelled("new", copy, items[1].read)], SPACE, ["yolo"], tmp_path, fresh=True)
    assert copy.is_file()  # it is an image of the call
