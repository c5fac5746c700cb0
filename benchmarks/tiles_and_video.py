"""What docs/tools.md says of tiles and videos, with the module that comes with the repository.

python benchmarks/tiles_and_video.py memory FOLDER --side 8960     # peak memory and seconds of one large image, made of real ones
python benchmarks/tiles_and_video.py seams FOLDER                  # pixels that differ from the whole image's, by margin
python benchmarks/tiles_and_video.py flicker FOLDER                # pixels that change between frames of a still scene, by --average
"""

from __future__ import annotations

import argparse
import copy
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from fmbseg import profiles
from fmbseg.data import images
from fmbseg.runs import modules
from fmbseg.runs.parallel import evenly_spaced
from fmbseg.stage1.windows import Window
from fmbseg.stage2.segmenter import Compared, Segmenter, words_space
from fmbseg.tools import segmenting, tiles, video
from fmbseg.viz import figures

SPACE = words_space("person, dog, cat, car, bus, chair, table, food, tree, grass", "sky, wall, floor, street")
PARAMS = profiles.load("segment", "embedded")
SIDE, MARGINS = 224, (0, 112, 224)
FRAMES, NOISE, REACH = 8, 10, (0, 1, 2, 4)


def memory(paths: list[Path], side: int) -> None:
    import rasterio

    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "large.tif", Path(folder) / "cut"
        with rasterio.open(path, "w", driver="GTiff", height=side, width=side, count=3, dtype="uint8", tiled=True) as made:
            for k, tile in enumerate(tiles.tiles((side, side), 256)):
                image = images.read_image(paths[k % len(paths)])[: tile.height, : tile.width]
                box = rasterio.windows.Window(tile.left, tile.top, image.shape[1], image.shape[0])
                made.write(image.transpose(2, 0, 1), window=box)
        begun, params = time.monotonic(), PARAMS.model_copy(update={"largest_whole": 1, "workers": 1})
        segmenting.run(segmenting.find([str(path)], out), SPACE, modules.SHIPPED, params, figures.save_overlay, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{side} x {side} pixels: {peak:.2f} GiB at most, {time.monotonic() - begun:.0f} s")


def seams(paths: list[Path], segmenter: Segmenter) -> None:
    differ: dict[str, list[float]] = {}
    for path in paths:
        image = images.read_image(path)
        size, raster = image.shape[:2], tiles.Raster.of(path)
        whole = at_own_size(segmenter, image)
        for tile in tiles.tiles(size, SIDE):
            own = tiles.segment_tile(tile, raster, SPACE, lambda: segmenter)[0]
            differ.setdefault("windows of the whole image", []).append((own != tile.of(whole)).mean())
            for margin in MARGINS:
                top, left = max(tile.top - margin, 0), max(tile.left - margin, 0)
                part = image[top : tile.top + tile.height + margin, left : tile.left + tile.width + margin]
                inside = Window(tile.top - top, tile.left - left, tile.height, tile.width)
                one = inside.of(at_own_size(segmenter, part))
                differ.setdefault(f"margin of {margin} pixels", []).append((one != tile.of(whole)).mean())
    for way, shares in differ.items():
        print(f"{way}: {np.mean(shares):.4%} of the pixels differ (n={len(paths)}, tiles of {SIDE})")


def at_own_size(segmenter: Segmenter, image: np.ndarray) -> np.ndarray:
    own = copy.copy(segmenter)
    own.params = own.params.model_copy(update={"segment_short_side": min(image.shape[:2])})
    return own.segment(image, SPACE).labels


def flicker(paths: list[Path], segmenter: Segmenter) -> None:
    changed: dict[int, list[float]] = {reach: [] for reach in REACH}
    for number, path in enumerate(paths):
        image = images.read_image(path)
        noise = np.random.default_rng(number).normal(0, NOISE, (FRAMES, *image.shape))
        shown = [(image + one).clip(0, 255).astype(np.uint8) for one in noise]
        compared = [segmenter.compare(one, SPACE) for one in shown]
        for reach in REACH:
            near = [several for _, several in video.centred(compared, reach)]
            labels = np.stack([segmenter.decide(one, Compared.mean(several), SPACE).labels for one, several in zip(shown, near)])
            changed[reach].append((labels[1:] != labels[:-1]).mean())
    for reach, shares in changed.items():
        print(
            f"--average {reach}: {np.mean(shares):.2%} change from frame to frame (n={len(paths)}, {FRAMES} frames, noise {NOISE} of 255)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "seams", "flicker"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=10, help="images, evenly spread")
    parser.add_argument("--side", type=int, default=8960)
    options = parser.parse_args()
    paths = evenly_spaced(images.find_images(options.folder), options.limit)
    if options.what == "memory":
        memory(paths, options.side)
    else:
        {"seams": seams, "flicker": flicker}[options.what](paths, modules.Segmenter.load(modules.SHIPPED, params=PARAMS))


if __name__ == "__main__":
    main()
