"""What the hubs hold, checked without them: names, shapes and sizes of the full architectures, and small random models in the
hub's cache layout, loaded through the code that users run."""

import dataclasses
import json
import re

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from segment_anything import sam_model_registry

from fmbseg import files
from fmbseg.data import fetch
from fmbseg.errors import WeightsError
from fmbseg.models import clip as clip_module
from fmbseg.models import encoders as encoder_module
from fmbseg.models import sam as sam_module
from fmbseg.models.encoders import VITS

REVISION = "0123456789abcdef0123456789abcdef01234567"


# ---------------------------------------------------------------- the full architectures


@pytest.mark.parametrize(
    "name, millions",
    [
        *{"dinov2_vits14": 22.1, "dinov2_vitb14": 86.6, "dinov2_vitl14": 304.4, "dinov2_vitg14": 1136.5}.items(),
        *{"dinov2_vits14_reg": 22.1, "dinov2_vitb14_reg": 86.6, "dinov2_vitl14_reg": 304.4, "dinov2_vitg14_reg": 1136.5}.items(),
        *{"dinov3_vits16": 21.6, "dinov3_vitb16": 85.7, "dinov3_vitl16": 303.1}.items(),
        *{"siglip2_vitb16": 93.5, "siglip2_vitl16": 316.7, "siglip2_so400m16": 428.8}.items(),
    ],
)
def test_encoders_have_their_published_size(name, millions):
    with torch.device("meta"):
        model = VITS[name].build()
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 1) == millions
    if not name.startswith("siglip2"):  # whose files hold the text tower too
        assert fetch.find(name).megabytes == pytest.approx(4 * count / 1e6, rel=0.01)
    assert set(VITS) <= set(encoder_module.ENCODER_NAMES)


@pytest.mark.parametrize("name, parameters", [("ViT-L-14-quickgelu", 427_616_513), ("ViT-B-16-quickgelu", 149_620_737)])
def test_clip_has_openais_size(name, parameters):
    model = open_clip.create_model(name, pretrained=None, device="meta")
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == parameters
    width, layers, grid = {"ViT-L-14-quickgelu": (1024, 24, 16), "ViT-B-16-quickgelu": (768, 12, 14)}[name]
    assert shapes["visual.positional_embedding"] == (grid * grid + 1, width)
    assert shapes[f"visual.transformer.resblocks.{layers - 1}.attn.in_proj_weight"] == (3 * width, width)
    assert shapes["visual.proj"][0] == width and shapes["text_projection"][1] == shapes["visual.proj"][1] == shapes["ln_final.weight"][0]


@pytest.mark.parametrize(
    "name, millions, width, blocks", [("vit_b", 93.7, 768, 12), ("vit_l", 312.3, 1024, 24), ("vit_h", 641.1, 1280, 32)]
)
def test_sam_has_its_published_size(name, millions, width, blocks):
    with torch.device("meta"):
        model = sam_model_registry[name]()
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert shapes["image_encoder.pos_embed"] == (1, 64, 64, width)
    assert shapes[f"image_encoder.blocks.{blocks - 1}.attn.qkv.weight"] == (3 * width, width)
    assert shapes["image_encoder.blocks.0.attn.rel_pos_h"][0] == 27 and shapes["image_encoder.neck.0.weight"] == (256, width, 1, 1)
    assert shapes["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"] == (2, 128)
    assert shapes["mask_decoder.mask_tokens.weight"] == (4, 256)
    size = 4 * sum(np.prod(s) for s in shapes.values()) / 1e6
    assert fetch.find({v: k for k, v in sam_module._REGISTRY.items()}[name]).megabytes == pytest.approx(size, rel=0.01)


# ---------------------------------------------------------------- small models in the hub's cache layout


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, and no network: hub(repository, {file: dict of tensors or of JSON}) puts a repository into it."""
    import huggingface_hub.constants as constants
    import transformers.utils.hub as transformers_hub

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
        if hasattr(transformers_hub, name):
            monkeypatch.setattr(transformers_hub, name, str(tmp_path / "hub"))

    def put(repository, files):
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        snapshot = folder / "snapshots" / REVISION
        for path in (snapshot, folder / "refs", folder / "blobs"):
            path.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(REVISION)
        for name, content in files.items():
            blob = folder / "blobs" / name.replace(".", "_")
            if name.endswith(".json"):
                blob.write_text(json.dumps(content))
            else:
                save_file(content, blob, metadata={"format": "pt"})
            (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
        return snapshot

    return put


def random_state(shapes):
    """Tensors of these shapes: the same for the same shapes, none of them zero or one."""
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def norm(name, width=32):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear(name, out, width=32, bias=True):
    return {f"{name}.weight": (out, width)} | ({f"{name}.bias": (out,)} if bias else {})


def dinov2_names(registers=False, gated=False):
    """The names of facebook/dinov2-* on the hub, for a model of two layers, 32 wide, of 4 x 4 patches."""
    shapes = {"embeddings.cls_token": (1, 1, 32), "embeddings.mask_token": (1, 32), "embeddings.position_embeddings": (1, 17, 32)}
    shapes |= {"embeddings.register_tokens": (1, 4, 32)} if registers else {}
    shapes |= {"embeddings.patch_embeddings.projection.weight": (32, 3, 14, 14), "embeddings.patch_embeddings.projection.bias": (32,)}
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        for part in ("query", "key", "value"):
            shapes |= linear(f"{layer}.attention.attention.{part}", 32)
        shapes |= linear(f"{layer}.attention.output.dense", 32) | norm(f"{layer}.norm1") | norm(f"{layer}.norm2")
        shapes |= {f"{layer}.layer_scale1.lambda1": (32,), f"{layer}.layer_scale2.lambda1": (32,)}
        if gated:  # int(32 * 4 * 2 / 3) up to a multiple of 8
            shapes |= linear(f"{layer}.mlp.weights_in", 176) | linear(f"{layer}.mlp.weights_out", 32, 88)
        else:
            shapes |= linear(f"{layer}.mlp.fc1", 128) | linear(f"{layer}.mlp.fc2", 32, 128)
    return shapes | norm("layernorm")


def dinov3_names():
    """The names of facebook/dinov3-vit* on the hub."""
    shapes = {"embeddings.cls_token": (1, 1, 32), "embeddings.mask_token": (1, 1, 32), "embeddings.register_tokens": (1, 4, 32)}
    shapes |= {"embeddings.patch_embeddings.weight": (32, 3, 16, 16), "embeddings.patch_embeddings.bias": (32,)}
    for layer in ("layer.0", "layer.1"):
        for part in ("q", "k", "v", "o"):
            shapes |= linear(f"{layer}.attention.{part}_proj", 32, bias=part != "k")
        shapes |= norm(f"{layer}.norm1") | norm(f"{layer}.norm2")
        shapes |= {f"{layer}.layer_scale1.lambda1": (32,), f"{layer}.layer_scale2.lambda1": (32,)}
        shapes |= linear(f"{layer}.mlp.up_proj", 128) | linear(f"{layer}.mlp.down_proj", 32, 128)
    return shapes | norm("norm")


def siglip_names():
    """The names of google/siglip2-*-patch16-* on the hub: the vision tower, and a text tower that is not to be read."""
    shapes = {"vision_model.embeddings.patch_embedding.weight": (32, 3, 16, 16), "vision_model.embeddings.patch_embedding.bias": (32,)}
    shapes |= {"vision_model.embeddings.position_embedding.weight": (16, 32)}
    for layer in ("vision_model.encoder.layers.0", "vision_model.encoder.layers.1"):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{part}", 32)
        shapes |= norm(f"{layer}.layer_norm1") | norm(f"{layer}.layer_norm2")
        shapes |= linear(f"{layer}.mlp.fc1", 128) | linear(f"{layer}.mlp.fc2", 32, 128)
    shapes |= {"vision_model.head.probe": (1, 1, 32), "vision_model.head.attention.in_proj_weight": (96, 32)}
    shapes |= {"vision_model.head.attention.in_proj_bias": (96,)} | linear("vision_model.head.attention.out_proj", 32)
    shapes |= norm("vision_model.head.layernorm") | linear("vision_model.head.mlp.fc1", 128) | linear("vision_model.head.mlp.fc2", 32, 128)
    return shapes | norm("vision_model.post_layernorm") | {"text_model.embeddings.token_embedding.weight": (9, 32), "logit_scale": (1,)}


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER = SMALL | {"intermediate_size": 128, "image_size": 64, "patch_size": 16}
CASES = {
    "dinov2_vits14": ({"model_type": "dinov2", "image_size": 56, "patch_size": 14} | SMALL, dinov2_names()),
    "dinov2_vitg14": (
        {"model_type": "dinov2", "image_size": 56, "patch_size": 14, "use_swiglu_ffn": True} | SMALL,
        dinov2_names(gated=True),
    ),
    "dinov2_vitb14_reg": (
        {"model_type": "dinov2_with_registers", "image_size": 56, "patch_size": 14, "num_register_tokens": 4} | SMALL,
        dinov2_names(registers=True),
    ),
    "dinov3_vits16": ({"model_type": "dinov3_vit", "num_register_tokens": 4} | TOWER, dinov3_names()),
    "siglip2_vitb16": ({"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"} | TOWER}, siglip_names()),
}


def pixels(side):
    return torch.from_numpy(np.random.RandomState(0).randint(0, 255, (1, side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", CASES)
def test_encoder_from_the_hubs_cache(name, hub):
    """Every tensor under the hub's name arrives: changing any one of them changes what is loaded, and none is left random."""
    config, shapes = CASES[name]
    state = random_state(shapes)
    snapshot = hub(VITS[name].repository, {"config.json": config, "model.safetensors": state})
    assert fetch.is_here(fetch.find(name)) and fetch.require(name) == snapshot
    encoder = encoder_module.load_encoder(name)
    assert encoder.key == f"{name}@{REVISION[:16]}" and encoder.width == 32
    loaded = {k: v for k, v in encoder.model.state_dict().items()}
    wanted = {k: v for k, v in state.items() if not k.startswith(("text_model", "logit_scale"))}
    assert sum(v.numel() for v in loaded.values()) == sum(v.numel() for v in wanted.values())
    given = torch.cat([v.flatten() for v in wanted.values()]).sort().values
    torch.testing.assert_close(torch.cat([v.flatten() for v in loaded.values()]).sort().values, given)
    side = 5 * encoder.patch  # other than the model's own: positions are interpolated
    patches = encoder.encode(pixels(side))
    assert patches.shape == (1, 32, 5, 5) and torch.isfinite(patches).all() and patches.std() > 1e-3


def test_gated_mlp_is_split_in_the_hubs_order(hub):
    config, shapes = CASES["dinov2_vitg14"]
    state = random_state(shapes)
    hub(VITS["dinov2_vitg14"].repository, {"config.json": config, "model.safetensors": state})
    loaded = encoder_module.load_encoder("dinov2_vitg14").model.state_dict()
    both = state["encoder.layer.1.mlp.weights_in.weight"]
    torch.testing.assert_close(loaded["encoder.layer.1.mlp.gate_proj.weight"], both[:88])
    torch.testing.assert_close(loaded["encoder.layer.1.mlp.up_proj.weight"], both[88:])
    for part in ("query", "key", "value"):
        torch.testing.assert_close(
            loaded[f"encoder.layer.0.attention.{part[0]}_proj.weight"], state[f"encoder.layer.0.attention.attention.{part}.weight"]
        )


def test_patches_lie_where_they_were_in_the_image(hub):
    """The class and register tokens are left off: a bright corner is told by the patch of that corner."""
    for name in ("dinov2_vitb14_reg", "dinov3_vits16", "siglip2_vitb16"):
        config, shapes = CASES[name]
        hub(VITS[name].repository, {"config.json": config, "model.safetensors": random_state(shapes)})
        encoder = encoder_module.load_encoder(name)
        dark = torch.zeros(1, 4 * encoder.patch, 4 * encoder.patch, 3, dtype=torch.uint8)
        bright = dark.clone()
        bright[:, -encoder.patch :, : encoder.patch] = 255  # last row, first column
        change = (encoder.encode(bright) - encoder.encode(dark)).norm(dim=1)[0]
        assert divmod(int(change.argmax()), 4) == (3, 0), name


def test_half_a_repository_is_not_here(hub):
    config, shapes = CASES["dinov2_vits14"]
    snapshot = hub(VITS["dinov2_vits14"].repository, {"config.json": config, "model.safetensors": random_state(shapes)})
    (snapshot / "config.json").unlink()
    with pytest.raises(WeightsError, match="run: fmbseg fetch dinov2_vits14"):
        encoder_module.load_encoder("dinov2_vits14")


def test_gated_weights_say_that_access_comes_first(hub):
    with pytest.raises(
        WeightsError, match="ask for access on its page .granted by hand: it may take days and may be refused. and set HF_TOKEN"
    ):
        fetch.fetch(fetch.find("dinov3_vitb16"))
    with pytest.raises(WeightsError) as caught:
        fetch.fetch(fetch.find("dinov2_vitb14"))
    assert "HF_TOKEN" not in str(caught.value)


@pytest.mark.parametrize("name, wanted", [("clip_vitb16", "open_clip_model.safetensors"), ("dinov2_vits14", "config.json")])
def test_only_what_is_loaded_is_fetched_and_a_repository_without_it_is_refused(name, wanted, hub, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, allow_patterns: asked.append((repository, allow_patterns)))
    with pytest.raises(WeightsError, match=f"{name}: {fetch.find(name).repository} lacks {wanted}"):
        fetch.fetch(fetch.find(name))
    ((repository, patterns),) = asked
    assert repository == fetch.find(name).repository and wanted in patterns and not any("*" in p or p.endswith(".bin") for p in patterns)


@pytest.mark.parametrize("before", [False, True])
def test_a_hub_file_of_another_hash_is_refused_and_only_what_was_fetched_is_deleted(before, hub, monkeypatch):
    import huggingface_hub

    def put(repository, allow_patterns=None):
        return hub(repository, {"open_clip_model.safetensors": {"a": torch.ones(2)}}) / "open_clip_model.safetensors"

    row = fetch.find("clip_vitb16")
    path = put(row.repository) if before else None
    monkeypatch.setattr(huggingface_hub, "snapshot_download", (lambda *_, **__: None) if before else put)
    with pytest.raises(WeightsError, match="open_clip_model.safetensors does not match the known sha256 of timm/vit_base_patch16_clip_224"):
        fetch.fetch(row)
    assert fetch.is_here(row) == before
    path = path or put(row.repository)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: None)
    fetch.fetch(dataclasses.replace(row, sha256=files.file_sha256(path)))
    fetch.fetch(dataclasses.replace(row, sha256=""))


TINY_CLIP = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize(
    "name, repository",
    [("clip_vitl14", "timm/vit_large_patch14_clip_224.openai"), ("clip_vitb16", "timm/vit_base_patch16_clip_224.openai")],
)
def test_clip_from_the_hubs_cache(name, repository, hub, monkeypatch):
    architecture, tag = fetch.find(name).open_clip.split()
    assert open_clip.get_pretrained_cfg(architecture, tag)["hf_hub"] == f"{repository}/" == f"{fetch.find(name).repository}/"
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, architecture, TINY_CLIP)
    torch.manual_seed(3)
    made = open_clip.create_model(architecture, pretrained=None)
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.copy_(0.05 * torch.randn_like(tensor.float()))
    hub(repository, {"open_clip_model.safetensors": {k: v.contiguous() for k, v in made.state_dict().items()}})
    clip = clip_module.load_clip(name)
    assert clip.key == f"{name}@{REVISION[:16]}@(32, 32)"
    assert open_clip.get_model_preprocess_cfg(clip.model)["mean"] == open_clip.OPENAI_DATASET_MEAN
    for key, tensor in clip.model.state_dict().items():
        torch.testing.assert_close(tensor, made.state_dict()[key])
    out = clip.encode_crops(pixels(32))
    assert out.tokens.shape == (1, 24) and out.maps.shape == (1, 24, 2, 2)
    assert clip.encode_text(["a photo of a cat", "a photo of a dog"]).shape == (2, 24)


def test_sam_from_its_download(own_home, tmp_path, monkeypatch):
    """The checkpoint as it is published, a pickled state dict at a URL: fetched, checked, converted, loaded."""
    monkeypatch.setitem(sam_model_registry, "vit_b", sam_module.build_tiny_sam)
    made = sam_module.build_tiny_sam()
    torch.save(made.state_dict(), tmp_path / "sam_vit_b_01ec64.pth")
    row = fetch.find("sam_vitb")
    path = tmp_path / "sam_vit_b_01ec64.pth"
    changed = dataclasses.replace(row, url=path.as_uri(), sha256=files.file_sha256(path))
    monkeypatch.setattr(fetch, "TABLE", tuple(changed if w.name == "sam_vitb" else w for w in fetch.TABLE))
    fetch.fetch(fetch.find("sam_vitb"))
    sam = sam_module.load_sam("sam_vitb")
    for key, tensor in sam.model.state_dict().items():
        torch.testing.assert_close(tensor, made.state_dict()[key])
    sam.set_image(pixels(64)[0].numpy())
    assert sam.predict(np.array([[10, 20]]))[0].shape == (3, 64, 64)
    assert re.fullmatch(r"sam_vitb@[0-9a-f]{16}", sam.key)
