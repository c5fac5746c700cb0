"""The explorer's computing: the expensive part once an image, then words, points and thresholds at once.

It has no widgets (``explorer.py`` has them), so it works and is tested without a browser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from fmbseg.data import images
from fmbseg.data.images import IGNORED, resize_map
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.errors import DataError, ParameterError
from fmbseg.models.clip import ImageText
from fmbseg.models.sam import AutomaticMask
from fmbseg.models.texts import ClassTexts, class_texts
from fmbseg.runs import cache, modules
from fmbseg.runs.cache import Models
from fmbseg.runs.modules import Segmenter
from fmbseg.schemas import ExploreRun
from fmbseg.stage1 import detection, features, label_masks, pseudo_labels, query_sam
from fmbseg.stage1.detection import Detected, Scale
from fmbseg.stage1.features import ImageFeatures
from fmbseg.stage1.label_masks import LabelledMask
from fmbseg.stage1.query_sam import QueryMask
from fmbseg.stage2.segmenter import EmbeddedImage, label_map

CLIP, ALIGNED = "CLIP dense", "aligned encoder"


class WordCache:
    """Text features of words. Each word goes through the text tower once."""

    def __init__(self, clip: ImageText, templates: str, average: str = "unit"):
        self.clip, self.templates, self.average = clip, templates, average
        self._features: dict[str, torch.Tensor] = {}

    def texts(self, space: LabelSpace) -> ClassTexts:
        """Text features of a label space; only new words are encoded."""
        words = [word for prompts in space.prompts for word in prompts]
        new = tuple(word for word in dict.fromkeys(words) if word not in self._features)
        if new:
            unseen = LabelSpace("new words", new, tuple((word,) for word in new), np.zeros((len(new), 3), np.uint8))
            self._features |= zip(new, class_texts(self.clip, unseen, self.templates, self.average).features)
        owner = [k for k, prompts in enumerate(space.prompts) for _ in prompts]
        return ClassTexts(torch.stack([self._features[word] for word in words]), torch.tensor(owner), space.names)


@dataclass(frozen=True)
class Seen:
    """The expensive part of an image at one resolution: CLIP's features and, with a trained module, the aligned ones."""

    features: ImageFeatures
    embedded: EmbeddedImage | None


class Explorer:
    """One image at a time: ``set_image`` once, then ask as often as you like.

    params: the notebook's; the module is the profile's. Where the module is missing or damaged, ``missing`` says so in one
    sentence, and there are only CLIP's maps.
    """

    def __init__(self, params: ExploreRun):
        self.params, self.missing = params, ""
        cache.prepare_votes(params)
        self.models = Models.of(params)
        self.clip = self.models.clip
        self.segmenter: Segmenter | None = None
        module = modules.default(params.profile)
        if module.is_file():
            try:
                self.segmenter = Segmenter.load(module, params.device, params)
            except DataError as error:
                self.missing = str(error)
        else:
            self.missing = f"there is no trained module yet; run notebook 04, or: fmbseg train --profile {params.profile}"
        self._words = {
            clip: WordCache(clip, params.templates, params.text_average) for clip in (self.clip, getattr(self.segmenter, "clip", self.clip))
        }
        self.image: np.ndarray | None = None
        self.scale = 1.0

    def set_image(self, image: np.ndarray) -> None:
        """Take a (height, width, 3) RGB ``uint8`` image, scaled down to ``max_side``; results of the last image are dropped."""
        images.check_image(image)
        limit = min(self.params.max_side / max(image.shape[:2]), 1)
        self.image = images.resize(image, tuple(max(round(side * limit), 1) for side in image.shape[:2]))
        self._seen: dict[float, Seen] = {}
        self._queries: dict[tuple, QueryMask] = {}
        self._last: dict[str, tuple] = {}
        self._masks: list[AutomaticMask] | None = None

    @property
    def is_seen(self) -> bool:
        """Whether ``seen`` answers at once."""
        return self.image is not None and self.scale in self._seen

    def seen(self) -> Seen:
        """The features of the image at the present resolution: seconds the first time, then at once.

        ``scale`` multiplies the profile's short side. Raises ParameterError without an image.
        """
        if self.image is None:
            raise ParameterError("no image yet; choose or upload one")
        if self.scale not in self._seen:
            p = self.params.model_copy(
                update={name: max(round(getattr(self.params, name) * self.scale), 32) for name in ("short_side", "segment_short_side")}
            )
            embedded = None
            if self.segmenter is not None:
                embedded = Segmenter(self.segmenter.embedder, self.segmenter.clip, p).embed(self.image)
            self._seen[self.scale] = Seen(features.extract(self.image, self.clip, p), embedded)
        return self._seen[self.scale]

    def texts(self, space: LabelSpace, clip: ImageText | None = None) -> ClassTexts:
        """Text features of a label space, by the image-text model of Stage 1 unless another is given."""
        return self._words[clip or self.clip].texts(space)

    def similarity(self, space: LabelSpace) -> dict[str, torch.Tensor]:
        """Cosine similarities to every class, (K, h, w), by CLIP and, with a trained module, by the aligned encoder."""
        return self._kept("similarity", (self.scale, space.names, space.prompts), lambda: self._similarity(space))

    def _kept(self, what: str, key: tuple, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The last result where the key is the same, as when a slider moves; else a new one."""
        self.seen()  # raises without an image
        if self._last.get(what, (None,))[0] != key:
            self._last[what] = (key, make())
        return self._last[what][1]

    def _similarity(self, space: LabelSpace) -> dict[str, torch.Tensor]:
        seen = self.seen()
        maps = {CLIP: query_sam.class_similarity(seen.features, self.texts(space))}
        if seen.embedded is not None:
            maps[ALIGNED] = self.segmenter.similarity(seen.embedded, self.texts(space, self.segmenter.clip))
        return maps

    def similar_to(self, x: float, y: float) -> dict[str, torch.Tensor]:
        """Cosine similarities to the patch at a point, (1, h, w) as in ``similarity``. x, y: in [0, 1] from the top left."""
        return self._kept("similar_to", (self.scale, x, y), lambda: self._similar_to(x, y))

    def _similar_to(self, x: float, y: float) -> dict[str, torch.Tensor]:
        seen = self.seen()
        clip_map = seen.features.map
        row, column = (min(int(v * n), n - 1) for v, n in zip((y, x), clip_map.shape[1:]))
        maps = {CLIP: query_sam.class_similarity(seen.features, _as_text(clip_map[:, row, column]))}
        if seen.embedded is not None:
            maps[ALIGNED] = self.segmenter.similarity(seen.embedded, _as_text(patch_at(seen.embedded, x, y)))
        return maps

    def winners(self, space: LabelSpace) -> list[str]:
        """Name of the class that each crop votes for."""
        return [space.names[k] for k in detection.winners(self.seen().features, self.texts(space), self._scale(space))]

    def detected(self, space: LabelSpace) -> list[Detected]:
        """Classes with enough votes, most first."""
        return detection.detect(self.seen().features, self.texts(space), self.params, self._scale(space))

    def _scale(self, space: LabelSpace) -> Scale | None:
        return cache.vote_scale(self.texts(space), self.params)

    def query(self, space: LabelSpace, one: Detected, points: int) -> QueryMask:
        """Stage 1.1 for one detected class: its query points and SAM's three masks. SAM's encoder runs once an image."""
        key = (self.scale, space.prompts[one.index], points)
        if key not in self._queries:
            sam, params = self.models.sam, self.params.model_copy(update={"points": points})
            (self._queries[key],) = query_sam.query_masks(self.image, self.seen().features, [one], self.texts(space), sam, params)
        return self._queries[key]

    @property
    def is_outlined(self) -> bool:
        """Whether SAM has seen the image."""
        return bool(self._queries) or self.has_masks

    @property
    def has_masks(self) -> bool:
        """Whether ``masks`` answers at once."""
        return self._masks is not None

    def masks(self) -> list[AutomaticMask]:
        """SAM's automatic masks (Stage 1.2): the most expensive part, once an image."""
        if self._masks is None:
            self._masks = label_masks.automatic_masks(self.image, self.models.sam, self.params)
        return self._masks

    def labelled(self, space: LabelSpace) -> list[LabelledMask]:
        """The automatic masks, each with the detected class nearest to it (``min_margin`` as in the parameters)."""
        found, texts, scale = self.detected(space), self.texts(space), self._scale(space)
        least = pseudo_labels.least_margin(self.params, scale)
        labelled = label_masks.label_masks([m.mask for m in self.masks()], self.seen().features, found, texts, scale)
        return [one for one in labelled if least is None or one.margin > least]


def _as_text(feature: torch.Tensor) -> ClassTexts:
    """A patch's (D,) feature in the place of a word."""
    return ClassTexts(F.normalize(feature, dim=0)[None], torch.tensor([0]), ("point",))


def patch_at(embedded: EmbeddedImage, x: float, y: float) -> torch.Tensor:
    """(D,) mean embedding at a point of all windows that hold it. x, y: in [0, 1] from the top left."""
    row, column = (min(int(v * n), n - 1) for v, n in zip((y, x), embedded.scaled))
    found = []
    for window, z in zip(embedded.windows, embedded.maps):
        down, right = row - window.top, column - window.left
        if 0 <= down < window.height and 0 <= right < window.width:
            found.append(z[:, down * z.shape[1] // window.height, right * z.shape[2] // window.width])
    return torch.stack(found).mean(dim=0)


def limits(maps: torch.Tensor) -> tuple[float, float]:
    """(lowest, highest) similarity of (K, h, w) maps: the scale that thresholds and colours share."""
    return float(maps.min()), float(maps.max())


def segmentation(maps: torch.Tensor, size: tuple[int, int], threshold: float, margin: float = 0.0) -> np.ndarray:
    """(height, width) ``int16``: the best class of (K, h, w) similarities, IGNORED where it is under the threshold or the margin.

    threshold: in [0, 1] of the way from the lowest to the highest similarity; margin: how far above the next class the best one has to
    be, in cosine; 0, 0 labels every pixel.
    """
    labels = label_map(maps, size)
    low, high = limits(maps)
    best = second = torch.full(size, -torch.inf)
    for one in maps:
        similar = resize_map(one[None, None], size)[0, 0]
        best, second = torch.maximum(best, similar), torch.maximum(second, torch.minimum(best, similar))
    labels[((best < low + threshold * (high - low)) | (best - second < margin)).numpy()] = IGNORED
    return labels


def heat(
    image: np.ndarray, one: torch.Tensor, scale: tuple[float, float], threshold: float, opacity: float, table: np.ndarray
) -> np.ndarray:
    """A similarity map in colour over its image: (height, width, 3) ``uint8``; under the threshold only the image.

    one: (h, w), one class; scale: (lowest, highest) similarity; threshold, opacity: in [0, 1];
    table: (256, 3) ``uint8`` colours from low to high.
    """
    low, high = scale
    share = ((resize_map(one[None, None], image.shape[:2])[0, 0].numpy() - low) / max(high - low, 1e-6)).clip(0, 1)
    weight = np.where(share < threshold, 0, round(256 * opacity)).astype(np.int32)[..., None]
    colour = table[(share * 255).astype(np.uint8)]
    return ((image * (256 - weight) + colour * weight) >> 8).astype(np.uint8)


def paint_mask(image: np.ndarray, mask: np.ndarray, opacity: float) -> np.ndarray:
    """A (height, width) bool mask in orange over its image: (height, width, 3) ``uint8``."""
    shown = image.copy()
    shown[mask] = ((1 - opacity) * image[mask] + opacity * np.array([230, 159, 0])).astype(np.uint8)
    return shown


def vote_counts(winners: Sequence[str]) -> dict[str, int]:
    """How many crops voted for each class, most first."""
    return dict(sorted(((name, winners.count(name)) for name in set(winners)), key=lambda pair: (-pair[1], pair[0])))
