import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fmbseg.data import images, label_spaces
from fmbseg.errors import ImageError

RANDOM = np.random.default_rng(0)
RAMP = np.tile(np.linspace(0, 255, 24).astype(np.uint8), (12, 1))
COLOUR = np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 60)], axis=2)


def saved(path, array, mode=None, **options):
    opened = Image.fromarray(array)
    (opened.convert(mode) if mode else opened).save(path, **options)
    return path


def refusal(path, read=images.read_image, *arguments):
    """The message of a refusal: one sentence on one line that names the path and says what to do."""
    with pytest.raises(ImageError) as caught:
        read(path, *arguments)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and ";" in message
    return message


def test_rgb_png_is_read_as_it_is(tmp_path):
    image = images.read_image(saved(tmp_path / "a.png", COLOUR))
    assert image.dtype == np.uint8 and image.flags.writeable
    np.testing.assert_array_equal(image, COLOUR)


def test_rgb_jpeg_and_str_path(tmp_path):
    image = images.read_image(str(saved(tmp_path / "a.jpg", COLOUR, quality=95)))
    assert image.shape == COLOUR.shape and np.abs(image.astype(int) - COLOUR).mean() < 5


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grayscale_has_three_equal_channels(tmp_path, mode):
    np.testing.assert_array_equal(images.read_image(saved(tmp_path / "a.png", RAMP, mode)), np.dstack([RAMP] * 3))


def test_one_bit_is_black_and_white(tmp_path):
    image = images.read_image(saved(tmp_path / "a.png", np.where(RAMP > 127, 255, 0).astype(np.uint8), "1"))
    np.testing.assert_array_equal(image[0, :, 0], np.where(RAMP[0] > 127, 255, 0))


def test_palette_is_read_as_colours(tmp_path):
    opened = Image.fromarray((RAMP > 127).astype(np.uint8), mode="P")
    opened.putpalette([10, 20, 30, 200, 100, 50])
    opened.save(tmp_path / "a.png")
    image = images.read_image(tmp_path / "a.png")
    assert image[0, 0].tolist() == [10, 20, 30] and image[0, -1].tolist() == [200, 100, 50]


def test_transparent_palette_entry_is_white(tmp_path):
    opened = Image.fromarray((RAMP > 127).astype(np.uint8), mode="P")
    opened.putpalette([10, 20, 30, 200, 100, 50])
    opened.save(tmp_path / "a.png", transparency=0)
    image = images.read_image(tmp_path / "a.png")
    assert image[0, 0].tolist() == [255, 255, 255] and image[0, -1].tolist() == [200, 100, 50]


def test_rgba_is_laid_over_white(tmp_path):
    alpha = np.zeros_like(RAMP)
    alpha[:, 8:16], alpha[:, 16:] = 51, 255
    image = images.read_image(saved(tmp_path / "a.png", np.dstack([COLOUR, alpha])))
    assert (image[:, :8] == 255).all()
    np.testing.assert_allclose(image[:, 8:16], 0.2 * COLOUR[:, 8:16] + 0.8 * 255, atol=1)
    np.testing.assert_array_equal(image[:, 16:], COLOUR[:, 16:])


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_is_converted(tmp_path, suffix):
    cyan = np.zeros((10, 10, 4), np.uint8)
    cyan[..., 0] = 255
    Image.fromarray(cyan, mode="CMYK").save(tmp_path / f"a.{suffix}")
    np.testing.assert_allclose(images.read_image(tmp_path / f"a.{suffix}")[5, 5], [0, 255, 255], atol=3)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, suffix):
    image = images.read_image(saved(tmp_path / f"a.{suffix}", RAMP.astype(np.uint16) * 257))
    np.testing.assert_array_equal(image, np.dstack([RAMP] * 3))
    half = images.read_image(saved(tmp_path / f"half.{suffix}", np.full((9, 9), 32768, np.uint16)))
    assert (half == 127).all()


def test_dark_16_bit_image_stays_dark(tmp_path):
    assert images.read_image(saved(tmp_path / "a.png", np.full((9, 9), 200, np.uint16))).max() <= 1


def test_float_image_keeps_its_order(tmp_path):
    image = images.read_image(saved(tmp_path / "a.tif", RAMP.astype(np.float32) / 255))
    assert image.max() == 255 and (np.diff(image[0, :, 0].astype(int)) > 0).all()


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    image = images.read_image(saved(tmp_path / "a.png", COLOUR, exif=exif))
    np.testing.assert_array_equal(image, np.rot90(COLOUR, -1))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_truncated_file_is_refused(tmp_path, suffix, share):
    noise = RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path / f"a.{suffix}", noise)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "cannot be read as an image" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"not an image\n", b"\xff\xd8\xff\xe0"])
def test_file_that_is_no_image_is_refused(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    assert "cannot be read as an image" in refusal(path)


def test_missing_file_and_folder_are_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.jpg")
    assert "no such file" in refusal(tmp_path)


@pytest.mark.parametrize("height, width", [(1, 1), (7, 30), (30, 7), (1, 500), (8, 161), (161, 8)])
def test_tiny_and_extreme_images_are_refused(tmp_path, height, width):
    path = saved(tmp_path / "a.png", np.zeros((height, width, 3), np.uint8))
    assert f"{width} x {height} pixels" in refusal(path)


@pytest.mark.parametrize("height, width", [(8, 8), (8, 160), (160, 8)])
def test_smallest_and_thinnest_images_accepted(tmp_path, height, width):
    assert images.read_image(saved(tmp_path / "a.png", np.zeros((height, width, 3), np.uint8))).shape == (height, width, 3)


@pytest.mark.parametrize("given", [None, "a.jpg", np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3))])
def test_array_that_is_no_rgb_image_is_refused(given):
    with pytest.raises(ImageError, match="^image: got .*read_image$"):
        images.check_image(given)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_mask_keeps_its_indices(tmp_path, mode):
    indices = RANDOM.integers(0, 256, (9, 13), dtype=np.uint8)
    opened = Image.fromarray(indices, mode=mode)
    if mode == "P":
        opened.putpalette(RANDOM.integers(0, 256, 768).tolist())
    opened.save(tmp_path / "m.png")
    mask = images.read_mask(tmp_path / "m.png", (9, 13))
    np.testing.assert_array_equal(mask, np.where(indices == 255, images.IGNORED, indices.astype(int)))


@pytest.mark.parametrize("name", ["m.png", "m.tif"])
def test_a_mask_of_sixteen_bits_holds_more_classes_and_ignores_the_largest_value(tmp_path, name):
    indices = np.array([[0, 255, 256], [40_000, 65_534, 65_535]], np.uint16)
    Image.fromarray(indices).save(tmp_path / name)
    assert images.read_mask(tmp_path / name).tolist() == [[0, 255, 256], [40_000, 65_534, images.IGNORED]]


@pytest.mark.parametrize("classes, mode", [(255, "P"), (256, "I;16"), (2_000, "I;16")])
def test_a_label_map_is_read_as_it_was_written(tmp_path, classes, mode):
    labels = np.array([[0, 100, classes - 1, images.IGNORED]], np.int16)
    images.write_label_map(tmp_path / "m.png", labels, label_spaces.palette(classes))
    assert Image.open(tmp_path / "m.png").mode == mode
    np.testing.assert_array_equal(images.read_mask(tmp_path / "m.png"), labels)
    assert images.class_pixels(labels, classes).tolist() == np.eye(classes)[[0, 100, classes - 1]].sum(axis=0).tolist()


def test_one_bit_mask_holds_zero_and_one(tmp_path):
    mask = images.read_mask(saved(tmp_path / "m.png", np.where(RAMP > 127, 255, 0).astype(np.uint8), "1"))
    np.testing.assert_array_equal(mask, RAMP > 127)


def test_mask_of_another_size_or_mode_is_refused(tmp_path):
    path = saved(tmp_path / "m.png", np.zeros((9, 13), np.uint8))
    assert "the mask is 13 x 9 pixels and its image 9 x 13" in refusal(path, images.read_mask, (13, 9))
    assert "mode RGB" in refusal(saved(tmp_path / "rgb.png", COLOUR), images.read_mask)
    assert "mode F" in refusal(saved(tmp_path / "f.tif", RAMP.astype(np.float32)), images.read_mask)
    assert "no such file" in refusal(tmp_path / "none.png", images.read_mask)


def test_find_images_lists_images_below_sorted(tmp_path):
    for name in ("b.JPG", "a/c.png", "notes.txt", "a/d.webp", "e.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert images.find_images(tmp_path) == [tmp_path / "a/c.png", tmp_path / "a/d.webp", tmp_path / "b.JPG"]
    saved(tmp_path / "a-b.png", COLOUR)  # "-" comes before "/" in a text, and after the folder in a path
    assert images.find_images(tmp_path)[0] == tmp_path / "a/c.png" and images.find_images(tmp_path)[2] == tmp_path / "a-b.png"


def test_folder_without_images_is_refused(tmp_path):
    assert "no such folder" in refusal(tmp_path / "none", images.find_images)
    (tmp_path / "notes.txt").touch()
    assert "holds no image" in refusal(tmp_path, images.find_images)


def test_hidden_files_are_no_images(tmp_path):
    for name in ("a.png", ".b.png.x1.part.png", "._a.png"):
        (tmp_path / name).touch()
    assert images.find_images(tmp_path) == [tmp_path / "a.png"]


@pytest.mark.parametrize(
    "given, multiple, expected",
    [
        ((480, 640), 1, (448, 597)),
        ((640, 480), 1, (597, 448)),
        ((100, 100), 1, (448, 448)),
        ((200, 2000), 1, (205, 2048)),
        ((480, 640), 14, (448, 602)),
        ((480, 640), 32, (448, 608)),
    ],
)
def test_target_size(given, multiple, expected):
    assert images.target_size(*given, 448, 2048, multiple) == expected


def test_target_size_holds_at_least_one_multiple():
    assert images.target_size(8, 160, 448, 160, 32) == (32, 160)


def test_resize_keeps_size_and_interpolates():
    assert images.resize(COLOUR, (12, 24)) is COLOUR
    small = images.resize(COLOUR, (6, 8))
    assert small.shape == (6, 8, 3) and small.dtype == np.uint8
    np.testing.assert_array_equal(images.resize(np.full((9, 9, 3), 77, np.uint8), (20, 31)), np.full((20, 31, 3), 77))
    checks = np.tile(np.array([[0, 255], [255, 0]], np.uint8), (16, 16))[..., None].repeat(3, 2)
    assert np.abs(images.resize(checks, (8, 8)).astype(int) - 127).max() <= 3  # antialiased


@pytest.mark.parametrize("size", [(7, 9), (40, 21), (3, 3)])
def test_resize_map_is_bilinear_with_pixel_centres(size):
    maps = torch.rand(2, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(images.resize_map(maps, size), F.interpolate(maps, size, mode="bilinear", align_corners=False))


def test_normalise():
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.25, 2.0)
    given = np.stack([COLOUR, COLOUR[::-1]])
    for batch in (given, torch.from_numpy(given.copy())):
        out = images.normalise(batch, mean, std)
        assert out.shape == (2, 3, 12, 24) and out.dtype == torch.float32
        np.testing.assert_allclose(out.permute(0, 2, 3, 1), (given / 255 - np.array(mean)) / np.array(std), atol=1e-6)


def bilinear_by_hand(image, size):
    """Every pixel of the result from the four pixels around its centre, as OpenCV's INTER_LINEAR has it."""
    out = np.zeros((*size, 3))
    for row, column in np.ndindex(*size):
        place = [(i + 0.5) * old / new - 0.5 for i, old, new in zip((row, column), image.shape, size)]
        near = [(int(np.floor(at)), at - np.floor(at)) for at in place]
        for down, across in np.ndindex(2, 2):
            weight = abs(1 - down - near[0][1]) * abs(1 - across - near[1][1])
            y, x = (int(np.clip(at + step, 0, old - 1)) for (at, _), step, old in zip(near, (down, across), image.shape))
            out[row, column] += weight * image[y, x]
    return out


@pytest.mark.parametrize("size", [(7, 9), (40, 33), (20, 12), (5, 60)])
def test_cv2_bilinear_is_bilinear_without_antialiasing(size):
    image = np.random.RandomState(0).randint(0, 256, (40, 24, 3), dtype=np.uint8)
    made = images.resize(image, size, "cv2_bilinear")
    assert made.shape == (*size, 3) and made.dtype == np.uint8 and made.flags.c_contiguous
    assert np.abs(made - bilinear_by_hand(image, size)).max() <= 0.51  # nothing but rounding
    assert np.abs(made.astype(int) - images.resize(image, size)).max() > 10
