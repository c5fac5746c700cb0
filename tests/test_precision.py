"""bfloat16 products of the frozen models: close to float32, told by the key, float32 again outside."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fmbseg.errors import ParameterError
from fmbseg.models.clip import load_clip
from fmbseg.models.encoders import load_encoder
from fmbseg.models.precision import lower
from fmbseg.models.sam import load_sam
from fmbseg.params import FeatureParams, LabelParams, PatchParams, make
from fmbseg.runs import cache


def crops(count=2, side=224):
    return torch.from_numpy(np.random.RandomState(0).randint(0, 255, (count, side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["random:ViT-S-32", "lit-efficientnet-lite2-minilm"])
def test_clip_in_bf16_is_close_and_another_key(name):
    full, low = (load_clip(name, "cpu", None, precision) for precision in ("fp32", "bf16"))
    made, lowered = (clip.encode_crops(crops()) for clip in (full, low))
    for one, other in ((made.maps, lowered.maps), (made.tokens, lowered.tokens)):
        assert other.dtype == torch.float32 and not torch.equal(one, other)
        assert F.cosine_similarity(one.flatten(1), other.flatten(1)).min() > 0.99
    assert low.key == f"{full.key} bf16"


def test_encoder_in_bf16_is_close_and_another_key(photograph):
    full, low = (load_encoder("efficientnet_lite2", "cpu", precision) for precision in ("fp32", "bf16"))
    pixels = torch.from_numpy(photograph[:224, :256].copy())[None]
    one, other = full.encode(pixels), low.encode(pixels)
    assert other.dtype == torch.float32 and not torch.equal(one, other) and low.key == f"{full.key} bf16"
    assert F.cosine_similarity(one, other, dim=1).min() > 0.98


def test_sam_in_bf16_outlines_the_same_thing(photograph):
    masks = {}
    for precision in ("fp32", "bf16"):
        sam = load_sam("mobile_sam", "cpu", precision)
        sam.set_image(photograph)
        found, scores = sam.predict(np.array([[photograph.shape[1] / 2, photograph.shape[0] / 2]]))
        assert scores.dtype == np.float32
        masks[sam.key] = found[scores.argmax()]
        assert all(m.mask.dtype == bool for m in sam.automatic_masks(photograph, 2, 2, 0.5, 0.5, 0.7))
    (_, one), (key, other) = masks.items()
    assert key.endswith(" bf16") and (one & other).sum() / (one | other).sum() > 0.9


def test_what_is_kept_on_disk_differs_with_the_precision(sample):
    """Features of one precision are never taken for those of another."""
    shared = {"clip": "random:ViT-S-32"}
    paths = {
        precision: cache._store("clip", ".safetensors", cache.clip_of(p).key, p.content(FeatureParams)).path(sample.image)
        for precision in ("fp32", "bf16")
        for p in [make(LabelParams, shared | {"precision": precision})]
    }
    assert paths["fp32"] != paths["bf16"]
    assert cache.encoder_of(make(PatchParams, {"encoder": "random:efficientnet_lite2", "precision": "bf16"})).precision == "bf16"


def test_lower_gives_back_float32_and_leaves_fp32_alone():
    layer = torch.nn.Linear(64, 64)
    forward = layer.forward
    lower(layer, "cpu", "fp32")
    assert layer.forward == forward
    x = torch.randn(3, 64)
    full = layer(x)
    lower(layer, "cpu", "bf16")
    assert layer(x).dtype == torch.float32 and not torch.equal(layer(x), full) and (layer(x) - full).abs().max() < 0.05


def test_an_unknown_precision_is_refused():
    with pytest.raises(ParameterError, match="precision = 'fp16'"):
        make(FeatureParams, {"precision": "fp16"})
