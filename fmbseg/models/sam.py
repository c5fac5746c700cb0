"""SAM by name: masks for points, and automatic masks of a whole image (Sec. 3.2)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.utils import amg
from timm.models import tiny_vit
from torch import nn
from torchvision.ops import nms

from fmbseg import files
from fmbseg.data import fetch
from fmbseg.errors import ParameterError
from fmbseg.models import sam_decoder
from fmbseg.models.precision import Precision, autocast, lower, precision_key
from fmbseg.params import check_device

_REGISTRY = {"sam_vith": "vit_h", "sam_vitl": "vit_l", "sam_vitb": "vit_b"}
SAM_NAMES = ("mobile_sam", "tiny_sam", *_REGISTRY)
SCALED_PIXELS = 2**25
"""Pixels of masks that are scaled to an image's size together: a bound on memory."""
ROUGHLY = 0.1
"""The stability score of a mask at SAM's own size differs from that at the image's size by at most this (ours; seen: 0.083 in 823 masks)."""


@dataclass(frozen=True)
class AutomaticMask:
    """One of SAM's automatic masks.

    mask: (height, width) bool; predicted_iou, stability: in [0, 1]; point: its prompt, (x, y) in pixels.
    """

    mask: np.ndarray
    predicted_iou: float
    stability: float
    point: tuple[float, float]

    @property
    def area(self) -> int:
        return int(self.mask.sum())


class TinyVitEncoder(nn.Module):
    """MobileSAM's image encoder: timm's TinyViT with its last stage at stride 16, and SAM's neck.

    (B, 3, 1024, 1024) -> (B, 256, 64, 64). For features any sides that are multiples of 16 will do.
    """

    img_size = 1024
    out_channels = 256

    def __init__(self) -> None:
        super().__init__()
        self.trunk = timm.create_model("tiny_vit_5m_224", pretrained=False, num_classes=0, drop_path_rate=0.0)
        self.trunk.head = nn.Identity()
        self.trunk.stages[3].downsample.conv2.conv.stride = (1, 1)
        self.neck = nn.Sequential(
            nn.Conv2d(320, 256, kernel_size=1, bias=False),
            LayerNorm2d(256),
            nn.Conv2d(256, 256, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(256),
        )

    def quicken(self) -> None:
        """Make inference faster, with the same values but for rounding: norms are folded into the convolutions before them,
        and attention's bias gets four dimensions, for which torch has fused attention on a CPU."""
        _fold(self.trunk)
        for module in self.trunk.modules():
            if isinstance(module, tiny_vit.Attention):
                biases = module.get_attention_biases
                module.get_attention_biases = lambda device, biases=biases: biases(device)[None]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.neck(self.trunk.forward_features(images))


def _fold(module: nn.Module) -> None:
    """Replace each of timm's pairs of convolution and batch norm by one convolution."""
    for name, child in module.named_children():
        setattr(module, name, child.fuse()) if isinstance(child, tiny_vit.ConvNorm) else _fold(child)


def build_mobile_sam() -> Sam:
    """MobileSAM's architecture, randomly initialised: TinyViT under SAM's own prompt encoder and mask decoder."""
    return _assemble(TinyVitEncoder(), width=256, side=1024)


def build_tiny_sam() -> Sam:
    """A SAM for smoke tests, without trained weights: one convolution under a narrow decoder, for images of 128 pixels."""
    encoder = nn.Conv2d(3, 32, kernel_size=16, stride=16)
    encoder.img_size = 128
    return _assemble(encoder, width=32, side=128)


def _assemble(encoder: nn.Module, width: int, side: int) -> Sam:
    grid = (side // 16, side // 16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=8 * width, num_heads=8)
    return Sam(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(embed_dim=width, image_embedding_size=grid, input_image_size=(side, side), mask_in_chans=16),
        mask_decoder=MaskDecoder(num_multimask_outputs=3, transformer=transformer, transformer_dim=width, iou_head_hidden_dim=256),
    )


class SamSegmenter:
    """Set an image once, then ask for masks as often as you like.

    model: a ``segment_anything`` Sam; key: what its results depend on (name and hash of its weights).
    """

    def __init__(self, model: Sam, key: str, device: str = "cpu", precision: Precision = "fp32"):
        if isinstance(model.image_encoder, TinyVitEncoder):
            model.image_encoder.quicken()
        self.model = model.to(device, memory_format=torch.channels_last).eval()
        self.key, self._precision = precision_key(key, precision), precision
        lower(model.image_encoder, device, precision)
        self._predictor, self._image = SamPredictor(self.model), None

    def set_image(self, image: np.ndarray, embedding: torch.Tensor | None = None) -> None:
        """image: (height, width, 3) RGB ``uint8``. The encoder runs only for an image it has not just seen.

        embedding: ``embedding`` of the same image from an earlier call, in place of a pass through the encoder.
        """
        if self._image is not None and np.array_equal(image, self._image):
            return
        predictor, self._image = self._predictor, None
        if embedding is not None:
            predictor.original_size = image.shape[:2]
            predictor.input_size = predictor.transform.get_preprocess_shape(*image.shape[:2], self.model.image_encoder.img_size)
        else:
            predictor.set_image(image)
            embedding = predictor.features.half()
        # rounded to fp16 whether just made or read from disk, so that a rerun gives the same masks (ours)
        predictor.features = embedding.to(predictor.device).float()
        self._image = image

    @property
    def embedding(self) -> torch.Tensor:
        """The set image's embedding, (1, 256, 64, 64) fp16."""
        return self._predictor.features.half()

    @functools.cached_property
    def _place(self) -> torch.Tensor:
        """(1, N, C), the encoding of the embedding's N positions."""
        return self.model.prompt_encoder.get_dense_pe().flatten(2).mT.contiguous()

    def _decode(self, points: np.ndarray, predicted_iou: float = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masks of B prompts of n joint points each, (B, n, 2), whose predicted IoU is over the threshold (0: three a prompt).

        Returns their logits on the part of SAM's square that the image fills, their predicted IoU and the number of the prompt.
        """
        predictor, model = self._predictor, self.model
        placed = torch.as_tensor(predictor.transform.apply_coords(points, predictor.original_size), device=predictor.device)
        labels = torch.ones(placed.shape[:2], dtype=torch.int, device=placed.device)
        prompts, dense = model.prompt_encoder(points=(placed, labels), boxes=None, masks=None)
        image = (predictor.features + dense[:1]).flatten(2).mT.contiguous()
        rows, columns = model.prompt_encoder.image_embedding_size
        cell = model.image_encoder.img_size // rows
        rows = min(rows, -(-predictor.input_size[0] // cell) + 1)  # the rest is padding, and in no mask
        with autocast(str(predictor.device), self._precision):
            return sam_decoder.decode(model.mask_decoder, image, self._place, prompts, (rows, columns), predicted_iou)

    def _scaled(self, logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Logits of ``_decode``, scaled to (M, height, width) by the package's two interpolations."""
        height, width = self._predictor.input_size
        square = F.interpolate(logits[None], scale_factor=4, mode="bilinear", align_corners=False)[..., :height, :width]
        return F.interpolate(square, size, mode="bilinear", align_corners=False)[0]

    @torch.inference_mode()
    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Three masks for one joint prompt of foreground points.

        points: (n, 2) as (x, y) in pixels of the set image.
        Returns masks (3, height, width) bool and SAM's own confidence (3,), its predicted IoU.
        """
        logits, scores, _ = self._decode(np.asarray(points, dtype=np.float32)[None])
        return (self._scaled(logits, self._predictor.original_size) > self.model.mask_threshold).cpu().numpy(), scores.cpu().numpy()

    @torch.inference_mode()
    def automatic_masks(
        self,
        image: np.ndarray,
        points_per_side: int,
        points_per_batch: int,
        predicted_iou: float,
        stability: float,
        box_nms: float,
        long_side: int | None = None,
    ) -> list[AutomaticMask]:
        """Masks from a grid of points: those of the segment-anything package's generator, but for rounding.

        image: (height, width, 3) RGB ``uint8``; the thresholds are the generator's own. To save time and memory, masks of too
        low a predicted IoU are not drawn, masks far under the stability threshold are not scaled, the others are scaled
        ``SCALED_PIXELS`` at a time and kept as bits. long_side: masks of a longer image are drawn and compared at this long
        side, and those that are kept are enlarged (ours; None: never).
        """
        self.set_image(image)
        level, scale = self.model.mask_threshold, min(1, (long_side or np.inf) / max(image.shape[:2]))
        size = tuple(max(1, round(side * scale)) for side in image.shape[:2])
        points = amg.build_point_grid(points_per_side) * np.array(image.shape[1::-1])
        packed, boxes, ious, scores, origins = [], [], [], [], []
        for start in range(0, len(points), points_per_batch):
            logits, iou, origin = self._decode(points[start : start + points_per_batch, None], predicted_iou)
            height, width = (-(-side // 4) for side in self._predictor.input_size)
            rough = amg.calculate_stability_score(logits[:, :height, :width], level, 1.0)
            for some in (~(rough < stability - ROUGHLY)).nonzero()[:, 0].split(max(1, SCALED_PIXELS // (size[0] * size[1]))):
                if not len(some):
                    continue
                drawn = self._scaled(logits[some], size)
                score = amg.calculate_stability_score(drawn, level, 1.0)
                stable = score >= stability if stability > 0 else torch.ones_like(score, dtype=torch.bool)
                masks = drawn[stable] > level
                packed.extend(np.packbits(masks.flatten(1).cpu().numpy(), axis=1))
                boxes.append(amg.batched_mask_to_box(masks).float())
                for kept, part in ((ious, iou[some]), (scores, score), (origins, origin[some] + start)):
                    kept.append(part[stable])
        if not packed:
            return []
        iou, score, origin = (torch.cat(parts).tolist() for parts in (ious, scores, origins))
        kept = []
        for i in nms(torch.cat(boxes), torch.cat(ious), box_nms).tolist():
            mask = np.unpackbits(packed[i], count=size[0] * size[1]).view(bool).reshape(size)
            if size != image.shape[:2]:
                mask = np.array(Image.fromarray(mask).resize(image.shape[1::-1], Image.Resampling.NEAREST))
            kept.append(AutomaticMask(mask, iou[i], score[i], tuple(points[origin[i]].tolist())))
        return kept


def _build(name: str) -> Sam:
    builders = {"mobile_sam": build_mobile_sam, "tiny_sam": build_tiny_sam}
    return builders[name]() if name in builders else sam_model_registry[_REGISTRY[name]]()


def read_sam(name: str) -> Sam:
    """The package's network with its weights. Raises WeightsError where they are not here."""
    folder, model = fetch.require(name), _build(name)
    model.load_state_dict(files.read_tensors(folder / "model.safetensors")[0])
    return model


def weights_key(name: str) -> str:
    """A SAM's name with a hash of its weights, without loading it; the name alone where they are random or not here."""
    here = name in SAM_NAMES and fetch.is_here(fetch.find(name))
    return f"{name}@{fetch.key(name)}" if here else name


def load_sam(name: str, device: str = "cpu", precision: Precision = "fp32") -> SamSegmenter:
    """SAM by name: ``mobile_sam``, ``sam_vitb``, ``sam_vitl``, ``sam_vith``.

    ``random:NAME`` gives the architecture with random weights (tests).
    Raises ParameterError for an unknown name or device, WeightsError where weights are not here.
    """
    check_device(device)
    base = name.removeprefix("random:")
    if base not in SAM_NAMES:
        raise ParameterError(f"sam = {name!r}: no such SAM; known are {', '.join(SAM_NAMES)}")
    if base != name:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return SamSegmenter(_build(base), name, device, precision)
    return SamSegmenter(read_sam(base), weights_key(name), device, precision)
