"""Image-text models by name, all through open_clip: text features, class tokens and dense features (Sec. 3.1)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import nn

from fmbseg import files
from fmbseg.data import fetch
from fmbseg.data.images import normalise
from fmbseg.errors import DataError, ParameterError
from fmbseg.models import dense_paths
from fmbseg.models.dense_paths import LastBlock
from fmbseg.models.precision import Precision, autocast, precision_key
from fmbseg.params import DensePath, check_device

LIT = "lit-efficientnet-lite2-minilm"
"""The embedded profile's stand-in for CLIP. Trained with image-level names: see its model card."""

CLIP_NAMES = {LIT: "", "clip_vitl14": "ViT-L-14-quickgelu openai", "clip_vitb16": "ViT-B-16-quickgelu openai"}

TOKENS = 16
"""Texts for a Hugging Face tower are padded to a multiple of this many tokens, not to its full context."""


@dataclass(frozen=True)
class CropFeatures:
    """Features of a batch of crops by an image-text model.

    tokens: (B, D), the projected class token (towers without one: the pooled features);
    maps: (B, D, h, w), dense features in the space of the texts. Neither has unit norm.
    """

    tokens: torch.Tensor
    maps: torch.Tensor


@dataclass(frozen=True)
class Guide:
    """The guide of the path "guided", on the tower's own grid.

    patches: (B, width, h, w) of a frozen encoder; regions: (B, h, w) number of the mask at each position, from 1, and 0
    outside all masks; None: no masks.
    """

    patches: torch.Tensor
    regions: torch.Tensor | None = None


class ImageText:
    """A frozen open_clip model, which puts texts and crops into one space of D dimensions.

    model: an open_clip CLIP or CustomTextCLIP; key: what its results depend on (name and hash of its weights).
    Raises ParameterError for an image tower whose dense features would come out wrong here.
    """

    def __init__(self, model: nn.Module, tokenizer, key: str, device: str = "cpu", precision: Precision = "fp32"):
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer, self.device, self.precision = tokenizer, device, precision
        self.key = precision_key(key, precision)
        self.tower = model.visual
        preprocessing = open_clip.get_model_preprocess_cfg(model)
        self.mean, self.std = preprocessing["mean"], preprocessing["std"]
        self.blocks = self._blocks()
        self.image_size = int(self.tower.image_size[0])
        if device != "meta":  # which has no numbers
            self._probe()

    def _blocks(self) -> Sequence[nn.Module] | None:
        """The tower's transformer blocks; None for a tower without attention."""
        if isinstance(self.tower, VisionTransformer):
            return self.tower.transformer.resblocks
        trunk = getattr(self.tower, "trunk", None)
        if hasattr(trunk, "blocks") and hasattr(trunk.blocks[-1], "attn"):
            return trunk.blocks
        if hasattr(trunk, "forward_features"):
            return None
        raise self._refusal(f"a tower of type {type(self.tower).__name__} is neither a ViT nor one of timm's")

    def _refusal(self, why: str) -> ParameterError:
        return ParameterError(
            f"clip = {self.key}: {why}, so its dense features would be wrong; choose {', '.join(CLIP_NAMES)} or another plain ViT"
        )

    @torch.inference_mode()
    def _probe(self) -> None:
        """Check on one image of noise that the dense paths read the tower rightly: they must give its ``encode_image``.

        A transformer's last block is computed from its parts, with its own attention; then its class token, or the mean of
        its patches, must be the model's image feature. For another tower the mean of the projected map must be.
        """
        x = torch.rand((1, 3, *self.tower.image_size), generator=torch.Generator().manual_seed(0)).to(self.device)
        try:
            if self.blocks is None:
                own, rebuilt = self.model.encode_image(x), [self._project_map(self.tower.trunk.forward_features(x)).mean(dim=(2, 3))]
            else:
                own, last_input, _ = self._pass(x)
                block = LastBlock.of(self.blocks[-1])
                tokens = self._project(block.whole(last_input, dense_paths.attention(block, last_input)))
                rebuilt = [tokens[:, 0], tokens[:, self.prefix :].mean(dim=1)]
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, TypeError, RuntimeError) as error:
            raise self._refusal(f"its parts are not those of a plain ViT or feature map ({type(self.tower).__name__})") from error
        if not any(r.shape == own.shape and (r - own).abs().max() <= 1e-3 * own.abs().max() for r in rebuilt):
            raise self._refusal(
                "its image feature is not what its last block, norm and projection give here (it may have attention pooling, a norm in"
                " the head or another attention)"
            )

    @torch.inference_mode()
    def encode_text(self, prompts: Sequence[str], unit: bool = True) -> torch.Tensor:
        """(N, D) text features of N prompts; unit: scaled to unit norm, else as the text tower gives them."""
        ids = self._tokens(prompts)
        pad = getattr(getattr(getattr(self.model, "text", None), "config", None), "pad_token_id", None)
        if pad is not None:  # a Hugging Face tower, which masks padding: cut what is padding in all texts
            longest = int((ids != pad).sum(dim=1).max())
            ids = ids[:, : -(-longest // TOKENS) * TOKENS]
        features = self.model.encode_text(ids.to(self.device)).float()
        return F.normalize(features, dim=-1) if unit else features

    def _tokens(self, prompts: Sequence[str]) -> torch.Tensor:
        """(B, length) token ids. Raises ParameterError for a text that is longer than the tower reads."""
        length = self.tokenizer.context_length
        ids = self.tokenizer(list(prompts), context_length=length + 1)  # only a text that is too long reaches the last
        over = ~torch.isin(ids[:, length - 1], self.tokenizer([""], context_length=length))
        if over.any():
            text = prompts[int(over.nonzero()[0])]
            raise ParameterError(f"{text[:60]!r}...: longer than the {length} tokens that {self.key} reads of a text; shorten the name")
        return ids[:, :length]

    @torch.inference_mode()
    def encode_crops(
        self, crops: torch.Tensor, path: DensePath = "value", residual: bool = False, guide: Guide | None = None
    ) -> CropFeatures:
        """Class token and dense features of (B, height, width, 3) ``uint8`` crops, in one pass through the tower.

        path: "value" (the paper's), "plain" (the projected patch tokens, which the paper calls sub-optimal) or one of later
        work, a function of ``dense_paths``. A tower without attention has one path only, under both names "value" and
        "plain": its last feature map through the projection. guide: of these crops, for the path "guided".
        Raises ParameterError for a path that the tower does not have.
        """
        self._check_path(path, residual)
        if (path == "guided") != (guide is not None):
            raise ParameterError(
                f"path = {path!r}: guided, and no other path, takes the frozen encoder's patches of each window; the dense row has them, Stage 1"
                " does not: give path=selfcal or kk there"
            )
        x = normalise(crops.to(self.device), self.mean, self.std)
        with autocast(self.device, self.precision):
            found = self._encode(x, path, residual, guide)
        return CropFeatures(found.tokens.float(), found.maps.float())

    def _check_path(self, path: DensePath, residual: bool) -> None:
        if path not in get_args(DensePath):
            raise ParameterError(f"path = {path!r}: no such dense path; known are {', '.join(get_args(DensePath))}")
        if self.blocks is None and path not in ("value", "plain"):
            raise ParameterError(f"path = {path!r}: {self.key} has no attention; give path=value, the only one it has, or another clip")
        if residual and (path == "plain" or self.blocks is None):
            whose = "path = 'plain' keeps the last block's residual and MLP" if self.blocks is not None else f"{self.key} has no attention"
            raise ParameterError(f"residual = True: {whose}, so it would change nothing; leave residual out, or give path=value and a ViT")
        if path == "guided" and residual:
            raise ParameterError("path = 'guided', residual = True: guided takes no residual; give residual=false")
        if path == "selfcal" and (residual or not self._has_class_token or len(self.blocks) < 2):
            raise ParameterError(
                f"path = 'selfcal' for {self.key}, residual = {residual}: selfcal takes a tower of two or more blocks with a class token,"
                " and no residual; give path=kk, or residual=false"
            )

    def _encode(self, x: torch.Tensor, path: DensePath, residual: bool, guide: Guide | None = None) -> CropFeatures:
        if self.blocks is None:
            features = self.tower.trunk.forward_features(x)
            return CropFeatures(self.tower.head(features.mean(dim=(2, 3))), self._project_map(features))
        tokens, *inputs, last_output = self._pass(x, every_block=path == "selfcal")
        grid = x.shape[-2] // self.stride, x.shape[-1] // self.stride
        if path == "plain":
            dense = last_output
        elif path == "selfcal":
            dense = dense_paths.selfcal(LastBlock.of(self.blocks[-1]), inputs, grid)
        elif path == "guided":
            dense = dense_paths.guided(LastBlock.of(self.blocks[-1]), inputs[-1], grid, guide.patches, guide.regions)
        else:
            block = LastBlock.of(self.blocks[-1])
            added = dense_paths.kk(block, inputs[-1], grid) if path == "kk" else dense_paths.BY_NAME[path](block, inputs[-1])
            dense = block.whole(inputs[-1], added) if residual else added
        projected = self._project(dense[:, -grid[0] * grid[1] :])
        return CropFeatures(tokens, projected.transpose(1, 2).reshape(len(tokens), -1, *grid))

    def _pass(self, x: torch.Tensor, every_block: bool = False) -> list[torch.Tensor]:
        """(B, D) image features of the model's own forward pass, then the (B, N, W) input and output of its last block.

        every_block: in place of that input, the inputs of all blocks but the first.
        """
        caught: list[torch.Tensor] = []
        watched = self.blocks[1:] if every_block else self.blocks[-1:]
        hooks = [block.register_forward_pre_hook(lambda _, args: caught.append(args[0])) for block in watched]
        hooks.append(self.blocks[-1].register_forward_hook(lambda _, args, out: caught.append(out)))
        try:
            return [self.model.encode_image(x), *caught]
        finally:
            for hook in hooks:
                hook.remove()

    def _project_map(self, features: torch.Tensor) -> torch.Tensor:
        return self.tower.head(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _project(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, W) tokens of the last block -> (B, N, D): final norm and visual projection."""
        if isinstance(self.tower, VisionTransformer):
            return self.tower.ln_post(tokens) @ self.tower.proj
        trunk = self.tower.trunk
        return self.tower.head(trunk.head(trunk.fc_norm(trunk.norm(tokens))))

    @property
    def prefix(self) -> int:
        """How many tokens of a transformer come before the patches."""
        return 1 if isinstance(self.tower, VisionTransformer) else self.tower.trunk.num_prefix_tokens

    @property
    def _has_class_token(self) -> bool:
        return isinstance(self.tower, VisionTransformer) or getattr(self.tower.trunk, "cls_token", None) is not None

    @functools.cached_property
    def stride(self) -> int:
        """Pixels of the tower's input for one position of its dense features."""
        if isinstance(self.tower, VisionTransformer):
            return self.tower.patch_size[0]
        return self.tower.trunk.feature_info[-1]["reduction"]


def _lit_config(folder: Path) -> dict:
    """The stand-in as an open_clip model configuration; ``folder`` holds MiniLM's configuration and tokenizer."""
    config = files.asset(f"{LIT}.json")
    return config | {"text_cfg": config["text_cfg"] | {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder)}}


LIT_PROJECTION = files.ASSETS / f"{LIT}.safetensors"
"""The stand-in's own trained tensors: its two projections. ``fmbseg fetch`` brings the towers."""


def weights_key(name: str) -> str:
    """A model's name with a hash of its weights, without loading it. Raises WeightsError where they are not here."""
    if name == LIT:
        parts = files.sha256_of(LIT_PROJECTION), fetch.key("all_minilm_l6_v2"), fetch.key("efficientnet_lite2")
        return f"{LIT}-{files.digest(*parts)}"
    return f"{name}@{fetch.key(name)}" if name in CLIP_NAMES else name


def assemble_lit() -> Path:
    """Write the stand-in's towers and projections as one open_clip checkpoint into the cache; returns its path."""
    text, image = fetch.require("all_minilm_l6_v2"), fetch.require("efficientnet_lite2")
    target = files.home() / "weights" / f"{weights_key(LIT)}.safetensors"
    if files.is_whole(target):
        return target
    towers = (("visual.trunk", image, "classifier"), ("text.transformer", text, "pooler"))
    state = {
        f"{place}.{name}": tensor
        for place, folder, left_off in towers
        for name, tensor in files.read_tensors(folder / "model.safetensors")[0].items()
        if not name.startswith(left_off)
    }
    state.pop("text.transformer.embeddings.position_ids", None)
    state |= files.read_tensors(LIT_PROJECTION)[0]
    state["logit_scale"] = torch.tensor(100.0).log()
    return files.write_tensors(target, state)


def load_clip(name: str, device: str = "cpu", image_size: int | None = None, precision: Precision = "fp32") -> ImageText:
    """An image-text model by name: ``clip_vitl14``, ``clip_vitb16`` or the embedded stand-in.

    Any "MODEL TAG" that open_clip knows works too (``"ViT-B-32 laion2b_s34b_b79k"``), and ``random:MODEL`` gives
    open_clip's architecture with random weights (tests). image_size: side of the crops in pixels; None: the model's own.
    For another side a transformer's position embedding is interpolated.
    Raises ParameterError for an unknown name or device, WeightsError where weights are not here.
    """
    check_device(device)
    random = name.startswith("random:")
    if name == LIT:
        folder = fetch.require("all_minilm_l6_v2")
        configs = files.home() / "weights" / "open_clip"
        try:  # not written again where it is there: the cache may be read-only
            there = files.read_json(configs / f"{LIT}.json") == _lit_config(folder)
        except DataError:
            there = False
        if not there:
            files.write_json(configs / f"{LIT}.json", _lit_config(folder))
        open_clip.add_model_config(configs)
        architecture, pretrained = LIT, str(assemble_lit())
    else:
        architecture, _, pretrained = (CLIP_NAMES.get(name) or name.removeprefix("random:")).partition(" ")
        if architecture not in open_clip.list_models() or bool(pretrained) == random:
            raise ParameterError(
                f'clip = {name!r}: no such model; known are {", ".join(CLIP_NAMES)}, or "MODEL TAG" as open_clip lists them'
            )
    key = weights_key(name)  # raises WeightsError where they are not here
    options = {} if image_size is None or name == LIT else {"force_image_size": image_size}
    if name == LIT:  # EfficientNet-Lite's own normalisation: (pixel - 127) / 128
        options["force_preprocess_cfg"] = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(
            architecture, pretrained=None if random else pretrained, device=device, pretrained_text=False, **options
        )
    key = f"{key}@{image_size or model.visual.image_size}"
    return ImageText(model, open_clip.get_tokenizer(architecture), key, device, precision)
