"""SAM by name: the promptable segmenter that outlines things (Sec. 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import nn

from fmbseg import files
from fmbseg.data import fetch
from fmbseg.errors import ParameterError
from fmbseg.models import precision as lowered
from fmbseg.models.precision import Precision
from fmbseg.params import check_device

_REGISTRY = {"sam_vith": "vit_h", "sam_vitl": "vit_l", "sam_vitb": "vit_b"}
SAM_NAMES = ("mobile_sam", "tiny_sam", *_REGISTRY)


@dataclass(frozen=True)
class AutomaticMask:
    """One of SAM's automatic masks.

    mask: (height, width) bool; predicted_iou, stability: in [0, 1]; point: (x, y) in pixels that prompted it.
    """

    mask: np.ndarray
    predicted_iou: float
    stability: float
    point: tuple[float, float]

    @property
    def area(self) -> int:
        return int(self.mask.sum())


class TinyVitEncoder(nn.Module):
    """MobileSAM's image encoder: timm's TinyViT, its last stage kept at stride 16, and SAM's neck.

    (B, 3, 1024, 1024) -> (B, 256, 64, 64). Any side that is a multiple of 16 works for features.
    """

    img_size = 1024
    out_channels = 256

    def __init__(self) -> None:
        super().__init__()
        import timm

        self.trunk = timm.create_model("tiny_vit_5m_224", pretrained=False, num_classes=0, drop_path_rate=0.0)
        self.trunk.head = nn.Identity()
        self.trunk.stages[3].downsample.conv2.conv.stride = (1, 1)
        self.neck = nn.Sequential(
            nn.Conv2d(320, 256, kernel_size=1, bias=False),
            LayerNorm2d(256),
            nn.Conv2d(256, 256, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(256),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.neck(self.trunk.forward_features(images))


def build_mobile_sam() -> Sam:
    """MobileSAM's architecture, randomly initialised: TinyViT under SAM's own prompt encoder and mask decoder."""
    return _assemble(TinyVitEncoder(), width=256, side=1024)


def build_tiny_sam() -> Sam:
    """A SAM for smoke tests, which has no trained weights: one convolution under a narrow decoder, 128-px images."""
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


class _KeepingPredictor(SamPredictor):
    """A predictor that keeps its image: points and automatic masks share one pass through the encoder."""

    image: np.ndarray | None = None

    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        if self.image is None or not np.array_equal(image, self.image):
            super().set_image(image, image_format)

    def reset_image(self) -> None:
        if self.image is None:  # the mask generator resets after each image
            super().reset_image()


class SamSegmenter:
    """Set an image once, then ask for masks as often as you like.

    model: a ``segment_anything`` Sam; key: what its results depend on (name and hash of its weights).
    """

    def __init__(self, model: Sam, key: str, device: str = "cpu", precision: Precision = "fp32"):
        self.model, self.key = model.to(device).eval(), lowered.key(key, precision)
        for part in (model.image_encoder, model.mask_decoder):
            lowered.lower(part, device, precision)
        self._predictor = _KeepingPredictor(self.model)

    def set_image(self, image: np.ndarray, embedding: torch.Tensor | None = None) -> None:
        """image: (height, width, 3) RGB ``uint8``. The encoder runs only for an image it has not just seen.

        embedding: ``embedding`` of the same image from an earlier call, in place of a pass through the encoder.
        """
        predictor = self._predictor
        if predictor.image is not None and np.array_equal(image, predictor.image):
            return
        predictor.image = None
        if embedding is not None:
            predictor.reset_image()
            predictor.original_size = image.shape[:2]
            predictor.input_size = predictor.transform.get_preprocess_shape(*image.shape[:2], self.model.image_encoder.img_size)
            predictor.is_image_set = True
        else:
            predictor.set_image(image)
            embedding = predictor.features.half()
        # rounded to fp16, whether just made or kept: a rerun gives the same masks (ours)
        predictor.features = embedding.to(predictor.device).float()
        predictor.image = image

    @property
    def embedding(self) -> torch.Tensor:
        """The set image's embedding, (1, 256, 64, 64) fp16."""
        return self._predictor.features.half()

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Three masks for one joint prompt of foreground points.

        points: (n, 2) as (x, y) in pixels of the set image.
        Returns masks (3, height, width) bool and SAM's own confidence (3,), its predicted IoU.
        """
        masks, scores, _ = self._predictor.predict(
            point_coords=np.asarray(points, dtype=np.float32), point_labels=np.ones(len(points), dtype=np.int32)
        )
        return masks.astype(bool), scores

    def automatic_masks(
        self,
        image: np.ndarray,
        points_per_side: int,
        points_per_batch: int,
        predicted_iou: float,
        stability: float,
        box_nms: float,
    ) -> list[AutomaticMask]:
        """Masks from a grid of points, by the segment-anything package's generator.

        image: (height, width, 3) RGB ``uint8``; the thresholds are the generator's own.
        """
        generator = SamAutomaticMaskGenerator(
            self.model,
            points_per_side=points_per_side,
            points_per_batch=points_per_batch,
            pred_iou_thresh=predicted_iou,
            stability_score_thresh=stability,
            box_nms_thresh=box_nms,
        )
        self.set_image(image)
        generator.predictor = self._predictor
        return [
            AutomaticMask(r["segmentation"], float(r["predicted_iou"]), float(r["stability_score"]), tuple(r["point_coords"][0]))
            for r in generator.generate(self._predictor.image)
        ]


def _build(name: str) -> Sam:
    builders = {"mobile_sam": build_mobile_sam, "tiny_sam": build_tiny_sam}
    return builders[name]() if name in builders else sam_model_registry[_REGISTRY[name]]()


def weights_key(name: str) -> str:
    """A SAM's name with a hash of its weights, without loading it; the name alone where they are random or not here."""
    here = name in SAM_NAMES and fetch.is_here(fetch.find(name))
    return f"{name}@{fetch.key(name)}" if here else name


def load_sam(name: str, device: str = "cpu", precision: Precision = "fp32") -> SamSegmenter:
    """SAM by name: ``mobile_sam``, ``sam_vitb``, ``sam_vitl``, ``sam_vith``; kept for the next call.

    ``random:NAME`` gives the architecture with random weights (tests).
    Raises ParameterError for an unknown name or device, WeightsError, with the command that brings them, where weights are not here.
    """
    check_device(device)
    base = name.removeprefix("random:")
    if base not in SAM_NAMES:
        raise ParameterError(f"sam = {name!r}: no such SAM; known are {', '.join(SAM_NAMES)}")
    if base != name:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return SamSegmenter(_build(base), name, device, precision)
    folder = fetch.require(base)
    model = _build(base)
    model.load_state_dict(files.read_tensors(folder / "model.safetensors")[0])
    return SamSegmenter(model, weights_key(name), device, precision)
