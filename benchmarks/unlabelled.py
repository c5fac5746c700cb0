"""What is right among the pixels that ``segment`` still labels, as more of them are left out ("none of these").

    python benchmarks/unlabelled.py --data-root DATA voc21 folder:coco_object folder:msrc
    python benchmarks/unlabelled.py --labels --every 1 embedded_coco_object80

Every fourth image of each benchmark, sorted by path, in the module that comes with the repository. The words are the benchmark's classes but
the background: a pixel of the background is right only where it is left out. Thresholds are those at which the named share of
pixels stays. Written as the table of docs/measurements.md.

--labels: how well the margins of pseudo labels (Stage 1) tell right pixels and images from wrong ones: that of CLIP's dense
features, which ``label --results`` writes, and that of the masks.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import pandas as pd
from tqdm import tqdm

from fmbseg import profiles
from fmbseg.data import benchmarks, images
from fmbseg.data.images import IGNORED
from fmbseg.runs import cache, label, modules
from fmbseg.runs.cache import Models
from fmbseg.stage1 import features, pseudo_labels, query_sam
from fmbseg.stage1.detection import detect
from fmbseg.stage2.segmenter import Placed, best_class, confidence

SHARES = (0.9, 0.75, 0.5, 0.25)
STEP = 5  # every so many pixels along each side are counted


def pixels(name: str, data_root: str, every: int) -> tuple[int, pd.DataFrame]:
    """(images, one row a pixel of a known truth: whether it is right, similarity, margin, and votes of its class)."""
    found = benchmarks.load_benchmark(name, data_root)
    first = int(found.space.background)
    space = found.space.without_background(name) if first else found.space
    params = profiles.load("segment", "embedded")
    segmenter = modules.Segmenter.load(modules.SHIPPED, params=params)
    texts = segmenter.texts(space)
    samples, frames = sorted(found.samples, key=lambda sample: str(sample.image))[::every], []
    for sample in tqdm(samples, desc=name):
        image, truth = images.read_image(sample.image), sample.truth()
        embedded, crops = segmenter.embed(image), features.extract(image, segmenter.clip, params)
        labels, placed = segmenter.label(embedded, texts), segmenter.place(embedded, texts)
        fine = placed.at(embedded.size, params.interpolation)
        certain = confidence(fine, labels)
        truth = np.where(truth == IGNORED, -2, truth - first)  # -1: background, which no word names
        frame = {"similarity": certain.similarity, "margin": certain.margin, "right": labels == truth}
        for votes in (0, 1, 3):
            kept = sorted(one.index for one in detect(crops, texts, params.model_copy(update={"min_votes": votes})))
            few = best_class(replace(fine, patches=fine.patches[kept])) if kept else np.zeros_like(labels)
            frame[f"right {votes}"] = (np.array(kept)[few] == truth) if kept else np.zeros(truth.shape, bool)
            frame[f"kept {votes}"] = np.isin(labels, kept)
            frame[f"labelled {votes}"] = np.full(truth.shape, bool(kept))
        known = truth[::STEP, ::STEP] > -2
        frames.append(pd.DataFrame({key: value[::STEP, ::STEP][known] for key, value in frame.items()}))
    return len(samples), pd.concat(frames, ignore_index=True)


def table(found: pd.DataFrame) -> list[tuple[str, float, float]]:
    """(what is left out, coverage, precision) of each way."""
    rows = [("nothing", 1.0, found["right"].mean())]
    for votes in (0, 1, 3):
        few = found[found[f"labelled {votes}"]]
        rows.append((f"classes of at most {votes} crops, others take their pixels", len(few) / len(found), few[f"right {votes}"].mean()))
        few = found[found[f"kept {votes}"]]
        rows.append((f"pixels of classes of at most {votes} crops", len(few) / len(found), few["right"].mean()))
    for what in ("similarity", "margin"):
        for share in SHARES:
            least = found[what].quantile(1 - share)
            few = found[found[what] >= least]
            rows.append((f"{what} < {least:.3f}", len(few) / len(found), few["right"].mean()))
    for share in SHARES[1:]:
        few = found[found["kept 0"]]
        least = few["margin"].quantile(1 - share)
        few = few[few["margin"] >= least]
        rows.append((f"pixels of classes without a crop, and margin < {least:.3f}", len(few) / len(found), few["right"].mean()))
    return rows


def margins_of_labels(name: str, data_root: str, every: int) -> str:
    """A row: area under the ROC curve over the labelled pixels, and rank correlation of an image's mean margin with its precision."""
    found = benchmarks.load_benchmark(name, data_root)
    params = profiles.load("label", "embedded")
    models = Models.of(params)
    texts, frames = models.texts(found.space), []
    for sample in tqdm(sorted(found.samples, key=lambda sample: str(sample.image))[::every], desc=name):
        made, truth = label.label_cached(sample.image, found.space, models, params), sample.truth()
        maps = query_sam.class_similarity(cache.clip_features(sample.image, models, params), texts)
        _, of_mask = pseudo_labels.paint([replace(mask, similarity=mask.margin) for mask in made.query_masks], made.labels.shape)
        known = (made.labels != IGNORED) & (truth != IGNORED)
        margins = {"dense": confidence(Placed.whole(maps, made.labels.shape), made.labels).margin, "masks": of_mask}
        frame = {key: value[known] for key, value in margins.items()} | {"right": (made.labels == truth)[known], "image": sample.name}
        frames.append(pd.DataFrame(frame))
    pixels, right = pd.concat(frames, ignore_index=True), pd.concat(frames)["right"].to_numpy()
    images_ = pixels.groupby("image").mean()
    said = []
    for what in ("dense", "masks"):
        ranks = pixels[what].rank().to_numpy()
        area = (ranks[right].mean() - (right.sum() + 1) / 2) / (~right).sum()
        said.append(f"{area:.2f} | {images_[what].corr(images_['right'], method='spearman'):.2f}")
    return f"| {name} (n={len(images_)}) | {100 * right.mean():.1f} | {' | '.join(said)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="+")
    parser.add_argument("--data-root", default="")
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--labels", action="store_true")
    options = parser.parse_args()
    if options.labels:
        print("| benchmark | precision % | dense margin: ROC area | rank correlation | margin of the masks: ROC area | rank correlation |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name in options.benchmarks:
            print(margins_of_labels(name, options.data_root, options.every), flush=True)
        return
    print("| benchmark | left out | coverage % | precision % |\n| --- | --- | --- | --- |")
    for name in options.benchmarks:
        many, found = pixels(name, options.data_root, options.every)
        for what, coverage, precision in table(found):
            print(f"| {name} (n={many}) | {what} | {100 * coverage:.0f} | {100 * precision:.1f} |", flush=True)


if __name__ == "__main__":
    main()
