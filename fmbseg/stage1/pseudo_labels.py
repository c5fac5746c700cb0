"""Pseudo labels: both stages' masks as one label map, and the labels of an encoder's patches (Sec. 3.2, 3.3)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fmbseg import files
from fmbseg.data import images
from fmbseg.data.images import IGNORED
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.data.samples import Sample
from fmbseg.errors import DataError
from fmbseg.models.clip import weights_key
from fmbseg.models.sam import AutomaticMask
from fmbseg.models.texts import ClassTexts
from fmbseg.params import CombineParams, LabelParams
from fmbseg.runs import cache, parallel
from fmbseg.stage1 import label_masks
from fmbseg.stage1.detection import Detected
from fmbseg.stage1.features import ImageFeatures
from fmbseg.stage1.label_masks import LabelledMask
from fmbseg.stage1.query_sam import QueryMask


@dataclass(frozen=True)
class PseudoLabel:
    """Stage 1 of one image.

    labels: (height, width) ``uint8`` class indices, 255 where unlabelled; queries: Stage 1.1's answers;
    query_masks, automatic_masks: what each stage painted.
    """

    labels: np.ndarray
    queries: list[QueryMask]
    query_masks: list[LabelledMask]
    automatic_masks: list[LabelledMask]

    @property
    def detected(self) -> list[Detected]:
        return [q.detected for q in self.queries]


def paint(masks: list[LabelledMask], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Paint masks, large ones first and small ones last: (labels, similarity), (height, width) each; 255 where none."""
    labels = np.full(size, IGNORED, dtype=np.uint8)
    similarity = np.full(size, -np.inf, dtype=np.float32)
    for mask in sorted(masks, key=lambda m: -int(m.mask.sum())):
        labels[mask.mask] = mask.detected.index
        similarity[mask.mask] = mask.similarity
    return labels, similarity


def combine(query: list[LabelledMask], automatic: list[LabelledMask], size: tuple[int, int], params: CombineParams) -> np.ndarray:
    """One (height, width) ``uint8`` label map of both stages; a pixel of one stage only takes that stage's label.

    Where both label a pixel: "similarity" takes the class whose mask is more similar to it, "query" Stage 1.1's,
    "agree" labels it only if they agree (ours: the paper says that they complement each other, not how).
    """
    first, first_similarity = paint(query if params.stages != "1.2" else [], size)
    second, second_similarity = paint(automatic if params.stages != "1.1" else [], size)
    labels = np.where(first_similarity > second_similarity, first, second)
    both = (first != IGNORED) & (second != IGNORED)
    if params.overlap == "query":
        labels[both] = first[both]
    elif params.overlap == "agree":
        labels[both & (first != second)] = IGNORED
    return labels


def assemble(
    queries: list[QueryMask], automatic: list[AutomaticMask], features: ImageFeatures, texts: ClassTexts, params: CombineParams
) -> PseudoLabel:
    """Label the automatic masks among the detected classes and combine the stages."""
    query_masks = []
    for query in queries:
        query_masks += label_masks.label_masks([query.chosen], features, [query.detected], texts)
    labelled = label_masks.label_masks([a.mask for a in automatic], features, [q.detected for q in queries], texts)
    if params.drop_undetected:
        labelled = [mask for mask in labelled if mask.nearest]
    return PseudoLabel(combine(query_masks, labelled, features.size, params), queries, query_masks, labelled)


def label_picture(
    path: Path, space: LabelSpace, params: LabelParams, device: str = "cpu", given: tuple[int, ...] | None = None
) -> PseudoLabel:
    """Stage 1 of one image, from what is on disk, making what is not.

    space: the vocabulary, one class a word; given: image-level labels in place of detection.
    """
    queries = cache.queries(path, space, params, device, given)
    automatic = cache.automatic_masks(path, params, device) if params.stages != "1.1" else []
    texts = cache.texts_of(space, params, device)
    return assemble(queries, automatic, cache.clip_features(path, params, device), texts, params)


def content(params: LabelParams) -> dict[str, Any]:
    """All that pseudo labels depend on beside the image: parameters, CLIP's weights, and by their bytes the reference
    images and the file of image-level names."""
    names = files.image_sha256(params.image_level_names) if params.image_level_names else ""
    made = {"weights": weights_key(params.clip), "reference": cache.vote_content(params), "image_level_names": names}
    return params.content(LabelParams) | made


@functools.lru_cache(maxsize=4)
def _image_level_names(path: str, content: str) -> dict[str, list[str]]:
    names = files.read_json(path)
    if not isinstance(names, dict) or not all(isinstance(v, list) for v in names.values()):
        raise DataError(f'{path}: not a file of image-level names; give JSON such as {{"file stem": ["cat", "sofa"], ...}}')
    return names


def given_labels(sample: Sample, space: LabelSpace, params: LabelParams) -> tuple[int, ...] | None:
    """Classes that ``image_level_names`` gives an image (names outside the vocabulary left out); None where it is not set."""
    if not params.image_level_names:
        return None
    names = _image_level_names(params.image_level_names, files.image_sha256(params.image_level_names))
    if sample.image.stem not in names:
        raise DataError(f"{sample}: has no entry in {params.image_level_names}; add its names, or an empty list")
    classes = {word: k for k, words in enumerate(space.prompts) for word in (space.names[k], *words)}
    return tuple(sorted({classes[name] for name in names[sample.image.stem] if name in classes}))


class LabelStore:
    """A folder of pseudo labels: NAME.png (8-bit, 255 unlabelled) and NAME.json an image, and labels.json for all.

    labels.json holds the vocabulary and every parameter; a folder made with others is refused, never mixed. An image
    that failed has its reason in failed/NAME.json until it succeeds.
    """

    def __init__(self, folder: str | Path, space: LabelSpace, params: LabelParams):
        self.folder, self.failed, self.space = Path(folder), Path(folder) / "failed", space
        header = {"vocabulary": list(space.names), "prompts": [list(p) for p in space.prompts], "parameters": content(params)}
        self.key = files.digest(header)
        path = self.folder / "labels.json"
        if path.is_file() and files.read_json(path)["key"] != self.key:
            raise DataError(f"{folder}: holds pseudo labels made with other words or parameters; give another folder or delete this one")
        if not path.is_file():
            files.write_json(path, {"key": self.key, **header})

    def path(self, sample: Sample) -> Path:
        return self.folder / f"{sample.name}.png"

    def has(self, sample: Sample) -> bool:
        record = self.folder / f"{sample.name}.json"
        return self.path(sample).is_file() and record.is_file() and files.read_json(record)["sha256"] == files.image_sha256(sample.image)

    def write(self, sample: Sample, label: PseudoLabel) -> None:
        """Write the record after the map: an image with a record is whole."""
        write_label_map(self.path(sample), label.labels, self.space.palette)
        present = np.unique(label.labels[label.labels != IGNORED])
        files.write_json(
            self.folder / f"{sample.name}.json",
            {
                "image": str(sample.image),
                "sha256": files.image_sha256(sample.image),
                "detected": [{"name": d.name, "votes": d.votes} for d in label.detected],
                "classes": [self.space.names[k] for k in present],
                "coverage": float((label.labels != IGNORED).mean()),
            },
        )

    def fail(self, sample: Sample, reason: str) -> None:
        files.write_json(self.failed / f"{sample.name}.json", {"image": str(sample.image), "reason": reason})

    def succeed(self, sample: Sample) -> None:
        (self.failed / f"{sample.name}.json").unlink(missing_ok=True)

    def read(self, sample: Sample) -> np.ndarray:
        """(height, width) ``uint8`` class indices, 255 where unlabelled."""
        if not self.path(sample).is_file():
            raise DataError(f"{sample.name}: has no pseudo label in {self.folder}; run Stage 1 (notebook 03 or fmbseg label) first")
        return images.read_mask(self.path(sample))


def write_label_map(path: Path, labels: np.ndarray, palette: np.ndarray) -> None:
    """Write class indices as an 8-bit palette PNG that any viewer shows in colour; 255 is white."""
    picture = Image.fromarray(labels, mode="P")
    colours = np.full((256, 3), 255, dtype=np.uint8)
    colours[: len(palette)] = palette
    picture.putpalette(colours.tobytes())
    with files.atomic_path(path) as part:
        picture.save(part, format="PNG")


def label_one(sample: Sample, folder: Path, space: LabelSpace, params: LabelParams, device: str) -> None:
    """Pseudo labels of one image in a folder, where it has none yet. A failure is kept there and raised."""
    store = LabelStore(folder, space, params)
    try:
        if not store.has(sample):
            store.write(sample, label_picture(sample.image, space, params, device, given_labels(sample, space, params)))
    except parallel.EXPECTED as error:
        store.fail(sample, parallel.reason(error))
        raise
    store.succeed(sample)


def label_collection(
    samples: list[Sample], folder: str | Path, space: LabelSpace, params: LabelParams, device: str = "cpu", workers: int = 1
) -> tuple[LabelStore, list[parallel.Failure]]:
    """Pseudo labels of many images, resumable: what the folder holds is kept. A failed image is told and left out."""
    store = LabelStore(folder, space, params)
    work = partial(label_one, folder=Path(folder), space=space, params=params, device=device)
    return store, parallel.each(work, samples, "pseudo labels", workers).failures


def patch_labels(labels: np.ndarray, grid: tuple[int, int], min_labelled: float) -> torch.Tensor:
    """Label of every patch: (h, w) int64, the commonest label of its pixels; -1 where too few are labelled (Sec. 3.3).

    labels: (height, width) ``uint8``; grid: (h, w) patches that share the image evenly; min_labelled: the least
    labelled share (ours: half).
    """
    rows = (np.arange(labels.shape[0]) * grid[0]) // labels.shape[0]
    columns = (np.arange(labels.shape[1]) * grid[1]) // labels.shape[1]
    patch = rows[:, None] * grid[1] + columns[None, :]
    counts = np.bincount(patch.ravel() * 256 + labels.ravel(), minlength=grid[0] * grid[1] * 256).reshape(-1, 256)
    total, labelled = counts.sum(axis=1), counts[:, :IGNORED].sum(axis=1)
    keep = (labelled > 0) & (labelled >= min_labelled * total)
    return torch.from_numpy(np.where(keep, counts[:, :IGNORED].argmax(axis=1), -1).reshape(grid))
