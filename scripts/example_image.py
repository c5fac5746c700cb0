"""Draw two images of the README: docs/example.png and docs/stage1.png.

    python scripts/example_image.py

example.png: an image, CLIP's own dense segmentation, and FMbSeg's by the module of the repository. stage1.png: Stage 1.1 of the
class with most votes in that image: its similarity map with the query points, and SAM's three masks. The image is one of the
embedded benchmark's whose licence allows it: COCO val2017 311303, CC BY 2.0; one that comes out well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fmbseg import profiles
from fmbseg.data import fetch, images
from fmbseg.runs import modules
from fmbseg.runs.cache import Models
from fmbseg.stage1 import detection, features
from fmbseg.stage1.query_sam import class_similarity, query_masks
from fmbseg.stage2.segmenter import label_map, words_space
from fmbseg.viz import figures

IMAGE, WORDS = "000000311303.jpg", "sandwich, cup, dining table"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "docs", help="where the two files are written")
    options = parser.parse_args()
    p = profiles.load("label", "embedded")
    models, space = Models.of(p), words_space(WORDS)
    texts, image = models.texts(space), images.read_image(fetch.require("coco_panoptic_20") / "images" / IMAGE)
    found = features.extract(image, models.clip, p)
    similarity = class_similarity(found, texts)

    aligned = modules.Segmenter.load(modules.SHIPPED).segment(image, space).labels
    maps = {"CLIP's dense features": label_map(similarity, image.shape[:2]), "FMbSeg": aligned}
    figures.save(figures.label_figure(image, maps, space), options.folder / "example.png")

    (query,) = query_masks(image, found, detection.detect(found, texts, p)[:1], texts, models.sam, p)
    figure = figures.query_figure(image, query, similarity[query.detected.index])
    figure.set_size_inches(10, 2)
    figures.save(figure, options.folder / "stage1.png")
    print(options.folder / "example.png", options.folder / "stage1.png")


if __name__ == "__main__":
    main()
