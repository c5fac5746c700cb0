"""Image-text models, SAM and encoders: value path, real weights, random architectures, bfloat16."""

import platform
import resource

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

from fmbseg.data import benchmarks, fetch, images
from fmbseg.errors import ParameterError, WeightsError
from fmbseg.models import dense_paths, sam_decoder
from fmbseg.models import sam as sam_models
from fmbseg.models.clip import LIT, ImageText, load_clip
from fmbseg.models.dense_paths import LastBlock
from fmbseg.models.encoders import FeaturePyramid, load_encoder
from fmbseg.models.precision import lower
from fmbseg.models.sam import load_sam, read_sam
from fmbseg.models.texts import class_texts


def crops(count=2, side=224):
    return torch.from_numpy(np.random.RandomState(0).randint(0, 255, (count, side, side, 3), dtype=np.uint8))


def hand_written_value(tower, pixels):
    """Every step of open_clip's ViT written out, the last block without queries and keys."""
    x = tower.conv1(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([tower.class_embedding.expand(len(x), 1, -1), x], dim=1) + tower.positional_embedding
    x = tower.ln_pre(x)
    for block in tower.transformer.resblocks[:-1]:
        x = block(x)
    last = tower.transformer.resblocks[-1]
    width = x.shape[-1]
    w, b = last.attn.in_proj_weight[2 * width :], last.attn.in_proj_bias[2 * width :]
    value = last.ln_1(x) @ w.T + b
    value = value @ last.attn.out_proj.weight.T + last.attn.out_proj.bias
    return (tower.ln_post(value) @ tower.proj)[:, 1:]


def test_value_path_of_open_clips_own_tower_is_the_last_block_written_by_hand():
    clip = load_clip("random:ViT-S-32")
    pixels = crops()
    out = clip.encode_crops(pixels)
    normalised = images.normalise(pixels, clip.mean, clip.std)
    expected = hand_written_value(clip.tower, normalised)
    torch.testing.assert_close(out.maps.flatten(2).transpose(1, 2), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.tokens, clip.model.encode_image(normalised), atol=1e-5, rtol=1e-4)


def test_plain_path_is_the_projected_patch_tokens():
    clip = load_clip("random:ViT-S-32")
    clip.tower.output_tokens = True
    pixels = crops()
    normalised = images.normalise(pixels, clip.mean, clip.std)
    _, tokens = clip.tower(normalised)
    clip.tower.output_tokens = False
    out = clip.encode_crops(pixels, path="plain").maps
    torch.testing.assert_close(out.flatten(2).transpose(1, 2), tokens @ clip.tower.proj, atol=1e-5, rtol=1e-4)


def tiny_vit(**vision):
    """A small ViT of open_clip's own, all of its numbers at random."""
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64} | vision
    model = open_clip.model.CLIP(48, vision, {"layers": 1, "width": 32, "heads": 2})
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("ln" in name and "weight" in name), std=0.3)
    open_clip.model.set_model_preprocess_cfg(model, {"mean": (0.5,) * 3, "std": (0.5,) * 3, "size": (64, 64)})
    return ImageText(model, None, "tiny")


@pytest.mark.parametrize("vision", [{}, {"ls_init_value": 0.3}], ids=["plain", "layer scale"])
def test_value_path_with_residual_is_the_whole_block_when_there_is_one_token(vision):
    """With one token attention has one place to look: with LayerScale too, input, scales and MLP are the block's own."""
    block = tiny_vit(**vision).blocks[-1]
    x, parts = torch.randn(3, 1, 64), LastBlock.of(block)
    torch.testing.assert_close(parts.whole(x, dense_paths.value(parts, x)), block(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("residual", [False, True])
def test_layer_scale_is_in_the_value_path_of_a_whole_tower(residual):
    clip = tiny_vit(ls_init_value=0.3)
    caught = []
    clip.blocks[-1].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    made = clip.encode_crops(crops(2, 64), residual=residual).maps
    x, block = caught[0], clip.blocks[-1]
    width = x.shape[-1]
    value = F.linear(block.ln_1(x), block.attn.in_proj_weight[2 * width :], block.attn.in_proj_bias[2 * width :])
    out = block.ls_1.gamma * block.attn.out_proj(value)
    if residual:
        out = x + out
        out = out + block.ls_2.gamma * block.mlp(block.ln_2(out))
    expected = (clip.tower.ln_post(out) @ clip.tower.proj)[:, 1:]
    torch.testing.assert_close(made.flatten(2).transpose(1, 2), expected, atol=1e-4, rtol=1e-4)


def timm_clip(name, pool="token", proj="linear"):
    """A tower of timm's with random weights in open_clip's frame."""
    torch.manual_seed(0)
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": 224}
    model = open_clip.model.CustomTextCLIP(64, vision, {"layers": 1, "width": 64, "heads": 2})
    open_clip.model.set_model_preprocess_cfg(model, {"mean": (0.5,) * 3, "std": (0.5,) * 3, "size": (224, 224)})
    return ImageText(model, None, name)


REFUSED = {
    "EVA: gamma_1, q_bias, v_bias": lambda: timm_clip("eva02_tiny_patch14_224"),
    "ConvNeXt: a norm in the head": lambda: timm_clip("convnext_atto", ""),
    "attention pooling, timm": lambda: timm_clip("vit_tiny_patch16_224", "map", "none"),
    "attention pooling, a ResNet": lambda: timm_clip("resnet10t", "abs_attn", ""),
    "attention pooling, CoCa": lambda: tiny_vit(attentional_pool=True, attn_pooler_queries=8),
    "a norm after attention": lambda: tiny_vit(block_type="custom", scale_attn=True),
    "norms of queries and keys": lambda: tiny_vit(block_type="custom", qk_norm=True),
    "a norm after the mean": lambda: tiny_vit(pool_type="avg", final_ln_after_pool=True),
    "maps with channels last": lambda: timm_clip("swin_tiny_patch4_window7_224", "avg"),
    "CLIP's own ResNet": lambda: load_clip("random:RN50"),
}


@pytest.mark.parametrize("tower", REFUSED.values(), ids=REFUSED)
def test_a_tower_whose_dense_features_would_be_wrong_is_refused(tower):
    with pytest.raises(ParameterError, match="clip = .*so its dense features would be wrong; choose .*clip_vitl14"):
        tower()


@pytest.mark.parametrize(
    "tower",
    [
        lambda: tiny_vit(pool_type="avg"),
        lambda: tiny_vit(block_type="custom"),
        lambda: timm_clip("vit_tiny_patch16_224", proj=None),  # as MobileCLIP-B: the trunk's own classifier projects
        lambda: timm_clip("resnet10t", "avg"),
    ],
    ids=["mean of the patches", "another class of block", "projection in the trunk", "convolutional"],
)
def test_a_tower_that_is_read_rightly_is_accepted(tower):
    clip = tower()
    out = clip.encode_crops(crops(1, clip.image_size), path="plain")
    own = clip.model.encode_image(images.normalise(crops(1, clip.image_size), clip.mean, clip.std))
    torch.testing.assert_close(out.tokens, own, atol=1e-4, rtol=1e-3)
    assert out.maps.shape[1] == own.shape[1]


def test_timm_trunk_takes_the_value_path_too():
    clip = timm_clip("vit_tiny_patch16_224")
    out = clip.encode_crops(crops())
    assert clip.stride == 16 and out.maps.shape == (2, 64, 14, 14)
    trunk, block = clip.tower.trunk, clip.tower.trunk.blocks[-1]
    pixels = crops().permute(0, 3, 1, 2).float() / 255 * 2 - 1
    x = trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(pixels)))
    for one in trunk.blocks[:-1]:
        x = one(x)
    width = x.shape[-1]
    value = F.linear(block.norm1(x), block.attn.qkv.weight[2 * width :], block.attn.qkv.bias[2 * width :])
    expected = clip.tower.head(trunk.norm(block.attn.proj(value)))[:, 1:]
    torch.testing.assert_close(out.maps.flatten(2).transpose(1, 2), expected, atol=1e-5, rtol=1e-4)


def test_stand_in_maps_average_to_its_own_image_features(real_image):
    clip = load_clip(LIT)
    pixels = torch.from_numpy(real_image[:256, :256].copy())[None]
    out = clip.encode_crops(pixels)
    assert out.maps.shape == (1, 384, 8, 8)
    torch.testing.assert_close(out.maps.mean(dim=(2, 3)), out.tokens, atol=1e-4, rtol=1e-3)
    normalised = (pixels.permute(0, 3, 1, 2).float() - 127) / 128
    torch.testing.assert_close(out.tokens, clip.model.encode_image(normalised), atol=1e-4, rtol=1e-3)


def test_stand_in_knows_a_cat_from_a_bus():
    """Text and image towers meet: names near each other are nearer than names far apart, and norms are one."""
    texts = load_clip(LIT).encode_text(["a photo of a cat", "a photo of a kitten", "a photo of a bus"])
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(3))
    raw = load_clip(LIT).encode_text(["a photo of a cat"], unit=False)
    assert (raw.norm() - 1).abs() > 0.01
    torch.testing.assert_close(F.normalize(raw, dim=1), texts[:1], atol=1e-5, rtol=1e-4)
    assert texts[0] @ texts[1] > texts[0] @ texts[2] + 0.2


def test_stand_in_finds_what_is_in_real_images():
    """Image-level truth of the embedded images: the best of the 80 names is one of the image's in most of them."""
    clip, found = load_clip(LIT), benchmarks.load_benchmark("embedded_coco_object80")
    texts = class_texts(clip, found.space)
    hits = 0
    for one in found.samples:
        square = torch.from_numpy(images.resize(images.read_image(one.image), (260, 260)))[None]
        token = F.normalize(clip.encode_crops(square).tokens, dim=-1)
        best = int(texts.per_class(token @ texts.features.T).argmax())
        hits += best in one.truth()
    assert hits >= 15  # of 30; chance is about 1


def test_sam_outlines_the_cup_in_a_real_image():
    found = benchmarks.load_benchmark("embedded_coco_object80")
    (one,) = [s for s in found.samples if s.name == "000000311303"]
    cup = one.truth() == found.space.names.index("cup")
    rows, columns = np.nonzero(cup)
    sam = load_sam("mobile_sam")
    sam.set_image(images.read_image(one.image))
    masks, scores = sam.predict(np.array([[columns.mean(), rows.mean()]]))
    assert masks.shape == (3, *cup.shape) and masks.dtype == bool and scores.shape == (3,)
    assert max((m & cup).sum() / (m | cup).sum() for m in masks) > 0.85


def test_sam_sees_an_image_once_and_a_kept_embedding_gives_the_same_masks(real_image, monkeypatch):
    sam = load_sam("random:tiny_sam")
    calls = []
    forward = sam.model.image_encoder.forward
    monkeypatch.setattr(sam.model.image_encoder, "forward", lambda x: calls.append(1) or forward(x))
    sam.set_image(real_image)
    kept, first = sam.embedding.clone(), sam.predict(np.array([[50, 60]]))
    sam.automatic_masks(real_image, 2, 2, 0.0, 0.0, 0.7)
    assert len(calls) == 1
    sam.set_image(real_image[::-1].copy())
    sam.set_image(real_image, kept)
    again = sam.predict(np.array([[50, 60]]))
    assert len(calls) == 2
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])


def package_and_ours(name, real_image):
    """The package's own SAM as it is published, and fmbseg's; the tiny one sees 96 of its 128 rows."""
    ours = load_sam(name)
    return (read_sam(name), ours, real_image) if name == "mobile_sam" else (load_sam(name).model, ours, real_image[:226, :301].copy())


def overlap(one, other):
    return (one & other).sum() / max((one | other).sum(), 1)


@pytest.mark.parametrize(
    "name, thresholds", [("mobile_sam", (0.7, 0.85, 0.7)), ("random:tiny_sam", (0.0, 0.0, 1.0)), ("random:tiny_sam", (0.15, 0.0, 1.0))]
)
def test_automatic_masks_are_those_of_the_packages_generator(real_image, name, thresholds):
    model, ours, image = package_and_ours(name, real_image)
    made = ours.automatic_masks(image, 3, 2, *thresholds)
    theirs = SamAutomaticMaskGenerator(model.eval(), 3, 2, *thresholds[:2], box_nms_thresh=thresholds[2]).generate(image)
    assert len(made) == len(theirs) > 2
    for one, other in zip(made, theirs, strict=True):
        assert overlap(one.mask, other["segmentation"]) > 0.999 and list(one.point) == other["point_coords"][0]
        assert one.predicted_iou == pytest.approx(other["predicted_iou"], abs=1e-4)
        assert one.stability == pytest.approx(other["stability_score"], abs=1e-3, nan_ok=True)


@pytest.mark.parametrize("name", ["mobile_sam", "random:tiny_sam"])
def test_masks_of_a_joint_prompt_are_those_of_the_packages_predictor(real_image, name):
    model, ours, image = package_and_ours(name, real_image)
    predictor, points = SamPredictor(model.eval()), np.array([[50, 60], [90, 200], [10.5, 20]])
    ours.set_image(image)
    predictor.set_image(image)
    torch.testing.assert_close(ours.embedding, predictor.features.half(), atol=1e-3, rtol=1e-3)
    masks, scores = ours.predict(points)
    others, expected, _ = predictor.predict(points, np.ones(3))
    assert masks.dtype == bool and all(overlap(one, other) > 0.999 for one, other in zip(masks, others, strict=True))
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_what_sam_computes_for_automatic_masks(real_image, monkeypatch):
    sam, image = load_sam("random:tiny_sam"), real_image[:301, :203]
    encoded, decoded, upscaled, scaled = [], [], [], []
    sam.model.image_encoder.register_forward_hook(lambda m, given, out: encoded.append(len(out)))
    sam.model.mask_decoder.output_upscaling.register_forward_hook(lambda m, given, out: upscaled.append(len(out)))
    decode, scale = sam_decoder.decode, sam._scaled
    monkeypatch.setattr(sam_decoder, "decode", lambda *given: decoded.append(len(given[3])) or decode(*given))
    monkeypatch.setattr(sam, "_scaled", lambda logits, size: scaled.append(len(logits)) or scale(logits, size))
    everything = sam.automatic_masks(image, 3, 4, 0.0, 0.0, 1.0)
    assert (encoded, decoded, upscaled, scaled) == ([1], [4, 4, 1], [4, 4, 1], [12, 12, 3]) and len(everything) == 27

    monkeypatch.setattr(sam_models, "SCALED_PIXELS", 2 * image[..., 0].size + 1)  # no more than two masks at once
    scaled.clear()
    again = sam.automatic_masks(image, 3, 4, 0.0, 0.0, 1.0)
    assert max(scaled) == 2 and sum(scaled) == 27 and len(encoded) == 1
    for one, other in zip(everything, again, strict=True):
        assert one.point == other.point and np.array_equal(one.mask, other.mask)

    likely = sorted(m.predicted_iou for m in everything)[-4]  # of 27: three are over it, at most three points'
    upscaled.clear(), scaled.clear()
    assert len(sam.automatic_masks(image, 3, 4, likely, 0.0, 1.0)) == 3 == sum(scaled) and sum(upscaled) <= 3
    scaled.clear()
    assert sam.automatic_masks(image, 3, 4, 0.0, 1.0 + sam_models.ROUGHLY + 0.01, 1.0) == [] and not scaled


def test_masks_of_a_long_image_are_compared_at_another_length_and_enlarged(real_image, monkeypatch):
    sam, image = load_sam("random:tiny_sam"), real_image[:301, :203]
    whole, sizes, scale = sam.automatic_masks(image, 3, 4, 0.0, 0.0, 1.0, 301), [], sam._scaled
    monkeypatch.setattr(sam, "_scaled", lambda logits, size: sizes.append(size) or scale(logits, size))
    short = sam.automatic_masks(image, 3, 4, 0.0, 0.0, 1.0, 150)
    assert set(sizes) == {(150, 101)} and len(short) == len(whole) == 27
    for one, other in zip(short, whole, strict=True):
        assert one.point == other.point and one.mask.shape == other.mask.shape == (301, 203) and one.mask.dtype == bool
        assert overlap(one.mask, other.mask) > 0.8


def test_encoders_joined_are_their_patches_side_by_side(real_image):
    pixels = torch.from_numpy(real_image[:224, :256].copy())[None]
    first, second, both = (load_encoder(n).encode(pixels) for n in ("efficientnet_lite2", "mobile_sam", "efficientnet_lite2+mobile_sam"))
    assert first.shape == (1, 520, 14, 16) and second.shape == (1, 480, 14, 16)
    torch.testing.assert_close(both, torch.cat([first, second], dim=1))


@pytest.mark.parametrize("name, width", [("dinov2_vits14", 384), ("dinov2_vitb14", 768)])
def test_dinov2_architecture_with_random_weights(name, width):
    encoder = load_encoder(f"random:{name}")
    pixels = crops(1, 70)
    patches = encoder.encode(pixels)
    assert patches.shape == (1, width, 5, 5)
    tokens = encoder.model(pixel_values=_imagenet(pixels)).last_hidden_state
    torch.testing.assert_close(patches[0, :, 1, 2], tokens[0, 1 + 7])


def _imagenet(pixels):
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def test_encoder_refuses_sides_that_are_no_multiple_of_the_patch():
    with pytest.raises(ParameterError, match="multiples of 16"):
        load_encoder("random:efficientnet_lite2").encode(crops(1, 100))


def test_unknown_names_are_refused_with_the_known_ones():
    for load, known in ((load_clip, LIT), (load_encoder, "dinov2_vitl14"), (load_sam, "sam_vith")):
        with pytest.raises(ParameterError, match=known):
            load("nonsense")


def test_hub_weights_that_are_not_here_name_the_command(monkeypatch):
    monkeypatch.setattr(fetch, "is_here", lambda weight: False)
    for load, name in ((load_encoder, "dinov2_vits14"), (load_sam, "sam_vitb"), (load_clip, "clip_vitb16")):
        with pytest.raises(WeightsError, match=f"fmbseg fetch {name}"):
            load(name)


def test_encoder_key_covers_the_stages_it_reads():
    """Kept patches are found by this key: the same weights read at other stages are another encoder."""
    network = load_encoder("random:efficientnet_lite2").network
    one, other = (FeaturePyramid("name", network, stages, 16, (0.5,) * 3, (0.5,) * 3) for stages in ([3], [4]))
    assert one.key != other.key


# ---------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("name", ["random:ViT-S-32", LIT])
def test_clip_in_bf16_is_close_and_another_key(name):
    full, low = (load_clip(name, "cpu", None, precision) for precision in ("fp32", "bf16"))
    made, lowered = (clip.encode_crops(crops()) for clip in (full, low))
    for one, other in ((made.maps, lowered.maps), (made.tokens, lowered.tokens)):
        assert other.dtype == torch.float32 and not torch.equal(one, other)
        assert F.cosine_similarity(one.flatten(1), other.flatten(1)).min() > 0.99
    assert low.key == f"{full.key} bf16"


def test_encoder_in_bf16_is_close_and_another_key(real_image):
    full, low = (load_encoder("efficientnet_lite2", "cpu", precision) for precision in ("fp32", "bf16"))
    pixels = torch.from_numpy(real_image[:224, :256].copy())[None]
    one, other = full.encode(pixels), low.encode(pixels)
    assert other.dtype == torch.float32 and not torch.equal(one, other) and low.key == f"{full.key} bf16"
    assert F.cosine_similarity(one, other, dim=1).min() > 0.98


def test_sam_in_bf16_outlines_the_same_thing(real_image):
    masks = {}
    for precision in ("fp32", "bf16"):
        sam = load_sam("mobile_sam", "cpu", precision)
        sam.set_image(real_image)
        found, scores = sam.predict(np.array([[real_image.shape[1] / 2, real_image.shape[0] / 2]]))
        masks[sam.key] = found[scores.argmax()]
    (_, one), (key, other) = masks.items()
    assert key.endswith(" bf16") and (one & other).sum() / (one | other).sum() > 0.9


def test_lower_gives_back_float32_and_leaves_fp32_alone():
    layer = torch.nn.Linear(64, 64)
    forward = layer.forward
    lower(layer, "cpu", "fp32")
    assert layer.forward == forward
    x = torch.randn(3, 64)
    full = layer(x)
    lower(layer, "cpu", "bf16")
    assert layer(x).dtype == torch.float32 and not torch.equal(layer(x), full) and (layer(x) - full).abs().max() < 0.05


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="a C library of Linux")
def test_memory_of_a_freed_tensor_serves_the_next_one():
    torch.ones(32 << 20, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(24 << 20, dtype=torch.uint8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 600  # new pages, of the 6,144 that it has
