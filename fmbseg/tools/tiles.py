"""Images too large for memory, and GeoTIFFs: read, segmented and written a tile at a time; label maps as GeoJSON polygons.

Needs the optional extra: pip install "fmbseg[geo]".
"""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fmbseg import files
from fmbseg.data.images import IGNORED, IGNORED_IN_FILES
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.errors import ImageError
from fmbseg.params import SegmentParams
from fmbseg.runs import parallel
from fmbseg.schemas import SegmentRun
from fmbseg.stage1.windows import Window, windows
from fmbseg.stage2.segmenter import Confidence, Segmenter, describe_totals, totals

GEO_KEYS = 34735
"""Number of the TIFF tag that only a GeoTIFF has: its reference."""

BLOCK = 256
"""Side in pixels of the blocks in which label maps are stored."""

SHOWN = 1024
"""Long side in pixels of the overlay of a tiled image."""

CACHE = 256
"""Megabytes of blocks that the library for GeoTIFFs keeps in memory."""


@contextmanager
def _raster(path: Path) -> Iterator[Any]:
    """The library for GeoTIFFs. Its errors become an ImageError that names the file."""
    try:
        import rasterio
    except ImportError:
        raise ImageError(f'{path}: needs rasterio, which is not installed; run: pip install "fmbseg[geo]"') from None
    try:
        with warnings.catch_warnings(), rasterio.Env(GDAL_CACHEMAX=CACHE):
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            yield rasterio
    except rasterio.errors.RasterioError as error:
        raise ImageError(f"{path}: cannot be read or written in tiles ({' '.join(str(error).split())}); replace or remove it") from error


def is_tiled(path: Path, largest_whole: int) -> bool:
    """Whether an image is segmented in tiles: it has more pixels, or is a GeoTIFF or another TIFF that only rasterio reads."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as opened:
            return opened.width * opened.height > largest_whole or (opened.format == "TIFF" and GEO_KEYS in opened.tag_v2)
    except Image.DecompressionBombError:
        return True
    except Exception:  # PIL's plugins raise any exception for damaged files and TIFFs with many bands
        return path.suffix.lower() in (".tif", ".tiff") and path.is_file()


@dataclass(frozen=True)
class Raster:
    """An image that is read in parts.

    size: (height, width); bands: numbers of the red, green and blue band; colours: (256, 3) ``uint8`` palette, if it has one;
    darkest, brightest: for bands that are not ``uint8``, the values of each band that become 0 and 255.
    """

    path: Path
    size: tuple[int, int]
    bands: tuple[int, int, int]
    colours: np.ndarray | None = None
    darkest: np.ndarray | None = None
    brightest: np.ndarray | None = None

    @classmethod
    def of(cls, path: Path) -> Raster:
        """The first three bands, or the first alone as grey. Bands of another depth than 8 bits are stretched from the 2nd to the
        98th percentile of the whole image (ours), so that the tiles fit. Raises ImageError where nothing can read it."""
        with _raster(path) as rasterio, rasterio.open(path) as source:
            if source.tags().get("EXIF_Orientation", "1") != "1":
                raise ImageError(f"{path}: is turned by its EXIF, which is not done in tiles; turn its pixels and give it again")
            raster = cls(path, source.shape, (1, 2, 3) if source.count >= 3 else (1, 1, 1))
            if source.colorinterp[0] == rasterio.enums.ColorInterp.palette:
                table = source.colormap(1)
                return cls(path, raster.size, raster.bands, np.array([table.get(k, (0, 0, 0))[:3] for k in range(256)], np.uint8))
            if source.dtypes[0] == "uint8":
                return raster
            pixels, known = raster._read(rasterio, source, out_shape=_reduced(raster.size))
            known &= np.isfinite(pixels).all(axis=0)
            if not known.any():
                raise ImageError(f"{path}: holds no value; give an image with pixels")
            return cls(path, raster.size, raster.bands, None, *np.percentile(pixels[:, known], (2, 98), axis=1))

    def _read(self, rasterio: Any, source: Any, **part: Any) -> tuple[np.ndarray, np.ndarray]:
        return source.read(self.bands, **part), source.dataset_mask(**part) > 0

    def read(self, window: Window | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(height, width, 3) RGB ``uint8``, and (height, width) bool: where the file has a value. window: the part to read; None:
        the whole image, with its long side reduced to SHOWN pixels."""
        with _raster(self.path) as rasterio, rasterio.open(self.path) as source:
            if window is None:
                pixels, known = self._read(rasterio, source, out_shape=_reduced(self.size))
            else:
                box = rasterio.windows.Window(window.left, window.top, window.width, window.height)
                pixels, known = self._read(rasterio, source, window=box)
        if self.colours is not None:
            return self.colours[pixels[0]], known
        pixels = pixels.transpose(1, 2, 0)
        if self.darkest is not None:
            span = np.maximum(self.brightest - self.darkest, 1e-9)
            pixels = (np.nan_to_num((pixels - self.darkest) / span).clip(0, 1) * 255).astype(np.uint8)
        return np.ascontiguousarray(pixels), known


def _reduced(size: tuple[int, int]) -> tuple[int, int]:
    scale = min(SHOWN / max(size), 1)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def tiles(size: tuple[int, int], side: int) -> list[Window]:
    """Tiles of ``side`` that cover an image of (height, width) = ``size`` once, row by row; the last ones are smaller."""
    return [
        Window(top, left, min(side, size[0] - top), min(side, size[1] - left))
        for top in range(0, size[0], side)
        for left in range(0, size[1], side)
    ]


def around(tile: Window, size: tuple[int, int], params: SegmentParams) -> Window:
    """The part of an image of (height, width) = ``size`` that decides the labels of a tile: all sliding windows that meet the tile.

    The windows of the part are those windows of the whole image, so its labels inside the tile are those of the whole image.
    """

    def reach(start: int, length: int, whole: int) -> tuple[int, int]:
        met = [w for w in windows(1, whole, params.window, params.window_stride) if w.left < start + length and start < w.left + w.width]
        return met[0].left, met[-1].left + met[-1].width

    (top, bottom), (left, right) = reach(tile.top, tile.height, size[0]), reach(tile.left, tile.width, size[1])
    return Window(top, left, bottom - top, right - left)


def segment_tile(tile: Window, raster: Raster, space: LabelSpace, load: Callable[[], Segmenter]) -> tuple[np.ndarray, Confidence]:
    """Labels of a tile and their confidence, as in ``Segmentation``, at the image's own resolution.

    Pixels without a value in the file are IGNORED. load: returns the segmenter, which each process keeps.
    """
    own = copy.copy(load())
    part = around(tile, raster.size, own.params)
    image, known = raster.read(part)
    own.params = own.params.model_copy(update={"segment_short_side": min(image.shape[:2]), "segment_long_limit": max(image.shape[:2])})
    result, inside = own.segment(image, space), Window(tile.top - part.top, tile.left - part.left, tile.height, tile.width)
    labels = np.where(inside.of(known), inside.of(result.labels), IGNORED)
    similarity, margin = (np.where(labels == IGNORED, 0, inside.of(v)) for v in (result.confidence.similarity, result.confidence.margin))
    return labels, Confidence(similarity, margin)


def segment(
    path: Path,
    place: Path,
    key: str,
    space: LabelSpace,
    load: Callable[[], Segmenter],
    params: SegmentRun,
    overlay: Callable[[Path, np.ndarray, np.ndarray, LabelSpace], None],
) -> None:
    """Segment an image tile by tile into ``files.TILED_SUFFIXES`` at ``place``.

    Label map and margin keep the image's reference. The label map has class indices, ``uint8`` up to 255 classes and ``uint16`` above,
    no value where unlabelled, and the classes' colours and names; the margin is ``Confidence.levels``. Finished tiles are kept in a
    hidden folder until the image is finished, so that a run that was stopped goes on. key: covers everything that decides the labels;
    load: as in ``segment_tile``; overlay: as in ``segmenting.run``. Raises ImageError where the image or a tile cannot be read.
    """
    raster = Raster.of(path)
    kept, every = place.with_name(f".{place.name}.tiles"), tiles(raster.size, params.tile)
    work = functools.partial(_kept, raster=raster, folder=kept / files.digest(key, params.tile), space=space, load=load)
    done = parallel.each(work, every, f"segmenting {path.name}", params.workers, unit="tile")
    if done.failures:
        raise ImageError(f"{path}: {len(done.failures)} of {len(every)} tiles failed ({done.failures[0].why}); the others are kept")
    labels_file, margin_file, shown_margin, shown, described = (
        place.with_name(f"{place.name}{suffix}") for suffix in (".labels.tif", ".margin.tif", ".margin.png", ".overlay.png", ".json")
    )
    said = {"image": os.path.abspath(path), "words_key": files.digest(space.names, space.prompts)}
    said |= describe_totals(np.sum([counted for _, (counted, _) in done.results], axis=0), raster.size, space)
    files.write_json(described, said)  # marks the files beside it as ours; the key, written last, as complete
    with _raster(path) as rasterio:
        with rasterio.open(path) as source:
            layout = {"height": raster.size[0], "width": raster.size[1], "crs": source.crs, "transform": source.transform, "count": 1}
        layout |= {"driver": "GTiff", "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate", "BIGTIFF": "IF_SAFER"}
        bits = 8 if len(space) <= IGNORED_IN_FILES[8] else 16
        none = IGNORED_IN_FILES[bits]
        with (
            files.atomic_path(labels_file) as labels_part,
            files.atomic_path(margin_file) as margin_part,
            rasterio.open(labels_part, "w", dtype=f"uint{bits}", nodata=none, **layout) as labels_raster,
            rasterio.open(margin_part, "w", dtype="uint8", **layout) as margin_raster,
        ):
            labels_raster.update_tags(classes=json.dumps(space.names, ensure_ascii=False))
            if bits == 8:
                colours = dict(enumerate(map(tuple, space.palette.tolist())))
                labels_raster.write_colormap(1, colours | {none: (255, 255, 255)})
            for tile, (_, file) in done.results:
                box = rasterio.windows.Window(tile.left, tile.top, tile.width, tile.height)
                with np.load(file) as one:
                    labels = one["labels"]
                    labels_raster.write(np.where(labels == IGNORED, none, labels).astype(f"uint{bits}"), 1, window=box)
                    margin_raster.write(one["margin"], 1, window=box)
        with rasterio.open(labels_file) as labels_raster, rasterio.open(margin_file) as margin_raster:
            labels, margin = (source.read(1, out_shape=_reduced(raster.size)) for source in (labels_raster, margin_raster))
    overlay(shown, raster.read()[0], np.where(labels == none, IGNORED, labels.astype(np.int32)), space)
    with files.atomic_path(shown_margin) as part:
        Image.fromarray(margin).save(part, format="PNG")
    files.write_json(described, said | {"labels_sha256": files.file_sha256(labels_file), "key": key})
    shutil.rmtree(kept)


def _kept(tile: Window, raster: Raster, folder: Path, space: LabelSpace, load: Callable[[], Segmenter]) -> tuple[np.ndarray, Path]:
    """The totals of a tile and the file of its labels and margin, made where it is not there."""
    file = folder / f"{tile.top}-{tile.left}.npz"
    if not file.is_file():
        labels, confidence = segment_tile(tile, raster, space, load)
        counted = totals(labels, confidence, len(space))
        with files.atomic_path(file) as part, open(part, "wb") as stream:
            np.savez_compressed(stream, labels=labels, margin=confidence.levels, totals=counted)
    with np.load(file) as one:
        return one["totals"], file


def geojson(labels: np.ndarray | Path, space: LabelSpace, path: Path) -> None:
    """Write the connected parts of a label map as GeoJSON polygons with holes, without background and unlabelled pixels.

    labels: (height, width) class indices, or the file of a label map that ``segment`` wrote, which is read in parts. Coordinates are
    WGS 84 (longitude, latitude) where the file has a reference, else pixels from the upper left corner, y down; the member
    "coordinates" says which. Each feature has its class's name and index.
    """
    first, last = int(space.background), len(space)
    with _raster(path) as rasterio, ExitStack() as opened:
        from rasterio.features import shapes
        from rasterio.warp import transform_geom

        reference, where = None, {}
        if isinstance(labels, Path):
            file = opened.enter_context(rasterio.open(labels))
            reference, labels = file.crs, rasterio.band(file, 1)
            where = {"transform": file.transform} if reference else {}
        else:
            labels = labels.astype(np.int32)
        part = opened.enter_context(files.atomic_path(path))
        stream = opened.enter_context(open(part, "w", encoding="utf-8"))
        said = "WGS 84 longitude and latitude" if reference else "pixels from the upper left corner, y down; no reference is known"
        stream.write(f'{{"type": "FeatureCollection", "coordinates": {json.dumps(said)}, "features": [')
        comma = "\n"
        for geometry, k in shapes(labels, **where):
            if first <= k < last:
                geometry = transform_geom(reference, "EPSG:4326", geometry) if reference else geometry
                properties = {"class": space.names[int(k)], "index": int(k)}
                feature = {"type": "Feature", "properties": properties, "geometry": geometry}
                stream.write(comma + json.dumps(feature, ensure_ascii=False))
                comma = ",\n"
        stream.write("\n]}\n")
