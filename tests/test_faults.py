"""Faults that were found by trying: each gave a wrong number or lost something without a word. Small files made here."""

import contextlib
import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image

from fmbseg import cli
from fmbseg.data import benchmarks, images
from fmbseg.errors import DataError, ImageError
from fmbseg.params import EvaluateParams, make
from fmbseg.runs import evaluate, label
from fmbseg.runs.cache import Cache
from fmbseg.schemas import EvaluateRun, LabelRun

COLOUR = np.random.default_rng(0).integers(0, 256, (12, 24, 3), dtype=np.uint8)

# ---------------------------------------------------------------- images that are damaged


def encoded(form, array=COLOUR, **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format=form, **options)
    return stream.getvalue()


def ifd(*entries, following=0):
    """A little-endian TIFF block of one directory: entries of (tag, type, count, four bytes)."""
    rows = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + rows + struct.pack("<I", following)


def jpeg_with(exif):
    plain = encoded("JPEG", quality=95)
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]


def short(value):
    return struct.pack("<HH", value, 0)


BAD_EXIF = {
    "orientation_99": ifd((0x112, 3, 1, short(99))),
    "orientation_as_text": ifd((0x112, 2, 4, b"abc\0")),
    "pointer_as_text": ifd((0x112, 3, 1, short(1)), (0x8769, 2, 4, b"abc\0")),
    "pointer_as_rational": ifd((0x112, 3, 1, short(1)), (0x8825, 5, 1, struct.pack("<I", 8))),
    "pointer_to_nowhere": ifd((0x112, 3, 1, short(1)), (0x8769, 4, 1, struct.pack("<I", 60000))),
    "pointer_to_itself": ifd((0x112, 3, 1, short(1)), (0x8825, 4, 1, struct.pack("<I", 8))),
    "cut_off": ifd((0x112, 3, 1, short(1)), (0x8825, 4, 1, struct.pack("<I", 8)))[:-12],
    "no_header": b"Exif\0\0nonsense",
    "empty": b"Exif\0\0",
}


@pytest.mark.parametrize("kind", BAD_EXIF)
def test_exif_that_cannot_be_read_leaves_the_image_as_it_is(tmp_path, kind):
    path, plain = tmp_path / "a.jpg", tmp_path / "plain.jpg"
    path.write_bytes(jpeg_with(BAD_EXIF[kind]))
    plain.write_bytes(encoded("JPEG", quality=95))
    np.testing.assert_array_equal(images.read_image(path), images.read_image(plain))
    assert images.image_size(path) == (12, 24)


@pytest.mark.parametrize("error", [SyntaxError, TypeError, struct.error, KeyError])
def test_whatever_pil_raises_of_exif_the_image_is_read(tmp_path, monkeypatch, error):
    def getexif(opened):
        raise error("broken")

    monkeypatch.setattr(Image.Image, "getexif", getexif)
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), COLOUR)


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_size_from_the_header_is_that_of_the_image(tmp_path, form, value):
    """Also where EXIF holds an entry that PIL can read and not write: its ``exif_transpose`` ends there."""
    exif = Image.Exif()
    exif[0x112] = value
    for i, content in enumerate([encoded(form, exif=exif), jpeg_with(ifd((0x112, 3, 1, short(value)), (0x100, 9, 1, b"\xff" * 4)))]):
        path = tmp_path / f"{i}.img"
        path.write_bytes(content)
        assert images.image_size(path) == images.read_image(path).shape[:2] == ((24, 12) if value >= 5 else (12, 24))


def damaged(random, seeds):
    """One of the files with bytes changed, cut, doubled or removed, most often near its beginning, where the headers are."""
    content = bytearray(seeds[random.integers(len(seeds))])
    for _ in range(random.integers(1, 6)):
        place = int(len(content) * random.random() ** random.integers(1, 4)) if len(content) else 0
        kind = random.integers(8)
        if kind == 0:
            del content[place:]
        elif kind == 1:
            del content[place : place + int(random.integers(1, 9))]
        elif kind == 2:
            content[place:place] = content[place : place + int(random.integers(1, 33))]
        else:
            content[place : place + 1] = random.bytes(int(random.choice([1, 1, 1, 2, 4])))[:1] if kind < 6 else b"\xff"
    return bytes(content)


def random_exif(random):
    tags = [0x112, 0x8769, 0x8825, 0xA005, 0x11A, 0x927C, int(random.integers(65536))]
    entries = [
        (int(random.choice(tags)), int(random.integers(14)), int(random.choice([0, 1, 2, 5, 2**31])), random.bytes(4))
        for _ in range(random.integers(1, 6))
    ]
    return ifd(*entries, following=int(random.choice([0, 8, 9999])))


def test_of_a_damaged_file_only_an_image_error_comes_out(tmp_path):
    """2,000 files, the same every time."""
    random, path = np.random.default_rng(0), tmp_path / "a.img"
    exif = Image.Exif()
    exif[0x112], exif[0x10F] = 6, "maker"
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    seeds = [encoded(form, exif=exif) for form in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF")]
    seeds += [encoded(form) for form in ("GIF", "BMP", "JPEG2000", "PPM")]
    seeds += [encoded("PNG", COLOUR[..., 0], exif=exif), encoded("TIFF", COLOUR[..., 0], compression="tiff_lzw")]
    outcomes = dict.fromkeys((images.read_image, images.image_size, images.read_mask), 0)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for i in range(2000):
            path.write_bytes(jpeg_with(random_exif(random)) if i % 4 == 0 else damaged(random, seeds))
            for read in outcomes:
                try:
                    read(path)
                    outcomes[read] += 1
                except ImageError as error:
                    assert i % 4 or read is images.read_mask, "the EXIF block alone spoils no image"
                    assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert all(30 < read < 1900 for read in outcomes.values()), outcomes


# ---------------------------------------------------------------- class lists and masks


COLUMNS = [0, 1, 2, 3] * 4


@pytest.fixture
def folder_set(tmp_path):
    """Makes a folder data set: its classes.txt by bytes, and what its masks hold in columns."""

    def make(name, classes=b"grass\ntree\ncow\nsky\n", columns=(COLUMNS, COLUMNS[::-1], COLUMNS), mode="L"):
        folder = tmp_path / name
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True)
        for i, column in enumerate(columns):
            shade = np.arange(16, dtype=np.uint8)[:, None, None] * (5 + i)
            Image.fromarray(np.broadcast_to(shade, (16, 16, 3)).copy()).save(folder / f"images/{i}.png")
            Image.fromarray(np.tile(np.array(column, np.uint8), (16, 1))).convert(mode).save(folder / f"masks/{i}.png")
        (folder / "classes.txt").write_bytes(classes)
        return folder

    return make


@pytest.fixture
def measured(smoke, own_home, tmp_path):
    """The frame of the dense row on folder data sets, by tiny random models."""

    def measure(*folders):
        names = [f"folder:{folder}" for folder in folders]
        params = smoke(EvaluateRun, profile="smoke", methods=["dense"], benchmarks=names, results_dir=str(tmp_path / "results"))
        return evaluate.evaluate(evaluate.find_benchmarks(names), params)

    return measure


def test_a_blank_line_shifts_no_class(folder_set):
    with pytest.raises(DataError, match=r"blank/classes.txt: line 3 is blank, and line n names class n - 1; .*"):
        benchmarks.folder_set(folder_set("blank", b"grass\ntree\n\nsky\n"))
    ends = benchmarks.folder_set(folder_set("ends", b"grass\r\n tree \r\ncow\r\nsky\r\n\r\n \r\n"))
    assert ends.space.names == benchmarks.folder_set(folder_set("plain")).space.names


def test_every_spelling_of_background_is_one_class(folder_set):
    spellings = (b"background", b"Background", b"\xef\xbb\xbfbackground", b"_background_", b"BACKGROUND ")
    folders = [folder_set(f"set{i}", spelling + b"\ntree\ncow\nsky\n") for i, spelling in enumerate(spellings)]
    spaces = [benchmarks.folder_set(folder).space for folder in folders]
    assert all(space.background and space.names == ("background", "tree", "cow", "sky") for space in spaces)
    assert all(space.prompts == spaces[0].prompts for space in spaces)
    params = make(EvaluateParams, {})
    measured_as = [evaluate.protocol_space(benchmarks.folder_set(folder), params).prompts for folder in [*folders, folder_set("plain")]]
    assert measured_as[:-1] == measured_as[:1] * 5 and measured_as[-1] != measured_as[0]
    with pytest.raises(DataError, match="line 2 is 'Background', which is class 0 or none; put it first"):
        benchmarks.folder_set(folder_set("second", b"tree\nBackground\ncow\nsky\n"))


@pytest.mark.parametrize(
    "name, classes, columns, mode, sentence",
    [
        ("binary", b"background\ncow\n", [[0, 255] * 8] * 3, "L", "hold 0 and 255 alone, and 255 is ignored, so 'cow' never counts"),
        ("from_one", b"grass\ntree\n", [[1, 2] * 8, [1] * 16, [1] * 16], "L", "count from 1 (id 2 occurs, 0 never)"),
        ("colours", b"grass\ntree\n", [[0, 1] * 8] * 3, "RGB", "3 of 3 masks looked at cannot be read, such as"),
        ("past", b"grass\ntree\n", [[0, 1] * 8, [0, 128] * 8, [0, 64] * 8], "L", "hold ids past 1, such as 128"),
    ],
)
def test_masks_that_are_coded_otherwise_are_refused(folder_set, name, classes, columns, mode, sentence):
    with pytest.raises(DataError) as caught:
        benchmarks.folder_set(folder_set(name, classes, columns, mode))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_sound_masks_are_taken_as_they_are(folder_set):
    for name, columns in {
        "one_bad": [[0, 1] * 8, [0, 2] * 8, [1] * 16],
        "ignored": [[0, 255] * 8, [1] * 16],
        "rare": [[0] * 16] * 3,
    }.items():
        found = benchmarks.folder_set(folder_set(name, b"grass\ntree\n", columns))
        np.testing.assert_array_equal(found.samples[0].truth()[0], [images.IGNORED if k == 255 else k for k in columns[0]])


def test_a_class_that_no_mask_holds_is_said(folder_set, measured, capsys):
    words = b"grass\ntree\ncow\nsky\nhorse\n"
    measured(folder_set("unseen", words), folder_set("plain"), folder_set("from_one", words, [[1, 2] * 8, [3] * 16]))
    said = capsys.readouterr().err
    assert "unseen: no counted mask holds horse; see that its ids do not count from 1, for line n of classes.txt names class n - 1" in said
    assert "from_one: no counted mask holds grass, horse; id 0 never occurs, so its ids look counted from 1" in said
    assert "plain: no counted" not in said


def test_one_missing_mask_is_a_failure_of_one_image(folder_set, measured, capsys):
    folder = folder_set("gap")
    (folder / "masks/1.png").unlink()
    frame = measured(folder)
    assert frame["images"][0] == 2 and frame["failed"][0] == 1
    captured = capsys.readouterr()
    assert f"1.png: has no mask at {folder / 'masks/1.png'}" in captured.out + captured.err


# ---------------------------------------------------------------- folders of images


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    for name in ("set/a.png", "elsewhere/b.png", "elsewhere/deep/c.png", "set/.hidden/d.png", "set/._a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded("PNG"))
    (tmp_path / "set/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "set")
    (tmp_path / "set/twice").symlink_to(tmp_path / "elsewhere/deep")
    found = [str(path.relative_to(tmp_path / "set")) for path in images.find_images(tmp_path / "set")]
    assert len(found) == 3 and {"a.png", "link/b.png"} < set(found) and {"link/deep/c.png", "twice/c.png"} & set(found)


def test_images_that_are_not_read_here_are_told(tmp_path, capsys):
    for name in ("a.gif", "b.pgm", "c.jp2", "d.heic", "e.HEIC", "f.svg", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in images.find_images(tmp_path)] == ["a.gif", "b.pgm", "c.jp2"]
    assert f"{tmp_path}: skipped 2 .heic, 1 .svg, which" in capsys.readouterr().err


def test_first_frame_of_an_animation_counts(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert images.read_image(tmp_path / "a.gif")[5, 5].tolist() == [255, 0, 0]


def test_a_path_that_is_too_long_is_an_image_error(tmp_path):
    with pytest.raises(ImageError):
        images.read_image(tmp_path / ("a" * 300 + ".jpg"))


LONG = ("猫" * 82, "猫" * 81 + "犬", "é" * 124 + "a", "a" * 250 + "b", "a" * 250 + "c")
"""Stems of 246 to 251 bytes: with .png they are names that file systems still allow, with our suffixes most are not."""


@pytest.mark.parametrize("stem", ["a", "a" * 100, "猫" * 75])
def test_the_cache_names_its_files_by_stem_and_key(stem, tmp_path):
    (tmp_path / f"{stem}.png").touch()
    name = Cache("clip", ".safetensors", 1).path(tmp_path / f"{stem}.png").name
    assert name.startswith(f"{stem[:80]}-") and len(name) == len(stem[:80]) + 1 + 16 + len(".safetensors")


def test_images_of_long_names_are_labelled_evaluated_and_segmented(folder_set, measured, smoke, toy, tmp_path, capsys):
    folder = folder_set("long", columns=[COLUMNS] * len(LONG))
    for i, stem in enumerate(LONG):
        for part in ("images", "masks"):
            (folder / part / f"{i}.png").rename(folder / part / f"{stem}.png")
    frame = measured(folder)
    assert frame["images"][0] == len(LONG) and frame["failed"][0] == 0
    params = smoke(LabelRun, profile="smoke", collection=str(folder / "images"), reference_images=0)
    for samples, where in ((label.collection(params), "own"), (benchmarks.folder_set(folder).samples, "whole_names")):
        store, failures = label.label(samples, params, tmp_path / where)
        assert not failures and all(store.has(sample) for sample in samples)
        assert len(list((tmp_path / where).glob("*.png"))) == len(LONG)
        for sample in samples:
            store.fail(sample, "a reason")
            store.succeed(sample)
    out = tmp_path / "cut"
    words = ["--classes", "sun, house", "--profile", "smoke", "--module", str(toy.path)]
    assert cli.main(["segment", str(folder / "images"), *words, "--out", str(out)]) == 0, capsys.readouterr()
    assert len(list(out.glob("*.labels.png"))) == len(list(out.glob("*.json"))) == len(LONG)
