import pytest
import torch

from fmbseg import files
from fmbseg.errors import DataError, ParameterError
from fmbseg.params import ModuleParams
from fmbseg.runs import modules
from fmbseg.stage2 import alignment
from fmbseg.stage2.alignment import Alignment

MODULES = ("linear", "mlp", "transformer")
WIDTH, OUT = 48, 20


def module_of(name, **options):
    torch.manual_seed(0)
    made = Alignment(WIDTH, OUT, ModuleParams(module=name, **options))
    made.mean.copy_(torch.linspace(-1, 1, WIDTH))
    made.std.copy_(torch.linspace(0.5, 2, WIDTH))
    return made.eval()


def patches(batch=2, height=3, width=5, seed=1):
    return torch.randn(batch, WIDTH, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODULES)
def test_output_is_unit_norm_in_the_texts_space(name):
    z = module_of(name)(patches())
    assert z.shape == (2, OUT, 3, 5)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2, 3, 5))


def test_modules_are_what_table_2_calls_them():
    x = patches()
    flat = ((x - torch.linspace(-1, 1, WIDTH)[:, None, None]) / torch.linspace(0.5, 2, WIDTH)[:, None, None]).permute(0, 2, 3, 1)
    linear, mlp, transformer = (module_of(name) for name in MODULES)
    for made, y in ((linear, flat), (mlp, torch.nn.functional.gelu(mlp.module.hidden(flat)))):
        expected = torch.nn.functional.normalize(made.module.project(y), dim=-1).permute(0, 3, 1, 2)
        torch.testing.assert_close(made(x), expected)
    assert mlp.module.hidden.out_features == 4 * WIDTH
    assert module_of("mlp", mlp_ratio=0.5).module.hidden.out_features == WIDTH // 2
    assert transformer.module.block.norm_first and transformer.module.block.linear1.out_features == 4 * WIDTH


@pytest.mark.parametrize("name, alone", [("linear", True), ("mlp", True), ("transformer", False)])
def test_only_the_transformer_looks_at_other_patches(name, alone):
    made, x = module_of(name), patches()
    changed = x.clone()
    changed[0, :, 0, 0] += 3
    before, after = made(x), made(changed)
    assert not torch.allclose(before[0, :, 0, 0], after[0, :, 0, 0], atol=1e-4)
    assert torch.allclose(before[0, :, 1:], after[0, :, 1:], atol=1e-6) == alone
    torch.testing.assert_close(before[1], after[1])  # another image


@pytest.mark.parametrize("name", MODULES)
def test_no_patch_knows_its_place(name):
    made, x = module_of(name), patches()
    order = torch.randperm(15, generator=torch.Generator().manual_seed(2))
    shuffled = x.flatten(2)[:, :, order].reshape(x.shape)
    torch.testing.assert_close(made(shuffled).flatten(2), made(x).flatten(2)[:, :, order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_images_of_a_batch_and_its_size_do_not_matter(name):
    made, x = module_of(name), patches()
    torch.testing.assert_close(made(x)[1:], made(x[1:]))
    assert made(patches(1, 7, 2)).shape == (1, OUT, 7, 2)


@pytest.mark.parametrize("name", MODULES)
def test_saved_module_is_the_same_after_loading(name, tmp_path):
    made = module_of(name, mlp_ratio=2.0)
    path = modules.save(tmp_path / "m.safetensors", made, {"encoder": "dinov2_vitl14", "vocabulary": ["cat"]})
    torch.manual_seed(5)
    loaded, metadata = modules.load(path)
    assert torch.equal(loaded(patches()), made(patches()))
    assert not loaded.training and (loaded.width, loaded.out, loaded.params) == (WIDTH, OUT, made.params)
    assert (metadata["encoder"], metadata["vocabulary"]) == ("dinov2_vitl14", ["cat"])


def test_standardisation_is_saved_and_not_trained():
    made = module_of("linear")
    assert {"mean", "std"} <= made.state_dict().keys() and "mean" not in dict(made.named_parameters())


def test_file_that_is_no_module_is_refused(tmp_path):
    foreign = files.write_tensors(tmp_path / "features.safetensors", {"map": torch.ones(3)}, {"model": "clip"})
    with pytest.raises(DataError, match="features.safetensors: not an alignment module"):
        modules.load(foreign)
    with pytest.raises(DataError, match="none.safetensors: no trained module there; run notebook 04 or: fmbseg train"):
        modules.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(DataError, match="text.safetensors: no alignment module, or a damaged one; give the file"):
        modules.load(tmp_path / "text.safetensors")


@pytest.mark.parametrize("described", ["{}", '{"width": 4, "out": 2, "module": {"module": "linear"}}'])
def test_damaged_module_is_refused(tmp_path, described):
    path = files.write_tensors(tmp_path / "m.safetensors", {"map": torch.ones(3)}, {"fmbseg": described})
    with pytest.raises(DataError, match="m.safetensors"):
        modules.load(path)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ParameterError, match="heads"):
        module_of("transformer", heads=5)


@pytest.mark.parametrize("width, heads", [(1024, 16), (768, 12), (384, 6), (64, 1), (48, 1), (608, 8), (7, 1), (1280, 20)])
def test_heads_divide_the_width(width, heads):
    assert alignment._heads(width) == heads and width % heads == 0


def test_heads_may_be_given():
    x, made = patches(), module_of("transformer", heads=6)
    other = module_of("transformer", heads=1)
    other.load_state_dict(made.state_dict())
    assert not torch.allclose(made(x), other(x), atol=1e-4)
