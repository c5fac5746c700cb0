"""Images that are segmented in tiles: label maps as of the whole image, reference kept, bounded memory, polygons that give back the masks."""

import contextlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmbseg import cli, files
from fmbseg.data import images
from fmbseg.data.images import IGNORED
from fmbseg.errors import ParameterError
from fmbseg.runs import modules
from fmbseg.schemas import SegmentRun
from fmbseg.stage1.windows import Window
from fmbseg.stage2 import segmenter
from fmbseg.stage2.segmenter import words_space
from fmbseg.tools import segmenting, tiles

rasterio = pytest.importorskip("rasterio", reason='rasterio is not installed: pip install -e ".[geo]"')
from rasterio.features import rasterize  # noqa: E402
from rasterio.warp import transform_geom  # noqa: E402

WORDS = words_space("person, dog, car, tree, grass, street", "sky, wall")
PLACE = rasterio.transform.from_origin(431_000.0, 5_412_000.0, 0.5, 0.5)


def write(path, bands, crs="EPSG:32631", **more):
    with rasterio.open(path, "w", driver="GTiff", height=bands.shape[1], width=bands.shape[2], count=len(bands), dtype=bands.dtype,
                       crs=crs, transform=PLACE, **more) as made:  # fmt: skip
        made.write(bands)
    return path


@pytest.fixture
def geotiff(real_image, tmp_path):
    return write(tmp_path / "land.tif", real_image.transpose(2, 0, 1))


def params(**values):
    return SegmentRun(profile="embedded", window=128, window_stride=96, tile=160, **values)


def run(path, out, p, overlay=lambda path, *_: path.touch()):
    places = segmenting.find([str(path)], out)
    segmenting.run(places, WORDS, modules.SHIPPED, p, overlay, out)
    return files.read_json(segmenting.beside(places[path], ".json"))


def whole(image, **values):
    """Of an image at its own size, all at once."""
    p = params(segment_short_side=min(image.shape[:2]), **values)
    return modules.Segmenter.load(modules.SHIPPED, params=p).segment(image, WORDS)


def test_labels_of_tiles_are_those_of_the_whole_image_with_its_reference(geotiff, real_image, tmp_path):
    said, expected = run(geotiff, tmp_path / "cut", params(least_margin=0.005)), whole(real_image, least_margin=0.005)
    with rasterio.open(tmp_path / "cut/land.labels.tif") as made:
        labels, colours = made.read(1), made.colormap(1)
        assert (made.crs, made.transform, made.nodata, made.dtypes) == (rasterio.CRS.from_epsg(32631), PLACE, 255, ("uint8",))
        assert json.loads(made.tags()["classes"]) == list(WORDS.names) and made.block_shapes == [(256, 256)]
    assert [colours[k][:3] for k in range(len(WORDS))] == [tuple(c) for c in WORDS.palette.tolist()] and colours[255][:3] == (255,) * 3
    assert (labels == np.where(expected.labels == IGNORED, 255, expected.labels)).mean() > 0.9999 and (labels == 255).any()
    with rasterio.open(tmp_path / "cut/land.margin.tif") as made:
        assert np.abs(made.read(1).astype(int) - expected.confidence.levels * (labels != 255)).max() <= 1
        assert made.crs == rasterio.CRS.from_epsg(32631)
    described = segmenter.describe(expected)
    described["mean_margin"] = pytest.approx(described["mean_margin"], abs=2e-4)
    added = {"image": str(geotiff), "labels_sha256": files.file_sha256(tmp_path / "cut/land.labels.tif")}
    assert said == described | added | {name: said[name] for name in ("key", "words_key", "classes")}
    assert [(c["name"], c["pixels"]) for c in said["classes"]] == [
        (WORDS.names[k], int((labels == k).sum())) for k in sorted(set(np.unique(labels)) - {255}, key=lambda k: -(labels == k).sum())
    ]
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {f"land{s}" for s in files.TILED_SUFFIXES} | {
        segmenting.SUMMARY,
        segmenting.CLASSES,
    }


@pytest.mark.parametrize("size", [(100, 430), (257, 300), (448, 449), (129, 128)])
def test_the_windows_of_a_part_are_those_of_the_image(size):
    p = params()
    every = {(w.top, w.left) for w in tiles.windows(*size, p.window, p.window_stride)}
    seen = np.zeros(size, int)
    for tile in tiles.tiles(size, 70):
        part = tiles.around(tile, size, p)
        tile.of(seen)[:] += 1
        own = [(w.top + part.top, w.left + part.left) for w in tiles.windows(part.height, part.width, p.window, p.window_stride)]
        assert set(own) == {(t, le) for t, le in every if t < tile.top + tile.height and le < tile.left + tile.width
                            and tile.top < t + p.window and tile.left < le + p.window}  # fmt: skip
    assert (seen == 1).all()


def test_a_stopped_image_goes_on_at_the_tile_where_it_was(geotiff, tmp_path, monkeypatch):
    made, real = [], tiles.segment_tile

    def segment(stop_after=None, **values):
        def one(tile, *rest):
            if len(made) == stop_after:
                raise KeyboardInterrupt
            made.append(tile)
            return real(tile, *rest)

        monkeypatch.setattr(tiles, "segment_tile", one)
        made.clear()
        with pytest.raises(KeyboardInterrupt) if stop_after else contextlib.nullcontext():
            run(geotiff, tmp_path / "cut", params(**values))
        return list(made)

    with rasterio.open(geotiff) as source:
        every = tiles.tiles(source.shape, 160)
    assert segment(stop_after=2) == every[:2]
    assert segment() == every[2:]
    assert segment() == []  # what is there is not made again
    assert segment(stop_after=2, least_margin=0.5) == every[:2]
    assert segment(least_margin=0.01) == every  # nothing of other parameters is taken
    with rasterio.open(tmp_path / "cut/land.labels.tif") as made_file:
        assert (made_file.read(1) != 255)[: every[0].height, : every[0].width].mean() > 0.5


def test_what_counts_as_large(real_image, geotiff, tmp_path):
    Image.fromarray(real_image).save(tmp_path / "plain.tif")
    pixels = real_image.shape[0] * real_image.shape[1]
    assert tiles.is_tiled(geotiff, pixels) and not tiles.is_tiled(tmp_path / "plain.tif", pixels)
    assert tiles.is_tiled(tmp_path / "plain.tif", pixels - 1)
    many = write(tmp_path / "many.tif", np.repeat(real_image.transpose(2, 0, 1), 2, axis=0).astype(np.uint16), crs=None)
    assert tiles.is_tiled(many, pixels)  # six bands of 16 bits, which PIL does not read
    said = run(tmp_path / "plain.tif", tmp_path / "cut", params(largest_whole=pixels - 1))
    assert said["classes"] and (tmp_path / "cut/plain.labels.tif").is_file()
    assert said["words_key"] == files.digest(WORDS.names, WORDS.prompts)
    labels = tmp_path / "cut/plain.labels.tif"
    made = labels.read_bytes()
    labels.write_bytes(made + b" ")
    with pytest.raises(ParameterError, match="no image could be segmented"):  # a person changed it
        run(tmp_path / "plain.tif", tmp_path / "cut", params())
    labels.write_bytes(made)
    run(tmp_path / "plain.tif", tmp_path / "cut", params())  # now all at once: nothing is left of the tiles
    assert {p.name for p in (tmp_path / "cut").glob("plain.*")} == {f"plain{s}" for s in files.RESULT_SUFFIXES}


def test_depths_palettes_and_pixels_without_a_value(real_image, tmp_path):
    bands, part = real_image.transpose(2, 0, 1), Window(10, 20, 50, 70)
    grey = tiles.Raster.of(write(tmp_path / "grey.tif", bands[:1])).read(part)[0]
    assert (grey == part.of(bands[0])[..., None]).all()
    deep = tiles.Raster.of(write(tmp_path / "deep.tif", bands.astype(np.float32) * 7 - 300))
    low, high = np.percentile(bands, (2, 98), axis=(1, 2))
    expected = ((real_image - low) / (high - low)).clip(0, 1) * 255
    assert np.abs(deep.read(part)[0] - part.of(expected.transpose(2, 0, 1)).transpose(1, 2, 0)).max() < 1.01
    shown = Image.fromarray(real_image).quantize(50)
    shown.save(tmp_path / "palette.png")
    assert (
        tiles.Raster.of(tmp_path / "palette.png").read(part)[0]
        == part.of(np.array(shown.convert("RGB")).transpose(2, 0, 1)).transpose(1, 2, 0)
    ).all()
    holed = bands.copy()
    holed[:, :40] = 7
    run(write(tmp_path / "holed.tif", holed, nodata=7), tmp_path / "cut", params())
    with rasterio.open(tmp_path / "cut/holed.labels.tif") as made:
        assert ((made.read(1) == 255) == (holed == 7).all(axis=0)).all()


def test_polygons_give_back_the_label_map(geotiff, real_image, tmp_path, capsys, monkeypatch):
    plain = tmp_path / "plain.png"
    Image.fromarray(real_image).save(plain)
    arguments = ["segment", str(geotiff), str(plain), "--classes", "person, dog, tree, street", "--background", "sky, wall"]
    arguments += ["--module", str(modules.SHIPPED), "--out", str(tmp_path / "cut"), "--format", "geojson,coco", "--least-margin", "0.002"]
    assert cli.main([*arguments, "--set", "tile=500", "--set", "window=128", "--set", "window_stride=128"]) == 0
    assert "1 images that were segmented in tiles are written as geojson alone" in capsys.readouterr().err
    for name, suffix, reference in (("land", "tif", "EPSG:32631"), ("plain", "png", None)):
        with warnings.catch_warnings(action="ignore"), rasterio.open(tmp_path / f"cut/{name}.labels.{suffix}") as made:
            labels, where = made.read(1), {"transform": made.transform} if reference else {}
        said = files.read_json(tmp_path / f"cut/fmbseg-export/geojson/{name}.geojson")
        assert said["type"] == "FeatureCollection" and said["coordinates"].startswith("WGS 84" if reference else "pixels")
        assert any(len(f["geometry"]["coordinates"]) > 1 for f in said["features"])  # holes
        shapes = [(f["geometry"], f["properties"]["index"]) for f in said["features"]]
        if reference:
            west, south = np.min([ring for shape, _ in shapes for ring in shape["coordinates"][0]], axis=0)
            assert 2 < west < 2.1 and 48.8 < south < 48.9  # 431 km, 5412 km of zone 31: near Paris
            shapes = [(transform_geom("EPSG:4326", reference, shape), k) for shape, k in shapes]
        back = rasterize(shapes, labels.shape, fill=255, dtype="uint8", **where)
        assert (back == np.where(labels == 0, 255, labels)).all()
        assert len({f["properties"]["class"] for f in said["features"]}) >= 2  # which ones depends on the module's numbers, not on this
    assert len(files.read_json(tmp_path / "cut/fmbseg-export/coco.json")["images"]) == 1


MEASURE = """
import resource, sys
from pathlib import Path
import numpy as np, rasterio
from rasterio.windows import Window
from fmbseg.schemas import SegmentRun
from fmbseg.stage2.segmenter import words_space
from fmbseg.tools import segmenting
folder, module = Path(sys.argv[1]), Path(sys.argv[2])
patch = np.random.default_rng(0).integers(0, 255, (3, 256, 256), np.uint8)
params = SegmentRun(profile="smoke", window=256, window_stride=256, tile=512, largest_whole=1)
for side in (512, 2560):
    path = folder / f"{side}.tif"
    with rasterio.open(path, "w", driver="GTiff", height=side, width=side, count=3, dtype="uint8", tiled=True, blockxsize=256, blockysize=256) as made:
        for top in range(0, side, 256):
            for left in range(0, side, 256):
                made.write(patch, window=Window(left, top, 256, 256))
    places = segmenting.find([str(path)], folder / "cut")
    segmenting.run(places, words_space("sun, house, tree"), module, params, lambda path, *_: path.touch(), folder / "cut")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_does_not_grow_with_the_image(toy, tmp_path):
    """25 times the pixels: in one tile they take 180 MB more."""
    given = [sys.executable, "-c", MEASURE, str(tmp_path), str(toy.path)]
    told = subprocess.run(given, capture_output=True, text=True, check=True).stdout.splitlines()
    small, large = (float(line) for line in told if line[0].isdigit())
    assert large < small + 60


def test_what_tiles_cannot_do_is_said(geotiff, tmp_path, capsys, monkeypatch):
    arguments = ["segment", str(geotiff), "--classes", "person, dog", "--out", str(tmp_path / "cut")]
    assert cli.main([*arguments, "--set", "regions=sam"]) == 2
    assert "masks do not vote in videos and in tiles" in capsys.readouterr().err
    turned = Image.Exif()
    turned[274] = 6
    Image.open(geotiff).save(tmp_path / "turned.jpg", exif=turned)
    with pytest.raises(images.ImageError, match="is turned by its EXIF"):
        tiles.Raster.of(tmp_path / "turned.jpg")
    Path(geotiff).write_bytes(geotiff.read_bytes()[:2000])
    assert cli.main(arguments) == 2 and "cannot be read or written in tiles" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rasterio", None)
    assert cli.main(arguments) == 2
    assert f'{geotiff}: needs rasterio, which is not installed; run: pip install "fmbseg[geo]"' in capsys.readouterr().out.replace(
        "left out ", ""
    )
