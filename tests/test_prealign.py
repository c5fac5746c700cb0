"""Pre-alignment and anchor against direct solutions and literal transcriptions."""

import pytest
import torch
import torch.nn.functional as F

from fmbseg.params import AlignParams, ModuleParams
from fmbseg.runs import train
from fmbseg.stage2 import prealign, training
from fmbseg.stage2.prealign import NormalEquations

WIDTH, OUT, SIDE = 7, 4, 6


@pytest.fixture
def images():
    """Patches whose dimensions differ in scale and mean, and unit-norm targets, of five images."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.1, 1, 5, 2, 0.5, 3, 1])[:, None, None]
    found = []
    for _ in range(5):
        patches = torch.randn(WIDTH, SIDE, SIDE, generator=generator) * spread + spread
        found.append((patches, F.normalize(torch.randn(OUT, SIDE, SIDE, generator=generator) + patches[:OUT], dim=0)))
    return found


def flat(images):
    x = torch.cat([patches.flatten(1).T for patches, _ in images]).double()
    return x, torch.cat([target.flatten(1).T for _, target in images]).double()


def summed(images):
    equations = NormalEquations(WIDTH, OUT)
    for patches, target in images:
        equations.add(patches.flatten(1).T, target.flatten(1).T)
    return equations


@pytest.mark.parametrize("ridge", [0.0, 0.1, 3.0])
def test_closed_form_is_the_least_squares_solution(images, ridge):
    """Rows sqrt(n ridge) I under the standardised input make the penalty; the bias column has none."""
    x, target = flat(images)
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    penalty = torch.cat([(ridge * len(x)) ** 0.5 * torch.eye(WIDTH, dtype=torch.float64), torch.zeros(WIDTH, 1)], dim=1)
    left = torch.cat([F.pad(standard, (0, 1), value=1.0), penalty])
    expected = torch.linalg.lstsq(left, torch.cat([target, torch.zeros(WIDTH, OUT, dtype=torch.float64)])).solution
    weight, bias = summed(images).solve(ridge)  # of the input as it is
    assert torch.allclose(weight * x.std(0, correction=0), expected[:-1].T, atol=1e-6)
    assert torch.allclose(bias + weight @ x.mean(0), expected[-1], atol=1e-6)


def test_equations_do_not_depend_on_how_images_are_divided(images):
    whole = (
        torch.cat([patches.flatten(1) for patches, _ in images], dim=1)[:, None],
        torch.cat([t.flatten(1) for _, t in images], dim=1)[:, None],
    )
    one, many = summed([whole]), summed(images)
    assert torch.allclose(one.gram, many.gram) and torch.allclose(one.cross, many.cross) and one.count == many.count == 5 * SIDE**2


@pytest.mark.parametrize("kind", ["linear", "mlp", "transformer"])
def test_the_module_is_the_solution_and_leaves_with_the_stated_norm(images, kind):
    """Whatever comes before the last layer stays as it was; z is that of the plain least squares on what goes into it."""
    params = AlignParams(module=kind, heads=1, prealign_norm=30.0, prealign_ridge=0.2)
    fresh = training.new_module([p for p, _ in images], WIDTH, OUT, params).eval()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    made = prealign.prealign(fresh, images, params)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    changed = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"module.project.weight", "module.project.bias"}
    patches = torch.stack([patches for patches, _ in images])
    h = fresh.features(patches).flatten(0, 1).detach().double()
    equations = NormalEquations(h.shape[1], OUT)
    equations.add(h, flat(images)[1])
    weight, bias = equations.solve(0.2)
    z = made(patches).permute(0, 2, 3, 1).reshape(-1, OUT).double()
    assert torch.allclose(z, F.normalize(h @ weight.T + bias, dim=1), atol=1e-4)
    raw = made.module.project(made.features(patches))
    assert raw.pow(2).sum(-1).mean().sqrt().item() == pytest.approx(30, rel=1e-4)


def test_a_fresh_modules_norm_is_smaller_than_the_default(images):
    """Why ``prealign_norm`` is a parameter: the ridge's own scale is far from that of fresh weights."""
    equations = summed(images)
    assert equations.output_norm(*equations.solve(0.1)) < 1.0 + 1e-6


def test_dense_target_is_the_map_on_the_grid_at_unit_norm():
    dense = torch.tensor([[[3.0, 0.0]], [[4.0, 2.0]]])  # (D=2, 1, 2)
    target = prealign.dense_target(dense, (1, 2))
    assert torch.allclose(target, torch.tensor([[[0.6, 0.0]], [[0.8, 1.0]]]))
    assert torch.allclose(prealign.dense_target(torch.randn(3, 8, 8), (5, 4)).norm(dim=0), torch.ones(5, 4))


def test_anchor_is_its_transcription_in_value_and_gradient():
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    target = F.normalize(torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64), dim=1)
    total = 0
    for b in range(2):
        for i in range(2):
            for j in range(2):
                total = total + 1 - sum(z[b, d, i, j] * target[b, d, i, j] for d in range(3))
    (expected,) = torch.autograd.grad(total / 8, z)
    made = prealign.anchor(z, target)
    (gradient,) = torch.autograd.grad(made, z)
    assert made.item() == pytest.approx((total / 8).item()) and torch.allclose(gradient, expected)


def test_the_anchor_alone_keeps_an_anchored_module_at_its_target(images):
    """Training without a label and with the anchor is regression on the dense map: it lowers the anchor itself."""
    params = AlignParams(module="linear", dense_weight=5.0, learning_rate=0.5, weight_decay=0.0, epochs=20, images_per_batch=5)
    start = training.new_module([p for p, _ in images], WIDTH, OUT, ModuleParams(module="linear"))
    data = [(patches, torch.full((SIDE, SIDE), -1), target) for patches, target in images]
    patches, target = (torch.stack(part) for part in zip(*images))
    result = training.train(data, [0], F.normalize(torch.ones(1, OUT), dim=1), start, params)
    assert len(result.steps) == 20 and result.steps[0]["patches"] == 0
    assert prealign.anchor(result.alignment(patches), target) < 0.8 * prealign.anchor(start(patches), target)
    plain = training.train([item[:2] for item in data], [0], torch.ones(1, OUT), start, params.model_copy(update={"dense_weight": 0.0}))
    assert plain.steps == [] and all(torch.equal(a, b) for a, b in zip(plain.alignment.parameters(), start.parameters()))


@pytest.mark.parametrize("kind", ["linear", "mlp", "transformer"])
def test_the_average_is_that_of_the_last_layers_directions_and_of_the_layers_before(kind):
    """A start of small weights has its share all the same; 0 is the trained module, 1 has the start's outputs where M is linear."""
    params = ModuleParams(module=kind, heads=1)
    start, trained = (training.new_module([torch.randn(WIDTH, 3, 3)], WIDTH, OUT, params, seed) for seed in (0, 1))
    trained.mean.copy_(start.mean), trained.std.copy_(start.std)
    with torch.no_grad():
        start.module.project.weight.mul_(0.01), start.module.project.bias.mul_(0.01)
    before, after = start.state_dict(), trained.state_dict()
    made = prealign.average(start, trained, 0.3).state_dict()
    norms = [one["module.project.weight"].square().sum().sqrt() for one in (before, after)]
    for name in made:
        own = before[name] * (norms[1] / norms[0]) if "project" in name else before[name]
        assert torch.allclose(made[name], 0.3 * own + 0.7 * after[name], atol=1e-6), name
    assert all(torch.equal(value, after[name]) for name, value in prealign.average(start, trained, 0.0).state_dict().items())
    if kind == "linear":
        x = torch.randn(2, WIDTH, 3, 3)
        assert torch.allclose(prealign.average(start, trained, 1.0)(x), start(x), atol=1e-5)


def test_training_ends_with_the_average_of_start_and_end(toy, tmp_path, monkeypatch):
    """``start_share`` counts where there is a start to keep, and is in the key: another share is another module."""
    monkeypatch.setenv("FMBSEG_HOME", str(toy.home))
    params = toy.params.model_copy(update={"epochs": 1})
    alone, shared = (
        train.fit(toy.samples, toy.store, params.model_copy(update={"start_share": share}), tmp_path / "m.safetensors", toy.path).alignment
        for share in (0.0, 0.5)
    )
    expected = prealign.average(toy.result.alignment, alone, 0.5).state_dict()
    assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in shared.state_dict().items())
    assert not torch.equal(shared.module.project.weight, alone.module.project.weight)
