"""Videos and folders of frames: decoded, segmented and written one frame at a time. Needs the optional extra: pip install "fmbseg[video]"."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fmbseg import files
from fmbseg.data import images
from fmbseg.data.images import class_pixels
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.errors import ImageError, ParameterError
from fmbseg.runs import parallel
from fmbseg.schemas import SegmentRun
from fmbseg.stage2.segmenter import Compared, Segmenter

T = TypeVar("T")

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
"""Suffixes of the files that are taken for videos."""

RATE = Fraction(25)
"""Frames a second of a folder's overlay, and of a video that does not say its own."""


@contextmanager
def _codecs(path: Path) -> Iterator[Any]:
    """The library for videos; what it raises is an ImageError that names the file."""
    try:
        import av
    except ImportError:
        raise ImageError(f'{path}: needs PyAV, which is not installed; run: pip install "fmbseg[video]"') from None
    try:
        yield av
    except av.error.FFmpegError as error:
        raise ImageError(f"{path}: cannot be decoded ({error.strerror}); convert it to another format, or leave it out") from error


def is_video(path: Path) -> bool:
    """Whether a path is segmented as a video: a file of SUFFIXES, or a folder."""
    return path.suffix.lower() in SUFFIXES or path.is_dir()


def content(path: Path) -> str:
    """The hash of a video, or of the frames of a folder and their names."""
    if path.is_dir():
        return files.digest([(str(one.relative_to(path)), files.sha256_of(one)) for one in images.find_images(path)])
    return files.sha256_of(path)


def frames(path: Path, every: int = 1) -> Iterator[tuple[str, np.ndarray]]:
    """Every so many-th frame with its name: (height, width, 3) RGB ``uint8``, upright.

    Frames of a video are named by their numbers from 0, those of a folder, in the order of its paths, by their files. Raises ImageError
    for a video that cannot be decoded, and for frames of another size than the first.
    """
    size = None
    for name, image in (_of_folder if path.is_dir() else _of_video)(path, every):
        size = size or image.shape
        if image.shape != size:
            now, first = (f"{width} x {height}" for height, width, _ in (image.shape, size))
            raise ImageError(f"{path}: frame {name} has {now} pixels and the first {first}; all must be of one size")
        yield name, image


def _of_folder(path: Path, every: int) -> Iterator[tuple[str, np.ndarray]]:
    found = images.find_images(path)
    for name, one in list(zip(files.flat_names([one.relative_to(path) for one in found]), found))[::every]:
        yield name, images.read_image(one)


def _of_video(path: Path, every: int) -> Iterator[tuple[str, np.ndarray]]:
    with _codecs(path) as av, av.open(path) as opened:
        if not opened.streams.video:
            raise ImageError(f"{path}: holds no video; give a file that does")
        for number, frame in enumerate(opened.decode(opened.streams.video[0])):
            if number % every == 0:
                image = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                yield f"{number:06d}", images.check_image(np.ascontiguousarray(image), f"{path}, frame {number}")


@dataclass(frozen=True)
class Timing:
    """count: of all frames, 0 where it is unknown; rate: frames a second."""

    count: int
    rate: Fraction

    @classmethod
    def of(cls, path: Path) -> Timing:
        if path.is_dir():
            return cls(len(images.find_images(path)), RATE)
        with _codecs(path) as av, av.open(path) as opened:
            stream = next(iter(opened.streams.video), None)
            return cls(stream.frames, Fraction(stream.average_rate or RATE)) if stream else cls(0, RATE)


def centred(items: Iterable[T], reach: int) -> Iterator[tuple[T, list[T]]]:
    """Each item with those of at most ``reach`` places before and after it, itself among them; so many are held, no more."""
    held: deque[T | None] = deque(maxlen=2 * reach + 1)
    for item in chain(items, repeat(None, reach)):
        held.append(item)
        if len(held) > reach and (now := held[-1 - reach]) is not None:
            yield now, [one for one in held if one is not None]


class _Frame:
    """A frame that is compared with the words when it is first asked for."""

    def __init__(self, name: str, image: np.ndarray, compare: Callable[[np.ndarray], Compared]):
        self.name, self.image, self._compare = name, image, compare

    @functools.cached_property
    def compared(self) -> Compared:
        return self._compare(self.image)


def segment(
    path: Path,
    place: Path,
    key: str,
    space: LabelSpace,
    load: Callable[[], Segmenter],
    params: SegmentRun,
    paint: Callable[[np.ndarray, np.ndarray, LabelSpace], np.ndarray],
) -> None:
    """Segment a video into a label map a frame, ``PLACE/NAME.labels.png``, ``PLACE.overlay.mp4`` and ``PLACE.json``.

    With ``average`` A, a frame's labels are those of the mean similarities of it and of A frames before and after it (ours):

        S_t = 1 / |W_t|  sum_{u in W_t} s_u,    W_t = {u : |u - t| <= A}

    where u counts the frames that are segmented (``every``). A frame whose label map is there under ``key`` is not segmented again. load:
    returns the segmenter; paint: (image, labels, space) -> the frame of the overlay. Raises ImageError as ``frames`` does, and
    ParameterError where PLACE holds files of the user's.
    """
    described, overlay = (place.with_name(f"{place.name}{suffix}") for suffix in (".json", ".overlay.mp4"))
    key, said = files.digest(key, params.every, params.average), files.result(described)
    there = sorted(place.glob("*.labels.png"))
    if said.get("key") == key and said["frames"] == len(there) and overlay.is_file():
        return
    if not said and place.is_dir() and any(place.iterdir()):
        raise ParameterError(f"{place}: holds files that fmbseg segment did not write; give another --out")
    if key not in (said.get("key"), said.get("making")):
        for file in there:
            file.unlink()
    timing, counted, count = Timing.of(path), np.zeros(len(space), np.int64), 0
    compare = functools.partial(load().compare, space=space)
    every = (_Frame(*frame, compare) for frame in frames(path, params.every))
    with ExitStack() as opened:
        bar = opened.enter_context(parallel.progress(-(-timing.count // params.every) or None, f"segmenting {path.name}", "frame"))
        write = None
        for frame, near in centred(every, params.average):
            if write is None:
                size = frame.image.shape[:2]
                begun = {"image": os.path.abspath(path), "height": size[0], "width": size[1], "classes": [], "making": key}
                files.write_json(described, begun)  # the files beside it are ours from now on
                write = opened.enter_context(_writing(overlay, size, timing.rate / params.every))
            file = place / f"{frame.name}.labels.png"
            if file.is_file():
                labels = images.read_mask(file)
            else:
                labels = load().decide(frame.image, Compared.mean([one.compared for one in near]), space).labels
                images.write_label_map(file, labels, space.palette)
            write(paint(frame.image, labels, space))
            counted, count = counted + class_pixels(labels, len(space)), count + 1
            bar.update()
    if not count:
        raise ImageError(f"{path}: holds no frame; give a video that does")
    everywhere = size[0] * size[1] * count
    found = [
        {
            "name": space.names[k],
            "index": k,
            "words": list(space.prompts[k]),
            "pixels": int(counted[k]),
            "share": round(counted[k] / everywhere, 4),
        }
        for k in sorted(np.flatnonzero(counted).tolist(), key=lambda k: -counted[k])
    ]
    del begun["making"]
    whole = {"frames": count, "rate": float(timing.rate / params.every), "unlabelled": round(1 - counted.sum() / everywhere, 4)}
    files.write_json(described, begun | whole | {"classes": found, "key": key})


@contextmanager
def _writing(path: Path, size: tuple[int, int], rate: Fraction) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends a (height, width, 3) RGB ``uint8`` image of (height, width) = ``size`` to an mp4, written atomically."""
    with files.atomic_path(path) as part, _codecs(path) as av, av.open(part, "w", format="mp4") as made:
        stream = made.add_stream("libx264", rate=rate.limit_denominator(65535), height=size[0], width=size[1])
        stream.pix_fmt = "yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p"  # the other halves both sides

        def write(image: np.ndarray) -> None:
            made.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))

        yield write
        made.mux(stream.encode())
