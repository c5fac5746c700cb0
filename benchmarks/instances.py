"""How many objects of the truth ``--instances`` tells apart: whole classes, their connected parts, and SAM's masks.

    python benchmarks/instances.py
    python benchmarks/instances.py --set points_per_side=16

On the embedded images with outlines of single objects (20 panoptic, 10 with instances), of their true label maps and of the label
maps of a module. An object counts as found where an instance of its class, which counts for one object, has an IoU of 0.5 with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import pandas as pd

from fmbseg import cli, files, profiles
from fmbseg.data import benchmarks, images
from fmbseg.data.fetch import require
from fmbseg.data.samples import Sample, read_instances, read_panoptic
from fmbseg.runs import evaluate, modules
from fmbseg.tools import instances


def objects(sample: Sample) -> Iterator[tuple[int, np.ndarray]]:
    """COCO's category and (height, width) bool mask of every object of the truth that is no crowd."""
    panoptic, folder = require("coco_panoptic_20"), require("coco_instances_10")
    for one in files.read_json(panoptic / "panoptic.json")["annotations"]:
        if one["image_id"] == int(sample.name):
            for segment in one["segments_info"]:
                if not segment["iscrowd"]:
                    mask = read_panoptic(panoptic / "masks" / f"{sample.name}.png", ((segment["id"], 1),)) == 1
                    yield segment["category_id"], mask
    for one in files.read_json(folder / "instances_val2017_subset.json")["annotations"]:
        if one["image_id"] == int(sample.name) and not one["iscrowd"]:
            yield one["category_id"], read_instances(images.image_size(sample.image), [(1, one)], 0) == 1


def found(made: list[np.ndarray], true: list[np.ndarray]) -> int:
    """How many of the true masks have an instance of IoU 0.5 or more, each instance taken once."""
    free, count = list(made), 0
    for mask in true:
        ious = [(one & mask).sum() / (one | mask).sum() for one in free]
        if ious and max(ious) >= 0.5:
            count += 1
            del free[int(np.argmax(ious))]
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="embedded")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE")
    options = parser.parse_args()
    p = profiles.load("evaluate", options.profile, cli.settings(options.set))
    benchmark = benchmarks.load_benchmark("embedded_coco_object81")
    space, segmenter = evaluate.protocol_space(benchmark, p), modules.Segmenter.load(modules.default(p.profile), p.device, p)
    regions = instances.sam_regions([sample.image for sample in benchmark.samples], p)
    rows = []
    for sample in benchmark.samples:
        true: dict[int, list[np.ndarray]] = {}
        for category, mask in objects(sample):
            if index := benchmarks._class_of(category, space):
                true.setdefault(index, []).append(mask)
        masks, image = regions[sample.image](), images.read_image(sample.image)
        maps = {"the truth": sample.truth(), "the module": segmenter.label(segmenter.embed(image), segmenter.texts(space), space.rule)}
        for title, labels in maps.items():
            for way in ("", "parts", "sam"):
                for k in {*true, *np.unique(labels).tolist()} - {0, images.IGNORED}:
                    made = list(instances.split(labels == k, way, masks))
                    rows.append((title, way or "classes", len(true.get(k, [])), found(made, true.get(k, [])), len(made)))
    frame = pd.DataFrame(rows, columns=["label maps", "instances", "objects", "found", "made"])
    print(f"{len(benchmark.samples)} images, points_per_side = {p.points_per_side}")
    print(frame.groupby(["label maps", "instances"], sort=False).sum().to_string())


if __name__ == "__main__":
    main()
