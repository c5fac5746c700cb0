"""Train the projections of the embedded profile's stand-in for CLIP, from images with image-level names.

    python scripts/train_standin.py --images FOLDER NAMES.json [--images ...] --out FILE.safetensors

NAMES.json holds {"file stem": ["name", ...], ...}. Both towers stay frozen (the LiT idea); what is learned is closed
form, so the same images give the same file. See docs/standin.md for how the recipe was chosen.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fmbseg import files
from fmbseg.data import fetch, images
from fmbseg.errors import DataError
from fmbseg.models import texts as texts_of
from fmbseg.runs import parallel

SIDE = 260
RENAMED = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor", "mouse": "computer mouse"}


@dataclass(frozen=True)
class Recipe:
    """How the projections are fitted.

    ridge: penalty per image, of standardised features; classifier: weight of the ImageNet classifier's opinion
    of each image beside its names (1: as much); whitening: exponent of the text projection, 0 (none) to 0.5 (full).
    """

    ridge: float = 1.0
    classifier: float = 1.0
    whitening: float = 0.25


@dataclass(frozen=True)
class Named:
    """Pooled features of n images in three views and their names.

    views: (3, n, 1280); names: N texts; owned: (n, N) 1 where an image has a name; texts: (N, 384) unit norm,
    before any projection; opinion: (3, n, 1000) the classifier's probabilities; classes: its 1000 texts' features (1000, 384).
    """

    views: torch.Tensor
    names: tuple[str, ...]
    owned: torch.Tensor
    texts: torch.Tensor
    opinion: torch.Tensor
    classes: torch.Tensor
    class_names: tuple[str, ...]


@functools.cache
def _network() -> nn.Module:
    import timm

    network = timm.create_model("tf_efficientnet_lite2", pretrained=False).eval()
    network.load_state_dict(files.read_tensors(fetch.require("efficientnet_lite2") / "model.safetensors")[0])
    return network


@torch.inference_mode()
def pooled_views(path: Path) -> Path:
    """Pooled features of one image, cached: squashed to a square, its central square, and whole; (3, 1280)."""
    key = files.digest(files.sha256_of(path), "pooled views", SIDE, fetch.key("efficientnet_lite2"))
    target = files.home() / "cache" / "standin" / f"{path.stem}-{key}.safetensors"
    if target.is_file():
        return target
    image = images.read_image(path)
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    views = [
        images.resize(image, (SIDE, SIDE)),
        images.resize(image[top : top + side, left : left + side], (SIDE, SIDE)),
        images.resize(image, images.target_size(height, width, SIDE, 600)),
    ]
    pooled = [_network().forward_features(images.normalise(v[None], (127 / 255,) * 3, (128 / 255,) * 3)).mean(dim=(2, 3))[0] for v in views]
    return files.write_tensors(target, {"views": torch.stack(pooled)})


@torch.inference_mode()
def text_features(prompts: Sequence[str]) -> torch.Tensor:
    """(N, 384) unit-norm mean-pooled MiniLM features, before the stand-in's text projection."""
    from transformers import AutoModel, AutoTokenizer

    folder = fetch.require("all_minilm_l6_v2")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    pooled = []
    for start in range(0, len(prompts), 128):
        batch = tokenizer(list(prompts[start : start + 128]), padding=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None].float()
        pooled.append((model(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1))
    return F.normalize(torch.cat(pooled), dim=-1)


def read_named(collections: Sequence[tuple[Path, Path]], workers: int) -> Named:
    """Images and names of several (folder, JSON file) pairs. Raises DataError where an image is missing."""
    import timm.data

    tagged: dict[Path, list[str]] = {}
    for folder, names in collections:
        here = {path.stem: path for path in images.find_images(folder)}
        for stem, tags in files.read_json(names).items():
            if stem not in here:
                raise DataError(f"{names}: names {stem!r}, and {folder} holds no such image")
            if tags:
                tagged[here[stem]] = [RENAMED.get(tag, tag) for tag in tags]
    done = parallel.each(pooled_views, list(tagged), "pooled features", workers)
    if done.failures:
        raise DataError(f"{done.failures[0].item}: {done.failures[0].reason}")
    views = torch.stack([files.read_tensors(file)[0]["views"] for _, file in done.results], dim=1)
    names = tuple(sorted({tag for tags in tagged.values() for tag in tags}))
    index = {name: i for i, name in enumerate(names)}
    owned = torch.zeros(len(tagged), len(names))
    for row, tags in enumerate(tagged.values()):
        owned[row, [index[tag] for tag in tags]] = 1
    info = timm.data.ImageNetInfo("imagenet-1k")
    class_names = tuple(info.index_to_description(i).split(",")[0].strip() for i in range(1000))
    (template,) = texts_of.templates("one")
    texts = text_features([template.replace("{}", name) for name in (*names, *class_names)])
    with torch.inference_mode():
        opinion = _network().classifier(views).softmax(dim=-1)
    return Named(views, names, owned, texts[: len(names)], opinion, texts[len(names) :], class_names)


def whitening(texts: torch.Tensor, exponent: float) -> torch.Tensor:
    """(D, D) symmetric map that shrinks the texts' strong common directions: covariance to the power -exponent."""
    values, vectors = torch.linalg.eigh(texts.T @ texts / len(texts))
    return vectors @ torch.diag((values.clamp(min=0) + 1e-4) ** -exponent) @ vectors.T


def fit(data: Named, rows: torch.Tensor, known: torch.Tensor, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The two projections, by ridge regression of standardised features on the texts of each image.

    rows: the images to fit on; known: (N,) bool, the names that may be used.
    Returns the tensors under their names in the open_clip model.
    """
    text_map = whitening(data.texts[known], recipe.whitening)
    texts, classes = (F.normalize(t @ text_map, dim=-1) for t in (data.texts, data.classes))
    unknown = {name.lower() for name, k in zip(data.names, known.tolist()) if not k}
    usable = torch.tensor([name.lower() not in unknown for name in data.class_names])
    owned = data.owned[rows] * known
    from_names = owned / owned.sum(dim=1, keepdim=True) @ texts
    opinion = data.opinion[:, rows] * usable
    from_classifier = opinion / opinion.sum(dim=-1, keepdim=True) @ classes
    target = ((from_names + recipe.classifier * from_classifier) / (1 + recipe.classifier)).flatten(0, 1)
    x = data.views[:, rows].flatten(0, 1)
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-3
    x = (x - mean) / std
    gram = x.T @ x + recipe.ridge * len(x) * torch.eye(x.shape[1])
    matrix = torch.linalg.solve(gram.double(), (x.T @ (target - target.mean(dim=0))).double()).float() / std[:, None]
    return {
        "visual.head.proj.weight": matrix.T.contiguous(),
        "visual.head.proj.bias": -mean @ matrix,
        "text.proj.weight": text_map,
    }


def accuracy(data: Named, tensors: dict[str, torch.Tensor], rows: torch.Tensor, candidates: torch.Tensor) -> float:
    """Share of images, in per cent, whose most similar candidate name is one of theirs (squashed view)."""
    z = F.normalize(data.views[0, rows] @ tensors["visual.head.proj.weight"].T + tensors["visual.head.proj.bias"], dim=-1)
    texts = F.normalize(data.texts @ tensors["text.proj.weight"].T, dim=-1)
    best = candidates[(z @ texts[candidates].T).argmax(dim=1)]
    return float(100 * data.owned[rows, best].mean())


def held_out(data: Named, recipe: Recipe, folds: int = 4, seed: int = 0) -> dict[str, float]:
    """How a recipe does on images and names it never saw: means over folds of the names.

    In each fold a quarter of the names, and every image that has one of them, is left out, and a fifth of the
    other images too. Common names are those of at least 5 images.
    """
    generator = np.random.RandomState(seed)
    common = (data.owned.sum(dim=0) >= 5).numpy()
    fold = np.zeros(len(data.names), dtype=int)
    for group in (np.flatnonzero(common), np.flatnonzero(~common)):
        fold[generator.permutation(group)] = np.arange(len(group)) % folds
    spared = torch.from_numpy(generator.randint(0, 5, len(data.owned)) == 0)
    totals = np.zeros(3)
    for k in range(folds):
        left_out = torch.from_numpy(fold == k)
        touched = data.owned[:, left_out].sum(dim=1) > 0
        tensors = fit(data, torch.where(~touched & ~spared)[0], ~left_out, recipe)
        is_common = torch.from_numpy(common)
        common_images = data.owned[:, is_common].sum(dim=1) > 0
        new_common, new_rare = left_out & is_common, left_out & ~is_common
        totals += [
            accuracy(data, tensors, torch.where(spared & ~touched & common_images)[0], torch.where(is_common)[0]),
            accuracy(data, tensors, torch.where(data.owned[:, new_common].sum(dim=1) > 0)[0], torch.where(new_common)[0]),
            accuracy(data, tensors, torch.where(data.owned[:, new_rare].sum(dim=1) > 0)[0], torch.where(new_rare)[0]),
        ]
    seen, new_common, new_rare = (totals / folds).round(1).tolist()
    return {"names seen, new images": seen, "names never seen (common)": new_common, "names never seen (rare)": new_rare}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python scripts/train_standin.py", description=__doc__.split("\n")[0])
    parser.add_argument("--images", nargs=2, action="append", required=True, metavar=("FOLDER", "NAMES.json"), type=Path)
    parser.add_argument("--out", type=Path, help="where the projections are written (safetensors); nothing is written without it")
    parser.add_argument("--ridge", type=float, default=Recipe.ridge)
    parser.add_argument("--classifier", type=float, default=Recipe.classifier)
    parser.add_argument("--whitening", type=float, default=Recipe.whitening)
    parser.add_argument("--workers", type=int, default=2, help="processes for the features (default 2)")
    options = parser.parse_args(arguments)
    recipe = Recipe(options.ridge, options.classifier, options.whitening)
    data = read_named(options.images, options.workers)
    print(f"{len(data.owned)} images, {len(data.names)} names, {recipe}")
    for what, value in held_out(data, recipe).items():
        print(f"  {what}: {value:.1f} %")
    if options.out:
        tensors = fit(data, torch.arange(len(data.owned)), torch.ones(len(data.names), dtype=torch.bool), recipe)
        print(f"wrote {files.write_tensors(options.out, tensors)}")


if __name__ == "__main__":
    main()
