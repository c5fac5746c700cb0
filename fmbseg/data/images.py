"""Images and masks: the one place where they are read, resized and normalised.

NumPy arrays outside, (height, width, 3) RGB ``uint8``; torch tensors inside, (batch, channel, height, width).
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, features

from fmbseg import files
from fmbseg.errors import ImageError, tell

IGNORED = -1
"""Index of pixels that do not count: ignored in ground truth, unlabelled in pseudo labels. Label maps are ``int16``; in a
file such a pixel has the largest value of the file's depth (IGNORED_IN_FILES)."""

IGNORED_IN_FILES = {8: 255, 16: 65_535}
"""Value of ignored pixels in mask files, by bits a pixel."""

SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"),
    *(suffix for suffix, decoder in ((".jp2", "jpg_2000"), (".avif", "avif")) if features.check(decoder)),
)
"""Suffixes of the files that are read as images; of an animation the first frame is read."""

UNREAD = (".heic", ".heif", ".jxl", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw")
"""Suffixes of images that are not read here: they are skipped with a warning."""

MIN_SIDE = 8
MAX_ASPECT = 20

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Turn whatever PIL raises for a damaged file (its plugins raise any built-in exception) into an ImageError that names it."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: too many pixels to be read safely ({error}); scale it down first") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: cannot be read as an image ({reason}); replace or remove it") from error


def _orientation(opened: Image.Image) -> int:
    """EXIF's orientation of an image, 1 to 8; 1, upright, where it is missing or cannot be read."""
    if opened.format == "TIFF":  # PIL turns it by itself
        return 1
    try:
        value = opened.getexif().get(ExifTags.Base.Orientation)
        return int(value) if value in _TURNS else 1
    except Exception:  # as for ``_reading``: the image itself may be sound
        return 1


def open_image(path: str | Path | BinaryIO) -> Image.Image:
    """The image of a file, by path or open, fully decoded by PIL. Raises ImageError when the file is missing or damaged."""
    with _reading(path):
        if isinstance(path, (str, Path)) and not Path(path).is_file():
            raise ImageError(f"{path}: no such file; give the path of an image ({', '.join(SUFFIXES)})")
        opened = Image.open(path)
        opened.load()
        return opened


def read_image(path: str | Path) -> np.ndarray:
    """Read an image of any common mode as (height, width, 3) RGB ``uint8``, upright as its EXIF says.

    Grayscale, palette, CMYK, transparent (over white) and 16-bit images are converted. Raises ImageError when the file is
    missing or damaged, or its size is not accepted (``check_image``). An EXIF block that cannot be read is ignored.
    """
    opened = open_image(path)
    with _reading(path):
        return check_image(_rgb(opened), str(path))


def _rgb(opened: Image.Image) -> np.ndarray:
    turn = _TURNS.get(_orientation(opened))
    opened = opened if turn is None else opened.transpose(turn)
    if opened.mode.startswith("I") or opened.mode == "F":  # 16 or 32 bits a pixel: scale, do not clip
        values = np.asarray(opened, dtype=np.float64)
        largest = values.max(initial=0)
        top = 1.0 if opened.mode == "F" and largest <= 1 else 65535.0 if opened.mode.startswith("I;16") or largest > 255 else 255.0
        opened = Image.fromarray(np.clip(values / top * 255, 0, 255).astype(np.uint8))
    if "A" in opened.getbands() or "transparency" in opened.info:
        opened = opened.convert("RGBA")
        opened = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened)
    return np.array(opened.convert("RGB"))  # a copy of its own, writable


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) in pixels of an image, upright as its EXIF says, from its header alone.

    Raises ImageError when the file cannot be read as an image.
    """
    with _reading(path), Image.open(path) as opened:
        return opened.size if _orientation(opened) >= 5 else opened.size[::-1]


def check_image(image: np.ndarray, name: str = "image") -> np.ndarray:
    """Return ``image`` if it is a (height, width, 3) ``uint8`` array whose sides are accepted, else raise ImageError.

    Sides must have at least ``MIN_SIDE`` pixels, and the long side at most ``MAX_ASPECT`` times those of the short side.
    name: its name in the error.
    """
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        given = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError(f"{name}: got {given}; give a (height, width, 3) RGB uint8 array, or read it with read_image")
    height, width = image.shape[:2]
    if min(height, width) < MIN_SIDE or max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageError(
            f"{name}: {width} x {height} pixels; both sides must have at least {MIN_SIDE} pixels"
            f" and the long one at most {MAX_ASPECT} times the short one"
        )
    return image


def read_mask(path: str | Path | BinaryIO, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read an index mask (8-bit grayscale or palette, or 16-bit grayscale; PNG or TIFF) as (height, width) ``int32``.

    The largest value of the file's depth (IGNORED_IN_FILES) is read as IGNORED. size: (height, width) of its image. Raises
    ImageError for a mask of another size, because masks are never resized.
    """
    opened = open_image(path)
    if opened.mode not in ("L", "P", "1") and not opened.mode.startswith("I;16"):
        raise ImageError(
            f"{path}: a mask of mode {opened.mode}; masks are 8-bit index PNGs (grayscale or palette) or 16-bit grayscale ones,"
            " whose pixels are class indices"
        )
    mask = np.array(opened, dtype=np.int32)
    mask[mask == IGNORED_IN_FILES[16 if opened.mode.startswith("I") else 8]] = IGNORED
    if size is not None and mask.shape != tuple(size):
        raise ImageError(
            f"{path}: the mask is {mask.shape[1]} x {mask.shape[0]} pixels and its image {size[1]} x {size[0]}; both must be of one size"
        )
    return mask


def write_label_map(path: str | Path, labels: np.ndarray, palette: np.ndarray) -> None:
    """Write (height, width) class indices as ``read_mask`` reads them.

    palette: (K, 3) ``uint8``. Up to 255 classes give an 8-bit palette PNG, which viewers show in colour, with IGNORED in white;
    more classes give a 16-bit grayscale PNG.
    """
    if len(palette) > IGNORED_IN_FILES[8]:
        shown = Image.fromarray(labels.astype(np.uint16))
    else:
        shown = Image.fromarray(labels.astype(np.uint8), mode="P")
        shown.putpalette(palette.tobytes() + bytes([255] * 3 * (256 - len(palette))))
    with files.atomic_path(path) as part:
        shown.save(part, format="PNG")


def class_pixels(labels: np.ndarray, classes: int) -> np.ndarray:
    """(classes,) number of pixels of every class in a label map; ignored pixels do not count."""
    return np.bincount(labels.ravel().astype(np.intp) - IGNORED, minlength=classes - IGNORED)[-IGNORED:]


def find_images(folder: str | Path) -> list[Path]:
    """All images under a folder, sorted by path. Hidden files and folders are skipped; links to folders are followed, once each.

    What ``fmbseg segment`` wrote is skipped too. Raises ImageError when there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder; give a folder of images ({', '.join(SUFFIXES)})")
    here = [(path, os.path.splitext(path)[1].lower()) for path in _files(folder)]  # text: a Path is slow to make and to compare
    if skipped := Counter(suffix for _, suffix in here if suffix in UNREAD):
        tell(
            f"{folder}: skipped {', '.join(f'{n} {s}' for s, n in sorted(skipped.items()))}, which is not read here; convert them to JPEG or PNG"
        )
    of_images = sorted((path for path, suffix in here if suffix in SUFFIXES), key=lambda path: path.split(os.sep))
    found = [path for path in map(Path, of_images) if not files.is_result(path)]
    if not found:
        raise ImageError(f"{folder}: holds no image; accepted are {', '.join(SUFFIXES)}")
    return found


def _files(folder: Path) -> Iterator[str]:
    """Paths of the files under a folder, unsorted and without hidden ones. A folder that several links lead to is entered once."""

    def unlisted(error: OSError) -> None:
        tell(f"{error.filename}: left out, for it cannot be listed ({error.strerror})")

    entered = set()
    for top, folders, names in os.walk(folder, followlinks=True, onerror=unlisted):
        status = os.stat(top)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(top, name) for name in names if not name.startswith("."))


def target_size(height: int, width: int, short_side: int, long_limit: int, multiple: int = 1) -> tuple[int, int]:
    """(height, width) in pixels after the short side is scaled to ``short_side``, or the long side to ``long_limit`` if that is less.

    Sides are rounded to a multiple of ``multiple``, at least one.
    """
    scale = min(short_side / min(height, width), long_limit / max(height, width))
    limit = max(long_limit // multiple, 1) * multiple
    return tuple(min(max(multiple, round(side * scale / multiple) * multiple), limit) for side in (height, width))


def resize(image: np.ndarray, size: tuple[int, int], way: str = "pil_bicubic") -> np.ndarray:
    """Resize a (height, width, 3) ``uint8`` image to ``size`` = (height, width).

    way: "pil_bicubic", with antialiasing, or "cv2_bilinear", without; this is OpenCV's ``INTER_LINEAR`` to within one grey value.
    """
    if image.shape[:2] == tuple(size):
        return image
    if way == "cv2_bilinear":
        scaled = resize_map(torch.from_numpy(image.transpose(2, 0, 1)[None]).float(), size)
        return scaled[0].round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return np.array(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def resize_map(maps: torch.Tensor, size: tuple[int, int], mode: str = "bilinear") -> torch.Tensor:
    """Interpolate (batch, channel, height, width) maps to ``size``, ``align_corners=False``. mode: "bilinear" or "bicubic"."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode=mode, align_corners=False)


@functools.lru_cache(maxsize=8)  # an image needs four; a few MB each
def resampling(size: int, length: int, mode: str = "bilinear") -> torch.Tensor:
    """(size, length): what ``resize_map`` does along one axis, as a matrix, for it is linear and rows and columns are apart.

    Made once for images of one size: not to be written to.
    """
    return resize_map(torch.eye(length)[None, :, :, None], (size, 1), mode)[0, :, :, 0].T


def normalise(images: np.ndarray | torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(batch, height, width, 3) ``uint8`` -> (batch, 3, height, width) ``float32``: scaled to [0, 1], minus mean, divided by std."""
    tensor = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255
    shape = (1, 3, 1, 1)
    return (tensor - torch.tensor(mean, device=tensor.device).view(shape)) / torch.tensor(std, device=tensor.device).view(shape)
