"""Deployment (Sec. 3.3): an image and a list of words -> a label map, without SAM or refinement."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from fmbseg.data import images, label_spaces
from fmbseg.data.images import IGNORED, resampling
from fmbseg.data.label_spaces import WORDS_ALONE, Background, LabelSpace
from fmbseg.errors import ParameterError
from fmbseg.models.clip import Guide, ImageText
from fmbseg.models.encoders import Encoder
from fmbseg.models.texts import ClassTexts, class_texts
from fmbseg.params import DensePath, SegmentParams, UnlabelledParams
from fmbseg.stage1 import detection, features
from fmbseg.stage1.windows import Window, placing, side_by_side, windows
from fmbseg.stage2.alignment import Alignment


class Embedder(Protocol):
    """Anything that gives patches in the space of the texts: the aligned encoder or CLIP itself."""

    key: str

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, height, width, 3) ``uint8`` -> (B, D, h, w), unit norm."""


class AlignedEncoder:
    """The frozen encoder and the trained module M: z = M(x)."""

    def __init__(self, encoder: Encoder, alignment: Alignment, key: str, device: str = "cpu"):
        self.encoder, self.alignment, self.key, self.device = encoder, alignment.to(device).eval(), key, device

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The frozen part: (B, height, width, 3) ``uint8`` -> (B, width, h, w)."""
        return self.encoder.encode(_to_multiple(pixels, self.encoder.patch).to(self.device))

    @torch.inference_mode()
    def align(self, patches: torch.Tensor) -> torch.Tensor:
        """The trained part: (B, width, h, w) -> (B, D, h, w), unit norm."""
        return self.alignment(patches.to(self.device))

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.align(self.encode(pixels))


class DenseClip:
    """CLIP's own dense features, the zero-shot baseline in the style of MaskCLIP.

    enlarge: factor by which a window is enlarged first, for a tower of large stride (ours); guide: the encoder of the path
    "guided".
    """

    def __init__(
        self, clip: ImageText, path: DensePath = "value", enlarge: float = 1.0, residual: bool = False, guide: Encoder | None = None
    ):
        self.clip, self.path, self.enlarge, self.residual, self.guide = clip, path, enlarge, residual, guide
        self.key = f"{clip.key} {path}{' residual' if residual else ''} x{enlarge:g}{f' by {guide.key}' if guide else ''}"

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.clip.blocks is not None:  # a transformer's position embedding fits one size only
            size = (self.clip.image_size, self.clip.image_size)
            pixels = torch.stack([torch.from_numpy(images.resize(p.numpy(), size)) for p in pixels])
        else:
            pixels = _to_multiple(pixels, self.clip.stride, self.enlarge)
        guide = None
        if self.guide:  # on the tower's own grid
            size = tuple(side // self.clip.stride * self.guide.patch for side in pixels.shape[1:3])
            scaled = torch.stack([torch.from_numpy(images.resize(p.numpy(), size)) for p in pixels])
            guide = Guide(self.guide.encode(scaled.to(self.clip.device)))
        return F.normalize(self.clip.encode_crops(pixels, self.path, self.residual, guide).maps, dim=1)


def _to_multiple(pixels: torch.Tensor, multiple: int, scale: float = 1.0) -> torch.Tensor:
    """Windows scaled so that both sides are multiples of a patch; unchanged where they are already."""
    size = tuple(max(multiple, round(side * scale / multiple) * multiple) for side in pixels.shape[1:3])
    return torch.stack([torch.from_numpy(images.resize(p.numpy(), size)) for p in pixels])


@dataclass(frozen=True)
class EmbeddedImage:
    """Patch embeddings of every window of an image: the expensive part of segmentation, which any words can follow.

    size: the image's (height, width); scaled: (height, width) of the scaled image, in which the windows lie; maps: (D, h, w)
    of each window.
    """

    size: tuple[int, int]
    scaled: tuple[int, int]
    windows: tuple[Window, ...]
    maps: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Placed:
    """Similarities before interpolation: ``down @ patches @ across.T`` are those at every pixel.

    patches: (K, rows, columns) cosine similarities at the patches of all windows, side by side. down: (height, rows), and
    across: (width, columns), both on the CPU, interpolate each window and average overlaps. owner: the class of each of the K
    where they are not classes but words; None: k is class k.
    """

    patches: torch.Tensor
    down: torch.Tensor
    across: torch.Tensor
    owner: torch.Tensor | None = None

    @classmethod
    def whole(
        cls, similarity: torch.Tensor, size: tuple[int, int], interpolation: str = "bilinear", owner: torch.Tensor | None = None
    ) -> Placed:
        """(K, h, w) similarities of a whole image, interpolated to its (height, width) = ``size``."""
        return cls(similarity, *(resampling(n, m, interpolation) for n, m in zip(size, similarity.shape[1:])), owner)

    def at(self, size: tuple[int, int], interpolation: str) -> Placed:
        """The same, interpolated once more: to (height, width) = ``size``."""
        height, width = (resampling(n, len(m), interpolation) for n, m in zip(size, (self.down, self.across)))
        return dataclasses.replace(self, down=height @ self.down, across=width @ self.across)

    def interpolated(self) -> torch.Tensor:
        """(K, height, width) similarities, on the CPU."""
        return (self.down.to(self.patches.device) @ self.patches @ self.across.T.to(self.patches.device)).cpu()


@dataclass(frozen=True)
class Compared:
    """An image compared with words: its (height, width), similarities of the classes, and those of all words where they decide
    (``word_maximum`` "after"; else the same)."""

    size: tuple[int, int]
    placed: Placed
    words: Placed

    @classmethod
    def mean(cls, several: Sequence[Compared]) -> Compared:
        """The mean similarities of images of one size."""

        def one(parts: Sequence[Placed]) -> Placed:
            return dataclasses.replace(parts[0], patches=torch.stack([part.patches for part in parts]).mean(dim=0))

        return cls(several[0].size, one([each.placed for each in several]), one([each.words for each in several]))


@dataclass(frozen=True)
class Confidence:
    """(height, width) ``float32`` each: a pixel's similarity to its class, and its margin, that similarity minus the similarity to
    the most similar other class. The margin is negative where a mask's vote decided against it; with one class it is the similarity.
    """

    similarity: np.ndarray
    margin: np.ndarray

    @property
    def levels(self) -> np.ndarray:
        """(height, width) ``uint8``: the margin in thousandths of cosine, 255 from 0.255 on, 0 where unlabelled or below 0."""
        return (self.margin * 1000).round().clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Segmentation:
    """A segmented image.

    labels: (height, width) ``int16`` class indices, IGNORED where unlabelled; space: the classes; placed: the similarities to
    all of them, whose argmax at the image's size ``labels`` is; measure: returns the confidence.
    """

    labels: np.ndarray
    space: LabelSpace
    placed: Placed
    measure: Callable[[], Confidence]

    @property
    def confidence(self) -> Confidence:
        """Confidence at every pixel of the image, computed when first asked for."""
        return self.measure()

    def unlabelled(self, least_similarity: float | None, least_margin: float | None) -> Segmentation:
        """The same with IGNORED where the similarity or the margin is lower; None: no threshold."""
        labels = self.labels.copy()
        if least_similarity is not None:
            labels[self.confidence.similarity < least_similarity] = IGNORED
        if least_margin is not None:
            labels[self.confidence.margin < least_margin] = IGNORED
        return dataclasses.replace(self, labels=labels)

    @functools.cached_property
    def similarity(self) -> torch.Tensor:
        """(K, h, w) cosine similarities at the scaled size, computed when first asked for."""
        return self.placed.interpolated()


class Segmenter:
    """Load once, ``segment(image, classes)`` as often as you like.

    embedder: gives patches in the text's space; clip: the image-text model whose texts they are compared with.
    """

    def __init__(
        self, embedder: Embedder, clip: ImageText, params: SegmentParams | None = None, templates: str = "one", average: str = "unit"
    ):
        self.embedder, self.clip, self.params = embedder, clip, params or SegmentParams()
        self.templates, self.average = templates, average
        self._texts: dict[tuple, ClassTexts] = {}

    def texts(self, space: LabelSpace) -> ClassTexts:
        """Text features of a label space, encoded once."""
        key = (space.names, space.prompts)
        if key not in self._texts:
            self._texts[key] = class_texts(self.clip, space, self.templates, self.average)
        return self._texts[key]

    def embed(self, image: np.ndarray) -> EmbeddedImage:
        """Patch embeddings of a (height, width, 3) RGB ``uint8`` image, in sliding windows."""
        return self.through_windows(image, self.embedder.embed)

    @torch.inference_mode()
    def through_windows(self, image: np.ndarray, model: Callable[[torch.Tensor], torch.Tensor]) -> EmbeddedImage:
        """The maps that a model, (B, height, width, 3) ``uint8`` -> (B, D, h, w), gives for every window."""
        images.check_image(image)
        p = self.params
        scaled = images.resize(image, images.target_size(*image.shape[:2], p.segment_short_side, p.segment_long_limit), p.resize)
        height, width = scaled.shape[:2]
        places = windows(height, width, p.window, p.window_stride)
        maps = []
        pixels = [torch.from_numpy(scaled[w.top : w.top + w.height, w.left : w.left + w.width].copy()) for w in places]
        for start in range(0, len(pixels), p.window_batch):  # windows of one image are of one size
            maps += model(torch.stack(pixels[start : start + p.window_batch])).unbind()
        return EmbeddedImage(image.shape[:2], (height, width), tuple(places), tuple(maps))

    def aligned(self, patches: EmbeddedImage) -> EmbeddedImage:
        """The encoder's patches of every window (``embedder.encode``) through the trained module."""
        batches = (patches.maps[i : i + self.params.window_batch] for i in range(0, len(patches.maps), self.params.window_batch))
        return dataclasses.replace(patches, maps=tuple(one for batch in batches for one in self.embedder.align(torch.stack(batch))))

    def similarity(self, embedded: EmbeddedImage, texts: ClassTexts) -> torch.Tensor:
        """(K, height, width) similarities at the scaled size: interpolated in each window, averaged where windows overlap."""
        return self.place(embedded, texts).interpolated()

    def label(
        self, embedded: EmbeddedImage, texts: ClassTexts, rule: Background = WORDS_ALONE, masks: Sequence[np.ndarray] = ()
    ) -> np.ndarray:
        """The class of every pixel, (height, width) ``int16``: ``similarity`` interpolated to the image's size, then argmax.

        rule: how class 0 is found, where it is background; masks: regions that vote (``vote``).
        """
        return self.label_tensor(embedded, texts, rule, masks).cpu().numpy()

    def label_tensor(
        self, embedded: EmbeddedImage, texts: ClassTexts, rule: Background = WORDS_ALONE, masks: Sequence[np.ndarray] = ()
    ) -> torch.Tensor:
        """``label`` as a tensor, on the device of the patches unless masks vote."""
        return self._decide(self.place(embedded, texts, rule, self.params.word_maximum == "after"), embedded.size, rule, masks)

    def _decide(self, placed: Placed, size: tuple[int, int], rule: Background, masks: Sequence[np.ndarray]) -> torch.Tensor:
        placed = placed.at(size, self.params.interpolation)
        labels = best_class(placed, rule)
        return torch.from_numpy(vote(labels.cpu().numpy(), placed, masks, rule)) if len(masks) else labels

    @torch.inference_mode()
    def place(self, embedded: EmbeddedImage, texts: ClassTexts, rule: Background = WORDS_ALONE, apart: bool = False) -> Placed:
        """Similarities at the patches of all windows, and the two matrices that place them in the scaled image.

        rule: how class 0 is found; apart: of every word by itself, else of the best word of each class.
        """
        z = side_by_side(embedded.windows, embedded.maps)
        texts = texts.to(z.device)
        rows, owner = texts.rows(z.flatten(1).T @ texts.features.T, rule.score, apart)
        patches = rows.T.reshape(-1, *z.shape[1:])
        (height, width), one, of_one = embedded.scaled, embedded.windows[0], embedded.maps[0].shape
        down = placing((w.top for w in embedded.windows), one.height, of_one[1], height, self.params.interpolation)
        across = placing((w.left for w in embedded.windows), one.width, of_one[2], width, self.params.interpolation)
        return Placed(patches, down, across, owner if apart else None)

    def segment(
        self,
        image: np.ndarray,
        classes: Words | LabelSpace,
        background: Sequence[str] | str | None = None,
        masks: Sequence[np.ndarray] = (),
    ) -> Segmentation:
        """Segment a (height, width, 3) RGB ``uint8`` image into any words.

        classes: words, one comma-separated string, {name: words}, a .txt file, or a label space (``words_space``); background:
        words that together are class 0, "background"; masks: regions that vote (``vote``). Raises ParameterError for an empty or
        repeated list. Pixels are unlabelled (IGNORED) only where parameters of ``UnlabelledParams`` make them so.
        """
        space = classes if isinstance(classes, LabelSpace) else words_space(classes, background)
        return self.decide(image, self.compare(image, space), space, masks)

    def compare(self, image: np.ndarray, space: LabelSpace) -> Compared:
        """The expensive part of ``segment``: the image's patches compared with the words of a label space."""
        embedded, texts = self.embed(image), self.texts(space)
        placed = self.place(embedded, texts, space.rule)
        words = self.place(embedded, texts, space.rule, True) if self.params.word_maximum == "after" else placed
        return Compared(embedded.size, placed, words)

    def decide(self, image: np.ndarray, compared: Compared, space: LabelSpace, masks: Sequence[np.ndarray] = ()) -> Segmentation:
        """The rest of ``segment``: the classes of the pixels, from the similarities of the patches."""
        p = self.params if isinstance(self.params, UnlabelledParams) else UnlabelledParams()
        labels = self._decide(compared.words, compared.size, space.rule, masks).cpu().numpy()
        placed = dataclasses.replace(compared.placed, patches=compared.placed.patches.cpu())
        measure = functools.cache(lambda: confidence(placed.at(compared.size, self.params.interpolation), labels))
        kept = np.isin(labels, self.detected(image, space, p)) if p.detected_only else True
        result = Segmentation(np.where(kept, labels, IGNORED).astype(labels.dtype), space, placed, measure)
        return result.unlabelled(p.least_similarity, p.least_margin)

    def detected(self, image: np.ndarray, space: LabelSpace, params: UnlabelledParams) -> list[int]:
        """Indices of the classes that crops vote for (Sec. 3.2, ``detection.detect``), and of the background, sorted."""
        found = detection.detect(features.extract(image, self.clip, params), self.texts(space), params)
        return sorted({one.index for one in found} | ({0} if space.background else set()))


def totals(labels: np.ndarray, confidence: Confidence, classes: int) -> np.ndarray:
    """(classes, 3): pixels, sum of similarities and sum of margins of each class of a label map; those of its parts add up."""
    given = labels.ravel().astype(np.intp) - IGNORED
    columns = (None, confidence.similarity.ravel(), confidence.margin.ravel())
    return np.stack([np.bincount(given, weights, classes - IGNORED)[-IGNORED:] for weights in columns], axis=1)


def describe(result: Segmentation) -> dict:
    """``describe_totals`` of a label map."""
    return describe_totals(totals(result.labels, result.confidence, len(result.space)), result.labels.shape, result.space)


def describe_totals(totals: np.ndarray, size: tuple[int, int], space: LabelSpace, images: int = 1) -> dict:
    """Size, unlabelled share, mean margin, and for each class that occurs its name, index, words, pixels, share, mean similarity and
    mean margin; means are over the labelled pixels, 0 where there is none.

    totals: (K, 3), as ``totals`` gives them; size: (height, width) of each of so many images, of which shares are.
    """
    pixels, everywhere = totals[:, 0], size[0] * size[1] * images
    labelled = pixels.sum()
    found = [
        {
            "name": space.names[k],
            "index": int(k),
            "words": list(space.prompts[k]),
            "pixels": int(pixels[k]),
            "share": round(float(pixels[k] / everywhere), 4),
            "mean_similarity": round(float(totals[k, 1] / pixels[k]), 4),
            "mean_margin": round(float(totals[k, 2] / pixels[k]), 4),
        }
        for k in np.flatnonzero(pixels)
    ]
    return {
        "height": size[0],
        "width": size[1],
        "unlabelled": round(float(1 - labelled / everywhere), 4),
        "mean_margin": round(float(totals[:, 2].sum() / labelled), 4) if found else 0.0,
        "classes": sorted(found, key=lambda c: -c["pixels"]),
    }


Words = Sequence[str] | str | Mapping[str, Sequence[str]]


def words_space(classes: Words, background: Sequence[str] | str | None = None) -> LabelSpace:
    """A label space of own words.

    classes: as ``own_words`` takes them, or the name of a .txt file or of a label space such as "lvis1203"; background: words
    that together are class 0. Raises ParameterError for an empty or repeated list.
    """
    if isinstance(classes, str) and (classes.endswith(".txt") or classes in label_spaces.SPACES):
        space = label_spaces.vocabulary(classes)
    else:
        space = label_spaces.own_words(classes, "classes")
    if background is None:
        return space
    others = label_spaces.own_words(background, "background")
    taken = {label_spaces.normal(word) for prompts in others.prompts for word in prompts}
    both = [
        name
        for name, words in zip(space.names, space.prompts)
        if label_spaces.is_background(name) or any(label_spaces.normal(word) in taken for word in words)
    ]
    if both:
        raise ParameterError(f"background: also among the classes: {', '.join(both)}; give every word once")
    colours = np.concatenate([np.zeros((1, 3), np.uint8), space.palette])
    prompts = (tuple(word for words in others.prompts for word in words), *space.prompts)
    return LabelSpace("words", ("background", *space.names), prompts, colours, True)


def label_map(
    similarity: torch.Tensor,
    size: tuple[int, int],
    interpolation: str = "bilinear",
    owner: torch.Tensor | None = None,
    rule: Background = WORDS_ALONE,
) -> np.ndarray:
    """Interpolate (K, h, w) similarities to ``size`` and take the best class: (height, width) ``int16``.

    owner: the class of each of the K, as in ``Placed``; rule: how class 0 is found.
    """
    return best_class(Placed.whole(similarity, size, interpolation, owner), rule).cpu().numpy()


TILE = 96
"""Side in pixels of the squares in which classes are compared. Small squares take little memory and few classes, but many calls."""

MANY = 256
"""With more classes than this, the squares have half that side, so that each has fewer classes to compare."""

ROUNDING = 1e-5
"""A class is left out of a square only where it is less similar than another by more than this: rounding changes less."""


@torch.inference_mode()
def best_class(placed: Placed, rule: Background = WORDS_ALONE) -> torch.Tensor:
    """The argmax over K of the similarities, (height, width) ``int16`` on the device of the patches; a tie goes to the first class.

    With a rule that has a threshold, class 0 where the best class's probability, 1 / sum_k exp(scale (s_k - max s)), is below it.

    The image is done a square at a time, so that no (K, height, width) tensor is held. The weights of bilinear interpolation
    and of averages are not negative. So a class that is less similar than one other class at all patches of a square wins no
    pixel of it and is not interpolated there. Bicubic interpolation leaves out no class.
    """
    down, across, device = placed.down, placed.across, placed.patches.device
    tile = TILE if len(placed.patches) <= MANY else TILE // 2
    some = not rule.threshold and bool((down >= 0).all() and (across >= 0).all())
    labels = torch.empty((len(down), len(across)), dtype=torch.int16, device=device)
    for top in range(0, len(down), tile):
        tall = down[top : top + tile]
        rows = tall.any(dim=0)
        tall, strip = tall[:, rows].to(device), placed.patches[:, rows]
        for left in range(0, len(across), tile):
            wide = across[left : left + tile]
            columns = wide.any(dim=0)
            wide, patches = wide[:, columns].to(device), strip[:, :, columns]
            classes = candidates(patches) if some else torch.arange(len(patches), device=device)
            similar = tall @ patches[classes] @ wide.T
            best = similar.max(dim=0)
            found = classes[best.indices] if placed.owner is None else placed.owner[classes[best.indices]]
            if rule.threshold:
                found[(rule.scale * (similar - best.values)).exp().sum(dim=0) * rule.threshold > 1] = 0
            labels[top : top + tile, left : left + tile] = found
    return labels


@torch.inference_mode()
def confidence(placed: Placed, labels: np.ndarray) -> Confidence:
    """Similarity and margin of the labels, a square at a time as in ``best_class``; both are 0 where unlabelled."""
    similarity, margin = (torch.zeros(labels.shape) for _ in range(2))
    given = torch.from_numpy(labels.astype(np.int64))
    for top in range(0, len(given), TILE):
        strip = placed.down[top : top + TILE] @ placed.patches
        for left in range(0, given.shape[1], TILE):
            here = np.s_[top : top + TILE, left : left + TILE]
            every = strip @ placed.across[left : left + TILE].T
            index = given[here].clamp(min=0)[None]
            own = every.gather(0, index)[0]
            other = every.scatter(0, index, -torch.inf).amax(dim=0) if len(every) > 1 else torch.zeros_like(own)
            similarity[here], margin[here] = own, own - other
    none = given == IGNORED
    return Confidence(similarity.masked_fill(none, 0).numpy(), margin.masked_fill(none, 0).numpy())


@torch.inference_mode()
def vote(labels: np.ndarray, placed: Placed, masks: Sequence[np.ndarray], rule: Background = WORDS_ALONE) -> np.ndarray:
    """Label map in which each mask has one class, that of the highest mean similarity; small masks lie over large ones (ours).

    For a mask M of |M| pixels and similarities S_k = D P_k A' (``Placed``):

        class(M) = argmax_k  mean_{x in M} S_k(x) = argmax_k  <D' M A, P_k> / |M|

    labels: (height, width), kept outside all masks; masks: (height, width) bool each; rule: its threshold is that of
    ``best_class``.
    """
    labels = labels.copy()
    for mask in sorted((mask for mask in masks if mask.any()), key=lambda mask: -int(mask.sum())):
        weights = placed.down.T @ torch.from_numpy(mask).float() @ placed.across
        means = placed.patches.flatten(1) @ weights.flatten().to(placed.patches.device) / int(mask.sum())
        best = int(means.argmax())
        under = rule.threshold and (rule.scale * (means - means[best])).exp().sum() * rule.threshold > 1
        labels[mask] = 0 if under else best if placed.owner is None else int(placed.owner[best])
    return labels


def candidates(patches: torch.Tensor) -> torch.Tensor:
    """Sorted indices of the classes that at some patch are as similar as the class of the highest mean. patches: (K, h, w)."""
    flat = patches.flatten(1)
    leader = flat[flat.mean(dim=1).argmax()]
    return (flat >= leader - ROUNDING).any(dim=1).nonzero()[:, 0]
