"""Draw docs/example.png: an image, CLIP's own dense segmentation, and FMbSeg's by the module of the repository.

    python scripts/example_image.py

The image is one of the embedded benchmark's whose licence allows it: COCO val2017 311303, CC BY 2.0; one that comes out well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fmbseg import profiles
from fmbseg.data import fetch, images
from fmbseg.runs import modules
from fmbseg.runs.cache import Models
from fmbseg.stage1 import features
from fmbseg.stage1.query_sam import class_similarity
from fmbseg.stage2.segmenter import label_map, words_space
from fmbseg.viz import figures

IMAGE, WORDS = "000000311303.jpg", "sandwich, cup, dining table"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "example.png")
    options = parser.parse_args()
    p = profiles.load("label", "embedded")
    models, space = Models.of(p), words_space(WORDS)
    image = images.read_image(fetch.require("coco_panoptic_20") / "images" / IMAGE)
    found = features.extract(image, models.clip, p)
    dense = label_map(class_similarity(found, models.texts(space)), image.shape[:2])
    aligned = modules.Segmenter.load(modules.SHIPPED).segment(image, space).labels
    figure = figures.label_figure(image, {"CLIP's dense features": dense, "FMbSeg": aligned}, space)
    figures.save(figure, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
