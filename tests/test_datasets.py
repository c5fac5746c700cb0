import os
import shutil

import numpy as np
import pytest
from PIL import Image

from fmbseg import cli, files
from fmbseg.data import benchmarks, collections, fetch, images, label_spaces, samples
from fmbseg.data.images import IGNORED
from fmbseg.errors import DataError, FmbsegError, ImageError, ParameterError
from fmbseg.runs import doctor, label
from fmbseg.schemas import StagesRun, TrainRun
from fmbseg.stage2.metrics import Confusion

VOC12, VOC10 = "VOCdevkit/VOC2012", "VOCdevkit/VOC2010"
COCO = "coco/annotations/val2017/*.png"


def write_image(path, size=(8, 10), value=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def write_mask(path, row, palette=False):
    """An 8 x 10 mask whose rows are all ``row``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Image.fromarray(np.tile(np.array(row, np.uint16 if path.suffix == ".tif" else np.uint8), (8, 1)))
    made = made.convert("P") if palette else made
    if palette:
        made.putpalette(list(range(256)) * 3)
    made.save(path)


def write_split(path, stems):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{stem}\n" for stem in stems))


@pytest.fixture
def root(tmp_path):
    """Every benchmark in its official layout, one or two images each."""
    root = tmp_path / "data"
    for base, kind, masks, ids in (
        (VOC12, "Segmentation", "SegmentationClass", [0, 1, 20, 255]),
        (VOC10, "SegmentationContext", "SegmentationClassContext", [0, 1, 59, 255]),
    ):
        for stem in ("b_1", "a_1", "not_in_split"):
            write_image(root / base / "JPEGImages" / f"{stem}.jpg")
        for stem in ("b_1", "a_1"):
            write_mask(root / base / masks / f"{stem}.png", ids + [0] * 6, palette=True)
        write_split(root / base / "ImageSets" / kind / "val.txt", ["b_1", "a_1"])
    write_image(root / "coco/images/val2017/000000000139.jpg")
    write_mask(root / "coco/annotations/val2017/000000000139.png", [0, 10, 12, 11, 89, 91, 181, 255, 25, 43])
    write_image(root / "cityscapes/leftImg8bit/val/ulm/ulm_000000_000019_leftImg8bit.png")
    write_mask(root / "cityscapes/gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png", [7, 8, 33, 31, 0, 9, 29, 30, 3, 255])
    write_image(root / "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg")
    write_mask(root / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png", [0, 1, 2, 150, 0, 0, 0, 0, 0, 0])
    write_image(root / "ADE20K_2021_17_01/images_detectron2/validation/ADE_val_00000001.jpg")
    write_mask(root / "ADE20K_2021_17_01/annotations_detectron2/validation/ADE_val_00000001.tif", [0, 1, 255, 846, 65535] * 2)
    for stem in ("b_1", "a_1"):
        write_mask(root / VOC10 / "annotations_detectron2/pc459_val" / f"{stem}.tif", [0, 1, 255, 458, 65535] * 2)
    write_image(root / "camvid/images/0016E5_07959.jpg")
    write_mask(root / "camvid/masks/0016E5_07959.png", [0, 1, 2, 255] + [0] * 6)
    (root / "camvid/classes.txt").write_text("pavement\ntree\nbicyclist\n")
    return root


def names_in(name, row):
    """Class names of a row of truth; "-" where ignored."""
    space = label_spaces.label_space(name)
    return ["-" if k == IGNORED else space.names[k] for k in row]


@pytest.mark.parametrize(
    "name, row",
    [
        ("ade847", ["wall", "building", "pier", "adding machine", "-"]),
        ("context459", ["accordion", "aeroplane", "monkey", "wool", "-"]),
        ("voc21", ["background", "aeroplane", "tvmonitor", "-", "background"]),
        ("voc20", ["-", "aeroplane", "tvmonitor", "-", "-"]),
        ("context60", ["background", "aeroplane", "wood", "-", "background"]),
        ("context59", ["-", "aeroplane", "wood", "-", "-"]),
        ("coco_stuff171", ["person", "fire hydrant", "stop sign", "-", "toothbrush", "banner", "wood", "-", "-", "bottle"]),
        ("coco_object81", ["person", "fire hydrant", "stop sign", "-", "toothbrush", *["background"] * 3, "-", "bottle"]),
        ("coco_object80", ["person", "fire hydrant", "stop sign", "-", "toothbrush", "-", "-", "-", "-", "bottle"]),
        ("cityscapes19", ["road", "sidewalk", "bicycle", "train", *["-"] * 6]),
        ("ade150", ["-", "wall", "building", "flag", *["-"] * 6]),
        ("camvid11", ["sidewalk", "vegetation", "rider", "-", *["sidewalk"] * 6]),
    ],
)
def test_official_layouts(name, row, root):
    dataset = benchmarks.load_benchmark(name, str(root))
    truth = dataset.samples[0].truth()
    assert dataset.name == name and dataset.space.names == label_spaces.label_space(name).names
    assert truth.shape == (8, 10) and truth.dtype == np.int16 and (truth == truth[0]).all()
    assert names_in(name, truth[0])[: len(row)] == row
    counts = Confusion(len(dataset.space))
    counts.add(truth, np.zeros_like(truth))
    assert counts.counts.sum() == 8 * (truth[0] != IGNORED).sum()


@pytest.mark.parametrize(
    "name, folder, other", [("ade150", "ADEChallengeData2016", "ade/ADEChallengeData2016"), ("coco_stuff171", "coco", "coco_stuff164k")]
)
def test_either_name_of_a_root_is_read(name, folder, other, root):
    expected = benchmarks.load_benchmark(name, str(root)).samples
    (root / other).parent.mkdir(exist_ok=True)
    (root / folder).rename(root / other)
    made = benchmarks.load_benchmark(name, str(root)).samples
    assert [s.name for s in made] == [s.name for s in expected] and (made[0].truth() != IGNORED).any()
    (root / folder).mkdir()  # what is not whole does not hide what is
    assert benchmarks.load_benchmark(name, str(root)).samples[0].image == made[0].image
    write_image(root / other / "images/train2017/1.jpg")
    assert name == "ade150" or benchmarks.UNLABELLED["coco_stuff_train"].base(root) == root / other


@pytest.mark.parametrize("name", ["voc21", "context59"])
def test_the_split_says_which_images_and_in_which_order(name, root):
    assert [s.name for s in benchmarks.load_benchmark(name, str(root)).samples] == ["b_1", "a_1"]


@pytest.mark.parametrize(
    "name, ids, pattern, last",
    [
        ("voc21", 21, f"{VOC12}/SegmentationClass/b_1.png", 20),
        ("voc20", 20, f"{VOC12}/SegmentationClass/b_1.png", 20),
        ("context60", 60, f"{VOC10}/SegmentationClassContext/b_1.png", 59),
        ("context59", 59, f"{VOC10}/SegmentationClassContext/b_1.png", 59),
        ("coco_stuff171", 171, COCO, 181),
        ("coco_object81", 81, COCO, 181),
        ("coco_object80", 80, COCO, 181),
        ("cityscapes19", 19, "cityscapes/gtFine/val/*/*.png", 33),
        ("ade150", 150, "ADEChallengeData2016/annotations/validation/*.png", 150),
    ],
)
def test_every_class_has_a_raw_id_and_no_other_id_is_read(name, ids, pattern, last, root):
    """All raw ids through the table: every class (but background) occurs once, 255 is ignored (background, of COCO-Object), an id past the last is refused."""
    (mask_file,) = root.glob(pattern)
    raw = np.full((8, 32), 255, np.uint8)
    raw.flat[: last + 1] = np.arange(last + 1)
    Image.fromarray(raw).save(mask_file)
    sample = benchmarks.load_benchmark(name, str(root)).samples[0]
    write_image(sample.image, (8, 32))
    truth = sample.truth()
    found, counts = np.unique(truth[truth != IGNORED], return_counts=True)
    assert found.tolist() == list(range(ids)) and truth[7, 31] == (0 if name == "coco_object81" else IGNORED)
    assert (counts == 1).sum() == (80 if name == "coco_object81" else ids)
    if name == "coco_object81":
        assert counts[0] == 91 + (8 * 32 - 182)  # stuff, and what nobody labelled
    raw[3, 3] = last + 1
    Image.fromarray(raw).save(mask_file)
    with pytest.raises(DataError) as caught:
        sample.truth()
    assert (
        f"{mask_file}: holds id {last + 1}, which this data set does not define; its ids are 0 to {last}, and 255 (65535 in 16 bits)"
        == str(caught.value)
    )


@pytest.mark.parametrize(
    "name, last, pattern", [("ade847", 846, "ADE20K*/annotations*/*/*.tif"), ("context459", 458, f"{VOC10}/*/*/b_1.tif")]
)
def test_large_benchmarks_read_masks_of_sixteen_bits(name, last, pattern, root):
    write_image(root / VOC10 / "JPEGImages/of_the_training_split.jpg")  # has no mask
    (mask_file,), samples = root.glob(pattern), benchmarks.load_benchmark(name, str(root)).samples
    assert [s.name for s in samples] == (["ADE_val_00000001"] if name == "ade847" else ["a_1", "b_1"])
    write_mask(mask_file, [0, last + 1] * 5)
    with pytest.raises(DataError, match=f"holds id {last + 1}, which .* its ids are 0 to {last}, and 255 .65535 in 16 bits"):
        samples[-1].truth()


def test_camvid_refuses_a_word_that_is_no_class_of_it(root):
    (root / "camvid/classes.txt").write_text("pavement\nsidewalk\n")
    assert "'sidewalk' is no class of CamVid's 11; they are sky, building" in refusal(DataError, "camvid11", str(root))


def refusal(error, *arguments):
    with pytest.raises(error) as caught:
        benchmarks.load_benchmark(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_parts_are_one_sentence(root):
    for stem in ("b_1", "a_1"):
        (root / VOC12 / f"SegmentationClass/{stem}.png").unlink()
        (root / VOC10 / f"JPEGImages/{stem}.jpg").unlink()
    assert "b_1.jpg: has no mask at" in refusal(DataError, "voc20", str(root))
    message = refusal(DataError, "context60", str(root))
    assert f"the split names 2 images of 2 that are not there, such as {root / VOC10}/JPEGImages/b_1.jpg" in message
    (root / VOC10 / "ImageSets/SegmentationContext/val.txt").unlink()
    message = refusal(DataError, "context59", str(root))
    assert "split VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt; it comes as VOCtrainval_03-May-2010.tar" in message
    assert "masks VOC" not in message
    next((root / "cityscapes/gtFine").rglob("*.png")).unlink()
    assert "has no mask at" in refusal(DataError, "cityscapes19", str(root))
    next((root / "coco/images").rglob("*.jpg")).unlink()
    assert "no image found" in refusal(DataError, "coco_stuff171", str(root))


def test_one_missing_mask_or_image_of_a_split_leaves_the_others(root):
    (root / VOC12 / "SegmentationClass/b_1.png").unlink()
    (root / VOC10 / "JPEGImages/b_1.jpg").unlink()
    for name, error in (("voc21", DataError), ("context60", ImageError)):
        lost, other = benchmarks.load_benchmark(name, str(root)).samples
        assert other.truth().shape == (8, 10)
        with pytest.raises(error, match="b_1"):
            lost.truth()


@pytest.mark.parametrize("name", list(benchmarks.LAYOUTS))
def test_no_data_root_is_one_sentence(name, tmp_path):
    assert "needs data_root, the folder that holds" in refusal(DataError, name)
    message = refusal(DataError, name, str(tmp_path))
    assert f"{name}: not under {tmp_path}: images" in message and " site" in message


def test_unknown_benchmark_names_the_known_ones():
    assert "unknown; known are voc21, voc20" in refusal(ParameterError, "voc22")


# ---------------------------------------------------------------- folder data sets


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "mine"
    for stem in ("b", "a"):
        write_image(folder / "images" / f"{stem}.jpg")
        write_mask(folder / "masks" / f"{stem}.png", [0, 1, 2, 255, 0, 0, 0, 0, 0, 0])
    (folder / "classes.txt").write_text("cat\nsofa\nrug \n\n")
    return folder


def test_folder_data_set(folder, tmp_path):
    for name, root in ((f"folder:{folder}", ""), ("folder:mine", str(tmp_path))):
        dataset = benchmarks.load_benchmark(name, root)
        assert dataset.space.names == ("cat", "sofa", "rug") and not dataset.space.background
        assert [s.name for s in dataset.samples] == ["a", "b"] and dataset.samples[0].truth()[0, :4].tolist() == [0, 1, 2, IGNORED]
        assert dataset.name == name  # the path as asked for: two folders of one base name are two data sets
    assert benchmarks.load_benchmark(f"folder:{folder}", str(tmp_path)).name == "folder:mine"


def test_class_0_named_background_is_background(folder):
    (folder / "classes.txt").write_text("background\nsofa\nrug")
    space = benchmarks.load_benchmark(f"folder:{folder}").space
    assert space.background and space.with_background_words(["wall", "sofa"]).prompts == (("wall",), ("sofa",), ("rug",))


def test_incomplete_folder_is_one_sentence(folder, tmp_path):
    assert "has no images" in refusal(DataError, f"folder:{tmp_path / 'none'}")
    shutil.move(folder / "masks/a.png", folder / "masks/a_mask.png")
    a, b = benchmarks.load_benchmark(f"folder:{folder}").samples
    assert b.truth().shape == (8, 10)
    with pytest.raises(DataError, match="a.jpg: has no mask at .*masks/a.png"):
        a.truth()
    shutil.move(folder / "masks/b.png", folder / "masks/b_mask.png")
    assert "a.jpg: has no mask at" in (said := refusal(DataError, f"folder:{folder}")) and "nor have 1 more of 2 images" in said
    (folder / "classes.txt").write_text("\n")
    assert "no word given" in refusal(DataError, f"folder:{folder}")
    (folder / "classes.txt").unlink()
    assert "has no classes.txt" in refusal(DataError, f"folder:{folder}")


def test_mask_of_another_size_is_one_sentence(folder):
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(folder / "masks/a.png")
    with pytest.raises(ImageError) as caught:
        benchmarks.load_benchmark(f"folder:{folder}").samples[0].truth()
    assert str(caught.value) == f"{folder / 'masks/a.png'}: the mask is 6 x 5 pixels and its image 10 x 8; both must be of one size"


def test_mask_of_a_image_turned_by_its_exif_stands_upright(folder):
    sideways = Image.new("RGB", (8, 10))
    sideways.getexif()[0x0112] = 6
    sideways.save(folder / "images/a.jpg", exif=sideways.getexif())
    sample = benchmarks.load_benchmark(f"folder:{folder}").samples[0]
    assert sample.truth().shape == images.read_image(sample.image).shape[:2] == (8, 10)


def test_id_that_is_no_line_of_the_classes_is_refused(folder):
    write_mask(folder / "masks/a.png", [3] + [0] * 9)
    with pytest.raises(DataError, match="holds id 3, which this data set does not define; its ids are 0 to 2, and 255"):
        benchmarks.load_benchmark(f"folder:{folder}").samples[0].truth()


def test_images_of_one_name_are_refused(folder):
    write_image(folder / "images/a.png")
    assert "several images are named a" in refusal(DataError, f"folder:{folder}")


def test_colour_mask_is_refused(folder):
    write_image(folder / "masks/a.png")
    with pytest.raises(ImageError, match="8-bit index"):
        benchmarks.load_benchmark(f"folder:{folder}").samples[0].truth()


# ---------------------------------------------------------------- the embedded sets


@pytest.mark.parametrize("name, count, classes", [("coco_object80", 30, 80), ("coco_object81", 30, 81), ("coco_panoptic133", 20, 133)])
def test_embedded_truth_has_the_size_of_its_image(name, count, classes):
    dataset = benchmarks.load_benchmark(f"embedded_{name}")
    assert len(dataset.samples) == len({s.name for s in dataset.samples}) == count and len(dataset.space) == classes
    seen = set()
    for sample in dataset.samples:
        truth = sample.truth()
        assert truth.shape == images.read_image(sample.image).shape[:2]
        seen |= set(np.unique(truth).tolist())
    assert len(seen) > 20 and seen <= {*range(classes), IGNORED} and str(count) in dataset.source


def test_embedded_object_80_is_81_without_its_background():
    for with_one, without in zip(*(benchmarks.load_benchmark(f"embedded_coco_object{n}").samples for n in (81, 80))):
        assert with_one.image == without.image
        truth = with_one.truth().astype(int)
        np.testing.assert_array_equal(without.truth(), np.where(truth <= 0, IGNORED, truth - 1))


def test_panoptic_things_are_the_objects():
    things = benchmarks.load_benchmark("embedded_coco_object80")
    for sample, panoptic in zip(things.samples, benchmarks.load_benchmark("embedded_coco_panoptic133").samples):
        a, b = sample.truth(), panoptic.truth()
        assert sample.name == panoptic.name
        np.testing.assert_array_equal(a, np.where(b < 80, b, IGNORED))
    assert label_spaces.label_space("coco_panoptic133").names[:80] == things.space.names


def test_crowds_are_ignored_and_small_outlines_lie_on_top():
    square = [[0, 0, 8, 0, 8, 8, 0, 8]]
    small = [[2, 2, 4, 2, 4, 4, 2, 4]]
    crowd = {"size": [8, 10], "counts": [64, 16]}  # the last two columns
    instances = [(2, small, 4, 0), (1, square, 64, 0), (1, crowd, 16, 1)]
    annotations = [(index, {"segmentation": outline, "area": area, "iscrowd": many}) for index, outline, area, many in instances]
    truth = samples.read_instances((8, 10), annotations, 0)
    assert truth[0].tolist() == [1] * 8 + [IGNORED] * 2 and truth[3, 3] == 2 and truth[6, 3] == 1


def test_missing_images_name_the_command(own_home):
    with pytest.raises(FmbsegError, match="run: fmbseg fetch coco_panoptic_20"):
        benchmarks.load_benchmark("embedded_coco_panoptic133")


def test_drawn_images_are_the_same_every_time(own_home):
    first = benchmarks.load_benchmark("drawn")
    hashes = [files.file_sha256(s.image) for s in first.samples]
    for sample in first.samples:
        assert sample.truth().shape == images.read_image(sample.image).shape[:2] and set(np.unique(sample.truth())) == {0, 1, 2, 3}
        sample.image.unlink()
    assert [files.file_sha256(s.image) for s in benchmarks.load_benchmark("drawn").samples] == hashes and len(set(hashes)) == 6


# ---------------------------------------------------------------- unlabelled images


def test_pool_holds_no_evaluation_image():
    pool = collections.load_collection("embedded_pool")
    assert len(pool) == len({s.name for s in pool}) == 255 and all("/" not in s.name for s in pool)
    evaluated = [s.image for name in collections.EMBEDDED for s in benchmarks.load_benchmark(name).samples]
    assert not {files.file_sha256(s.image) for s in pool} & {files.file_sha256(p) for p in evaluated}


def test_evaluation_images_are_left_out_of_a_folder(sample, tmp_path, capsys):
    folder = tmp_path / "images"
    write_image(folder / "deep" / "mine.jpg", value=1)
    write_image(folder / "deep" / "own.jpg", value=2)
    write_image(folder / "other" / "own.jpg", value=3)
    write_image(folder / f"{sample.image.stem}.png", value=4)  # its file name
    shutil.copy(sample.image, folder / "renamed.jpg")  # its bytes
    bytes_ = sample.image.read_bytes()
    (folder / "same_size.jpg").write_bytes(bytes_[:-1] + bytes([bytes_[-1] ^ 1]))
    found = collections.load_collection(str(folder))
    assert [s.name for s in found] == [sample.image.stem, "deep__mine", "deep__own", "other__own", "same_size"]
    assert all(s.truth is None for s in found) and collections.left_out(str(folder)) == 1
    assert f"{folder}: left out 1 of 6 images, which are evaluated on (the same bytes)" in capsys.readouterr().err
    for one in found:
        one.image.unlink()
    with pytest.raises(DataError, match="every image in it is one of a benchmark that fmbseg evaluates on"):
        collections.load_collection(str(folder))


def test_images_of_the_runs_own_folder_benchmarks_are_left_out(folder, smoke, tmp_path):
    (tmp_path / "train").mkdir()
    shutil.copy(folder / "images/a.jpg", tmp_path / "train/renamed.jpg")
    write_image(tmp_path / "train/a.jpg", value=7)
    write_image(folder / "images/b.jpg", value=8)
    names = {"collection": str(tmp_path / "train"), "benchmarks": [f"folder:{folder}"]}
    assert [s.name for s in label.collection(smoke(StagesRun, **names))] == ["a"]
    assert collections.left_out(str(tmp_path / "train"), "", (f"folder:{folder}",)) == 1
    assert len(label.collection(smoke(TrainRun, **names))) == 2  # a step that measures nothing


def test_only_files_of_one_size_are_hashed(folder, tmp_path, monkeypatch):
    for i in range(5):
        write_image(tmp_path / f"train/{i}.jpg", size=(8 + 40 * i, 10), value=i)
    shutil.copy(folder / "images/a.jpg", tmp_path / "train/copy.jpg")
    monkeypatch.setattr(collections, "EMBEDDED", ())
    hashed, sha256_of = [], files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    collections.load_collection(str(tmp_path / "train"), evaluated=(f"folder:{folder}",))
    size = (folder / "images/a.jpg").stat().st_size
    assert tmp_path / "train/copy.jpg" in hashed and len(hashed) < 8 and {path.stat().st_size for path in hashed} == {size}
    assert len(hashed) == len(set(hashed))


def test_files_that_cannot_be_read_are_left_out_and_told(tmp_path, capsys):
    write_image(tmp_path / "images/a.jpg", value=1)
    (tmp_path / "images/b.jpg").symlink_to(tmp_path / "gone.jpg")
    assert [s.name for s in collections.load_collection(str(tmp_path / "images"))] == ["a"]
    assert f"{tmp_path / 'images/b.jpg'}: left out, for it cannot be read (No such file" in capsys.readouterr().err
    (tmp_path / "images/a.jpg").unlink()
    with pytest.raises(DataError, match="none of its 1 images can be read, such as .*b.jpg"):
        collections.load_collection(str(tmp_path / "images"))


def test_images_of_the_data_root_are_left_out(root, tmp_path):
    shutil.copy(next((root / "ADEChallengeData2016/images").rglob("*.jpg")), tmp_path / "renamed.jpg")
    write_image(tmp_path / "images" / "mine.jpg", value=33)
    shutil.move(tmp_path / "renamed.jpg", tmp_path / "images" / "renamed.jpg")
    write_image(tmp_path / "images" / "ADE_val_00000001.jpg", value=34)
    assert [s.name for s in collections.load_collection(str(tmp_path / "images"), str(root))] == ["ADE_val_00000001", "mine"]
    assert len(collections.load_collection(str(tmp_path / "images"))) == 3


def test_voc_images_are_those_that_nothing_evaluates_on(root):
    write_image(root / "VOCdevkit/VOC2012/JPEGImages/mine.jpg", value=9)  # the others have the evaluated images' bytes
    assert [s.name for s in collections.load_collection("voc_images", str(root))] == ["mine"]
    with pytest.raises(DataError, match="voc_images: not under .*JPEGImages; it comes as VOCtrainval"):
        collections.load_collection("voc_images", str(root / "none"))


def test_coco_stuff_train_lies_under_the_data_root(root):
    write_image(root / "coco/images/train2017/000000000009.jpg", value=7)
    assert [s.name for s in collections.load_collection("coco_stuff_train", str(root))] == ["000000000009"]
    shutil.rmtree(root / "coco/images/train2017")
    with pytest.raises(DataError, match="coco_stuff_train: not under .*; it comes as train2017.zip"):
        collections.load_collection("coco_stuff_train", str(root))


# ---------------------------------------------------------------- what doctor says of them


def lines_of(report):
    return {line.split()[1]: line for line in report.splitlines() if line.startswith(("  ok", "  missing", "  check"))}


def test_doctor_counts_what_is_here_and_names_what_is_missing(root):
    shutil.copytree(root / "camvid", root / "mine")
    (root / "mine/classes.txt").write_text("a\nb\nc\n")
    shutil.rmtree(root / VOC10 / "SegmentationClassContext")
    shutil.rmtree(root / "cityscapes")
    (root / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png").unlink()
    report = doctor.report(str(root))
    told = lines_of(report)
    for name, layout in benchmarks.LAYOUTS.items():
        good = name not in ("context60", "context59", "cityscapes19", "ade150")
        assert told[name].split()[0] == ("ok" if good else "missing"), name
        assert not good or f"of the official {layout.images} images" in told[name]
    assert "2 of the official 1449 images, 21 classes" in told["voc21"]
    assert "3 images are here; no masks VOCdevkit/VOC2010/SegmentationClassContext   ->" in told["context60"]
    assert "no images cityscapes/leftImg8bit/val, masks cityscapes/gtFine/val" in told["cityscapes19"]
    assert "ADE_val_00000001.jpg: has no mask at" in told["ade150"]
    assert "1 images, 3 classes" in told["folder:mine"] and "train2017.zip" in told["coco_stuff_train"]
    sources = report.partition("official sources")[2]
    assert "VOCtrainval_03-May-2010.tar" in sources and "gtFine_trainvaltest.zip" in sources
    assert "VOCtrainval_11-May-2012.tar" not in sources and "ADEChallengeData2016.zip" not in sources


@pytest.mark.parametrize("option", ["--data-root", "--data"])
def test_the_doctor_command_takes_the_folder(option, root, capsys):
    assert cli.main(["doctor", option, str(root)]) == 0
    assert "2 of the official 1449 images, 21 classes" in capsys.readouterr().out


def test_doctor_survives_every_bad_folder(root, monkeypatch):
    """And says of each what is wrong; nothing that one folder holds hides the others."""
    sets = ("good", "blank", "latin", "image_for_folder", "half", "unseen", "no_classes", "wrong_size")
    for name in sets:
        for stem in ("b", "a"):
            write_image(root / name / "images" / f"{stem}.jpg")
            write_mask(root / name / "masks" / f"{stem}.png", [0, 1, 2, 255, 0, 0, 0, 0, 0, 0])
        (root / name / "classes.txt").write_text("cat\nsofa\nrug\n")
    (root / "blank/classes.txt").write_text("cat\n\nrug\n")
    (root / "latin/classes.txt").write_bytes("caf\u00e9\nsofa\nrug\n".encode("latin-1"))
    shutil.rmtree(root / "image_for_folder/images")
    write_image(root / "image_for_folder/images.jpg")
    shutil.move(root / "image_for_folder/images.jpg", root / "image_for_folder/images")
    (root / "half/masks/b.png").unlink()
    (root / "unseen/classes.txt").write_text("cat\nsofa\nrug\nlamp\n")
    (root / "no_classes/classes.txt").unlink()
    write_mask(root / "wrong_size/masks/b.png", [0, 1, 2])
    (root / VOC12 / "SegmentationClass/b_1.png").unlink()
    (root / "locked").mkdir()
    access, listed = os.access, os.path.exists
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and access(path, mode))
    monkeypatch.setattr(os.path, "exists", lambda path: "locked" not in str(path) and listed(path))
    told = lines_of(doctor.report(str(root)))
    assert {name: told[f"folder:{name}"].split()[0] for name in (*sets, "locked")} == dict(
        good="ok", blank="missing", latin="missing", image_for_folder="missing", half="check", unseen="check", no_classes="missing",
        wrong_size="check", locked="missing",
    )  # fmt: skip
    for name, sentence in {
        "blank": "line 2 is blank",
        "latin": "not UTF-8 text (byte 4); save it as UTF-8",
        "image_for_folder": "no such folder",
        "half": "1 of 2 masks cannot be used, such as b.jpg: has no mask at",
        "unseen": "no counted mask holds lamp;",
        "no_classes": "has no classes.txt",
        "wrong_size": "the mask is 3 x 8 pixels and its image 10 x 8",
    }.items():
        assert sentence in told[f"folder:{name}"], name
    assert "1 of the official 1449 images, 21 classes" in told["voc21"] and "1 images or masks are not there" in told["voc21"]


def test_doctor_takes_the_folder_data_set_itself(folder):
    assert "2 images, 3 classes" in lines_of(doctor.report(str(folder)))["folder:mine"]


def test_doctor_without_a_data_root_names_every_source():
    report = doctor.report()
    assert all(layout.source in report for layout in (*benchmarks.LAYOUTS.values(), *benchmarks.UNLABELLED.values()))


@pytest.mark.parametrize("name", ["/no/such/folder", "embedded_pol"])
def test_missing_folder_is_one_sentence(name):
    with pytest.raises(ImageError, match="no such folder; give a folder of images"):
        collections.load_collection(name)


def test_names_stay_unique_where_only_the_suffix_differs(tmp_path):
    write_image(tmp_path / "images/a.jpg", value=1)
    write_image(tmp_path / "images/a.png", value=2)
    found = collections.load_collection(str(tmp_path / "images"))
    assert len({s.name for s in found}) == len(found) == 2


def test_weights_of_every_collection_are_in_the_table():
    assert all(fetch.find(name).use == "images" for name in collections.POOL)
