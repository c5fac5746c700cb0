"""Training: in memory, step by step as a hand does it; and over a collection, with what is kept and what is made anew."""

import dataclasses
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fmbseg import cli, files
from fmbseg.data.images import IGNORED
from fmbseg.errors import DataError, ParameterError, TrainingError
from fmbseg.models.encoders import load_encoder
from fmbseg.params import AlignParams, ModuleParams
from fmbseg.runs import cache, modules, train
from fmbseg.runs.cache import Models
from fmbseg.runs.label import LabelStore
from fmbseg.stage1.pseudo_labels import PseudoLabel
from fmbseg.stage2 import cleaning, losses, training
from fmbseg.stage2.alignment import Alignment
from fmbseg.stage2.training import patch_labels

# ---------------------------------------------------------------- labels of patches


@pytest.mark.parametrize("grid, size", [((3, 4), (12, 16)), ((3, 5), (11, 13)), ((7, 2), (5, 9)), ((1, 1), (6, 7)), ((4, 4), (10, 31))])
@pytest.mark.parametrize("least", [0.0, 0.3, 0.5, 1.0])
def test_patch_labels_by_brute_force(grid, size, least):
    labels = np.random.default_rng(1).choice([0, 1, 2, 1999, IGNORED], size, p=[0.2, 0.2, 0.15, 0.05, 0.4])
    labels[: size[0] // 2, : size[1] // 2] = IGNORED
    expected = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            inside = [
                int(labels[y, x])
                for y in range(size[0])
                for x in range(size[1])
                if (y * grid[0] // size[0], x * grid[1] // size[1]) == (i, j)
            ]
            counts = Counter(k for k in inside if k != IGNORED)
            enough = counts and sum(counts.values()) >= least * len(inside)
            expected.append(min(counts, key=lambda k: (-counts[k], k)) if enough else -1)
    made = patch_labels(labels, grid, least)
    assert made.dtype == torch.int64 and made.tolist() == np.array(expected).reshape(grid).tolist()


# ---------------------------------------------------------------- in memory

WIDTH, OUT, CLASSES = 6, 5, (2, 7, 9)


def collection(images=7, empty=(1, 4), seed=0):
    """Patches and labels of small images, some without any label."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for i in range(images):
        labels = torch.tensor([*CLASSES, -1])[torch.randint(4, (3, 4), generator=generator)]
        data.append((torch.randn(WIDTH, 3, 4, generator=generator), torch.full_like(labels, -1) if i in empty else labels))
    return data, F.normalize(torch.randn(3, OUT, generator=generator), dim=1)


def fresh(module="linear", seed=0):
    torch.manual_seed(seed)
    return Alignment(WIDTH, OUT, ModuleParams(module=module))


def cosine(rate, step, total):
    return rate * (1 + np.cos(np.pi * step / total)) / 2


def hand_sgd(p, state, rate, params):
    gradient = p.grad + params.weight_decay * p
    state["velocity"] = gradient if "velocity" not in state else params.momentum * state["velocity"] + gradient
    return p - rate * state["velocity"]


def hand_adamw(p, state, rate, params):
    n = state["n"] = state.get("n", 0) + 1
    state["mean"] = 0.9 * state.get("mean", 0) + 0.1 * p.grad
    state["square"] = 0.999 * state.get("square", 0) + 0.001 * p.grad**2
    step = (state["mean"] / (1 - 0.9**n)) / ((state["square"] / (1 - 0.999**n)).sqrt() + 1e-8)
    return p - rate * params.weight_decay * p - rate * step


@pytest.mark.parametrize("by_hand, optimiser", [(hand_sgd, "sgd"), (hand_adamw, "adamw")])
@pytest.mark.parametrize("images_per_batch", [1, 3])
def test_training_is_the_steps_of_a_hand(by_hand, optimiser, images_per_batch):
    """Momentum, weight decay and the cosine over ALL batches, also those without a labelled patch, which are no step."""
    data, texts = collection()
    values = {"learning_rate": 0.3, "momentum": 0.8, "weight_decay": 0.05, "epochs": 3, "temperature": 0.4, "module": "linear"}
    params = AlignParams(optimiser=optimiser, images_per_batch=images_per_batch, **values)
    initial, rows = fresh(), []
    made = training.train(data, CLASSES, texts, initial, params, seed=5, on_step=rows.append)

    module, states, number, expected = fresh(), {}, 0, []
    loader = training.batches(data, images_per_batch, seed=5)
    total = 3 * len(loader)
    for _ in range(3):
        for patches, labels in loader:
            z = module(patches).permute(0, 2, 3, 1).reshape(-1, OUT)
            y = torch.tensor([CLASSES.index(k) if k >= 0 else -1 for k in labels.flatten().tolist()])
            if (y >= 0).any():
                loss = losses.tsupcon(z[y >= 0], y[y >= 0], texts, 0.4)
                module.zero_grad()
                loss.backward()
                rate = cosine(0.3, number, total)
                expected.append((rate, loss.item(), int((y >= 0).sum())))
                with torch.no_grad():
                    for name, p in module.named_parameters():
                        p.copy_(by_hand(p, states.setdefault(name, {}), rate, params))
            number += 1
    assert number == total == len(rows) and (images_per_batch > 1 or rows.count(None) == 6)
    assert [r for r in rows if r] == made.steps and [s["step"] for s in made.steps] == list(range(len(expected)))
    for step, (rate, loss, count) in zip(made.steps, expected, strict=True):
        assert step["learning_rate"] == pytest.approx(rate, abs=1e-9) and step["loss"] == pytest.approx(loss, rel=1e-4)
        assert step["patches"] == count
    for name, p in module.named_parameters():
        torch.testing.assert_close(made.alignment.get_parameter(name), p, atol=1e-5, rtol=1e-4)
    assert made.classes == CLASSES and torch.equal(initial.module.project.weight, fresh().module.project.weight)


def test_the_rate_ends_at_zero_after_batches_without_a_label():
    data, texts = collection(images=6, empty=(0, 2, 3))
    params = AlignParams(learning_rate=0.2, epochs=4, images_per_batch=1, module="linear")
    rows = []
    training.train(data, CLASSES, texts, fresh(), params, on_step=rows.append)
    rates = [(i, row["learning_rate"]) for i, row in enumerate(rows) if row]
    assert len(rows) == 24 and len(rates) == 12
    np.testing.assert_allclose([rate for _, rate in rates], [cosine(0.2, i, 24) for i, _ in rates], atol=1e-9)


@pytest.mark.filterwarnings("error")
def test_the_rates_are_those_of_torchs_cosine_also_where_the_first_batch_has_no_label():
    data, texts = collection(images=5, empty=range(1, 5))
    params = AlignParams(learning_rate=0.3, epochs=3, images_per_batch=1, module="linear")
    rows = []
    training.train(data, CLASSES, texts, fresh(), params, seed=1, on_step=rows.append)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.3)
    schedule, rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 15), []
    for _ in rows:
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert rows[0] is None and len(rows) == 15 and sum(map(bool, rows)) == 3
    np.testing.assert_allclose([row["learning_rate"] for row in rows if row], [r for r, row in zip(rates, rows) if row], rtol=1e-12)


# ---------------------------------------------------------------- stopped and gone on with


class Counted(list):
    """Items that remember which were read."""

    def __init__(self, items):
        super().__init__(items)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("optimiser, module", [("sgd", "transformer"), ("adamw", "linear")])
def test_from_the_state_after_any_batch_the_same_module_comes_and_nothing_is_read_again(optimiser, module):
    data, texts = collection()
    params = AlignParams(module=module, optimiser=optimiser, epochs=3, images_per_batch=2, learning_rate=0.1)
    states = []
    whole = training.train(data, CLASSES, texts, fresh(module), params, 3, on_state=lambda take: states.append(take()))
    assert [state.done for state in states] == list(range(1, 12))
    for state in states:
        counted = Counted(data)
        made = training.train(counted, CLASSES, texts, fresh(module, seed=9), params, 3, state=state)
        assert same(made.alignment.state_dict(), whole.alignment.state_dict()) and made.steps == whole.steps
        epochs, batches = divmod(state.done, 4)
        assert len(counted.read) == 3 * 7 - 7 * epochs - 2 * batches


def test_a_state_is_of_its_moment():
    """What is computed later does not reach into it."""
    data, texts = collection()
    states = []
    params = AlignParams(module="linear", epochs=2)
    training.train(data, CLASSES, texts, fresh(), params, on_state=lambda take: states.append(take()))
    assert not torch.equal(states[0].weights["module.project.weight"], states[1].weights["module.project.weight"])
    assert not torch.equal(states[0].optimiser["0.momentum_buffer"], states[1].optimiser["0.momentum_buffer"])
    assert [len(state.steps) for state in states] == [1, 2, 3] and states[0].seconds < states[2].seconds


# ---------------------------------------------------------------- training that cannot be used


def test_a_loss_that_is_not_finite_stops_before_its_step():
    data, texts = collection()
    data[2][0][0, 0, 0] = np.inf  # one value of one image
    states, params = [], AlignParams(module="linear", epochs=2, images_per_batch=1)
    order = [x for x, *_ in training.batches(data, 1, seed=4)]
    at = next(i for i, x in enumerate(order) if not x.isfinite().all())
    labelled = sum(int((y >= 0).any()) for _, y in list(training.batches(data, 1, seed=4))[:at])
    with pytest.raises(TrainingError, match=f"training stopped: the loss is nan at step {labelled}; lower learning_rate, or raise temp"):
        training.train(data, CLASSES, texts, fresh(), params, 4, on_state=lambda take: states.append(take))
    last = states[-1]()
    assert last.done == at and all(tensor.isfinite().all() for tensor in last.weights.values())


def test_a_gradient_that_is_not_finite_stops_before_its_step(monkeypatch):
    data, texts = collection(empty=())
    initial = fresh()
    root = lambda z, y, texts: (z.sum() * 0).sqrt() + 1.0  # noqa: E731  finite, and its derivative is not
    monkeypatch.setattr(training, "loss_function", lambda params: root)
    states = []
    with pytest.raises(TrainingError, match="the gradient is not finite at step 0; lower learning_rate"):
        training.train(data, CLASSES, texts, initial, AlignParams(module="linear"), on_state=lambda take: states.append(take))
    assert states == []


def test_weights_that_are_not_finite_are_no_module_and_no_state():
    data, texts = collection(empty=())
    params = AlignParams(module="linear", epochs=1, images_per_batch=7, learning_rate=1e38, weight_decay=1e38)
    with pytest.raises(TrainingError, match="weights are not finite after 1 steps"):
        training.train(data, CLASSES, texts, fresh(), params)
    params = params.model_copy(update={"images_per_batch": 4})
    with pytest.raises(TrainingError, match="weights are not finite after 1 steps"):
        training.train(data, CLASSES, texts, fresh(), params, on_state=lambda take: take())


def test_one_direction_for_every_patch_is_no_module():
    data, texts = collection(empty=())
    dead = fresh()
    torch.nn.init.zeros_(dead.module.project.weight)
    params = AlignParams(module="linear", learning_rate=1e-9)
    with pytest.raises(TrainingError, match="every patch of the last 10 batches comes out as one and the same direction; lower"):
        training.train(data, CLASSES, texts, dead, params)
    training.train(data, CLASSES, texts, dead, params.model_copy(update={"learning_rate": 0.5}))  # it learns to tell them apart


def test_one_class_for_every_patch_is_no_module_unless_the_labels_hardly_hold_another():
    """Patches differ a little around the first text."""
    data, texts = collection(empty=())
    module = fresh()
    with torch.no_grad():
        module.module.project.weight.mul_(1e-2)
        module.module.project.bias.copy_(texts[0])
    params = AlignParams(module="linear", learning_rate=1e-9, images_per_batch=2, epochs=1)
    with pytest.raises(TrainingError, match="every patch of the last 4 batches comes out as one and the same class; lower"):
        training.train(data, CLASSES, texts, module, params)
    rare = [(x, torch.where(y < 0, y, CLASSES[0])) for x, y in data]
    rare[0][1][0, 0] = CLASSES[1]
    training.train(rare, CLASSES, texts, module, params)
    training.train(data, CLASSES, texts, module, params.model_copy(update={"learning_rate": 0.5, "epochs": 20}))


@pytest.mark.parametrize("module", ["linear", "mlp", "transformer"])
@pytest.mark.parametrize("loss", ["tsupcon", "prototype", "supcon"])
def test_every_loss_and_module_is_the_one_that_is_set(module, loss):
    """The first step's loss is the named one of the fresh module's patches, with its temperature; and the loss falls."""
    data, texts = collection()
    for x, labels in data:  # the classes differ
        x[: len(CLASSES)] += 3 * torch.stack([labels == k for k in CLASSES])
    params = AlignParams(module=module, loss=loss, temperature=0.3, epochs=20, images_per_batch=7, learning_rate=0.05)
    made = training.train(data, CLASSES, texts, fresh(module), params)
    patches, labels = next(iter(training.batches(data, 7, seed=0)))
    with torch.no_grad():
        z = fresh(module)(patches).permute(0, 2, 3, 1).reshape(-1, OUT)
    y = training.rows_of(CLASSES)[labels.flatten()]
    expected = getattr(losses, loss)(z[y >= 0], y[y >= 0], texts, 0.3)
    assert made.steps[0]["loss"] == pytest.approx(expected.item(), rel=1e-4) and made.steps[-1]["loss"] < expected


def test_the_weights_of_the_two_means_are_used():
    z, labels, texts = F.normalize(torch.randn(8, OUT), dim=1), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0]), collection()[1]
    params = AlignParams(text_weight=0.7, image_weight=0.2, temperature=0.5)
    expected = losses.tsupcon(z, labels, texts, 0.5, 0.7, 0.2)
    torch.testing.assert_close(training.loss_function(params)(z, labels, texts), expected)
    assert not torch.isclose(training.loss_function(AlignParams(temperature=0.5))(z, labels, texts), expected)


def test_the_same_seed_gives_the_same_module_and_another_seed_another():
    data, texts = collection()
    params = AlignParams(module="mlp", epochs=2, images_per_batch=2)
    weights = [training.train(data, CLASSES, texts, fresh("mlp"), params, seed).alignment.module.project.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("loss", ["tsupcon", "prototype", "supcon"])
def test_unlabelled_patches_do_not_enter_the_loss(loss):
    """With a module that sees each patch by itself, other features of unlabelled patches change nothing."""
    data, texts = collection()
    params = AlignParams(module="linear", loss=loss, epochs=2)

    def weight(changed):
        moved = [(torch.where((labels < 0) if changed == "unlabelled" else (labels >= 0), x + 3, x), labels) for x, labels in data]
        return training.train(data if not changed else moved, CLASSES, texts, fresh(), params).alignment.module.project.weight

    plain = weight("")
    assert torch.equal(weight("unlabelled"), plain) and not torch.allclose(weight("labelled"), plain)


def test_a_fresh_module_standardises_by_its_patches():
    patches = [3 * torch.randn(WIDTH, 3, 4) + torch.arange(WIDTH)[:, None, None] for _ in range(5)]
    patches[0][5], together = 7.0, None
    for one in patches:
        one[5] = 7.0  # a channel that does not vary
    made = training.new_module((p.half() for p in patches), WIDTH, OUT, AlignParams(module="linear"))
    together = torch.cat([p.half().float().flatten(1) for p in patches], dim=1)
    torch.testing.assert_close(made.mean, together.mean(dim=1))
    torch.testing.assert_close(made.std, together.std(dim=1).clamp(min=1e-3))
    assert made.std[5] == torch.tensor(1e-3) and made.params == ModuleParams(module="linear")


# ---------------------------------------------------------------- over a collection


@pytest.fixture
def home(toy, monkeypatch):
    """The home in which the toy module was trained: encoder patches of the drawn images are there."""
    monkeypatch.setenv("FMBSEG_HOME", str(toy.home))
    return toy.home


@pytest.fixture
def quick(toy):
    return toy.params.model_copy(update={"epochs": 1, "module": "linear"})


@pytest.fixture
def own_store(toy, tmp_path, home):
    """Labels that a test may change."""
    store = LabelStore(tmp_path / "labels", toy.drawn.space, toy.params)
    for sample in toy.samples:
        store.write(sample, PseudoLabel(sample.truth(), [], [], []))
    return store


def test_patches_and_labels_of_a_collection(toy, home):
    data = train.PatchDataset(toy.samples, toy.store, toy.params)
    patches, labels = data[2]
    assert torch.equal(patches, cache.encoder_patches(toy.samples[2].image, Models.of(toy.params), toy.params))
    assert labels.tolist() == patch_labels(toy.store.read(toy.samples[2]), (8, 8), toy.params.min_labelled).tolist()
    assert labels[0].tolist() == [-1] * 8 and (labels[7] == 1).all() and len(data) == 6 and data.classes() == (0, 1, 2, 3)
    assert data[None][0].shape == patches.shape and (data[None][1] == -1).all()
    strict = toy.params.model_copy(update={"clean": "drop", "clean_margin": -1.0})  # all of classes with a prototype
    cleaned = train.PatchDataset(toy.samples, toy.store, strict).labels
    expected = cleaning.clean_labels(map(data.patches, range(6)), data.labels, strict)
    assert all(torch.equal(one, other) for one, other in zip(cleaned, expected)) and any(
        (c != d).any() for c, d in zip(cleaned, data.labels)
    )


def test_a_collection_is_trained_until_it_fits_on_standardised_patches(toy, home):
    made = toy.result
    assert np.mean([s["loss"] for s in made.steps[-4:]]) < np.mean([s["loss"] for s in made.steps[:4]]) - 0.3
    assert len(made.steps) == 40 * 2 and made.classes == (0, 1, 2, 3)
    patches = [cache.encoder_patches(s.image, Models.of(toy.params), toy.params).float().flatten(1) for s in toy.samples]
    torch.testing.assert_close(made.alignment.mean, torch.cat(patches, dim=1).mean(dim=1), atol=1e-4, rtol=1e-4)


def test_the_same_seed_gives_the_same_file_whatever_was_drawn_before(toy, quick, home, tmp_path):
    made = []
    for i, seed in enumerate((1, 1, 2)):
        torch.rand(i + 3)  # the seed is the run's, not the process's
        train.fit(toy.samples, toy.store, quick.model_copy(update={"seed": seed}), tmp_path / f"{i}.safetensors")
        made.append(modules.load(tmp_path / f"{i}.safetensors")[0].state_dict())
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())
    assert not torch.equal(made[0]["module.project.weight"], made[2]["module.project.weight"])
    torch.manual_seed(1)  # and the fresh weights are those of the seed
    expected = Alignment(toy.result.alignment.width, toy.result.alignment.out, ModuleParams(module="linear"))
    slow = quick.model_copy(update={"seed": 1, "learning_rate": 1e-12})
    begun = train.fit(toy.samples, toy.store, slow, tmp_path / "slow.safetensors").alignment
    torch.testing.assert_close(begun.module.project.weight, expected.module.project.weight)


def test_a_module_is_read_where_nothing_changed_and_trained_anew_where_anything_did(toy, quick, own_store, tmp_path, monkeypatch, capsys):
    path = tmp_path / "module.safetensors"
    first = train.fit(toy.samples, own_store, quick, path)
    whole, trained = path.read_bytes(), []
    original = training.train
    monkeypatch.setattr(training, "train", lambda *given, **named: trained.append(1) or original(*given, **named))

    def fit(samples=toy.samples, initial=None, **changed):
        trained.clear()
        made = train.fit(samples, own_store, quick.model_copy(update=changed), path, initial)
        again, path_now = bool(trained), path.read_bytes()
        path.write_bytes(whole)
        return again, made, path_now

    again, read, _ = fit()
    assert not again and "trained before" in capsys.readouterr().out and read.steps == first.steps and read.classes == first.classes
    for changed in ({"learning_rate": 0.1}, {"seed": 9}, {"weight_decay": 0.5}, {"temperature": 0.5}, {"templates": "seven"}):
        assert fit(**changed)[0], changed
    assert fit(samples=toy.samples[:4])[0] and fit(initial=toy.path)[0]
    assert not fit(limit=3, window=64, crop_batch=1, residual=True)[0]  # they have no part in the training

    for damaged in (b"", whole[: len(whole) // 2], b"no module at all"):
        path.write_bytes(damaged)
        again, made, now = fit()
        assert again and modules.load(path)[0].module.project.weight.equal(first.alignment.module.project.weight), damaged[:9]
    files.write_tensors(path, {"a": torch.ones(2)})  # a foreign file
    assert fit()[0]

    map_of = own_store.path(toy.samples[0])  # corrected by hand
    labels = np.array(Image.open(map_of))
    corrected = Image.fromarray(np.where(labels == 0, 1, labels).astype(np.uint8), mode="P")
    corrected.putpalette(Image.open(map_of).getpalette())
    corrected.save(map_of)
    again, made, _ = fit()
    assert again and not torch.equal(made.alignment.module.project.weight, first.alignment.module.project.weight)


def test_a_module_says_what_made_it_and_its_record_what_did_the_work(toy, quick, home, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU that was not used
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    path = tmp_path / "module.safetensors"
    train.train(toy.samples, toy.store, quick, path)
    described, record = modules.load(path)[1], files.read_json(tmp_path / "module.json")
    wanted = {"loss", "temperature", "learning_rate", "epochs", "image_size", "precision", "vocabulary", "seed", "module"}
    assert wanted <= described["parameters"].keys() and described["parameters"]["epochs"] == 1
    assert described["weights"] == {"clip": quick.clip, "sam": quick.sam, "encoder": load_encoder(quick.encoder).key}
    assert described["classes"] == ["sky", "grass", "sun", "house"] and described["images"] == record["images"] == 6
    assert "CPU" in record["hardware"] and record["weights"]["module"] == files.file_sha256(path)
    assert len(described["curve"]["loss"]) == record["protocol"]["steps"] == 2
    assert train.module_path(quick) == home / "modules/smoke/alignment.safetensors"


def test_an_anchored_module_depends_on_the_dense_map(toy, quick, home, tmp_path):
    """CLIP's features, and so their parameters, are an input of the training where the anchor has a weight."""
    made = []
    for residual in (False, True):
        params = quick.model_copy(update={"dense_weight": 0.5, "residual": residual})
        made.append(train.fit(toy.samples, toy.store, params, tmp_path / "m.safetensors").alignment.module.project.weight)
    assert not torch.equal(*made)


@pytest.mark.parametrize("pixels", [0, 1])
def test_nothing_labelled_is_refused(toy, quick, home, tmp_path, pixels):
    """Neither with no labelled pixel nor with too few for one patch; and no label map at all is another sentence."""
    store, samples = LabelStore(tmp_path / "labels", toy.drawn.space, toy.params), toy.samples[:2]
    with pytest.raises(DataError, match="no image has a pseudo label"):
        train.fit(samples, store, quick, tmp_path / "m.safetensors")
    for sample in samples:
        labels = np.full_like(sample.truth(), IGNORED)
        labels[5, 5 : 5 + pixels] = 1
        store.write(sample, PseudoLabel(labels, [], [], []))
    with pytest.raises(DataError, match="no patch is labelled"):
        train.fit(samples, store, quick, tmp_path / "m.safetensors")


def test_an_image_that_cannot_be_encoded_is_left_out(toy, quick, own_store, tmp_path, monkeypatch):
    broken = dataclasses.replace(toy.samples[0], name="broken", image=tmp_path / "broken.png")
    broken.image.write_bytes(b"no image")
    own_store.write(broken, PseudoLabel(toy.samples[0].truth(), [], [], []))
    train.fit([broken, *toy.samples], own_store, quick, tmp_path / "m.safetensors")
    assert modules.load(tmp_path / "m.safetensors")[1]["images"] == 6


def test_the_same_inputs_give_the_same_bytes(toy, quick, home, tmp_path):
    for name in ("one", "other"):
        train.fit(toy.samples, toy.store, quick, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "other.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "one.safetensors", "other.json", "other.safetensors"]


def test_a_module_read_again_keeps_the_seconds_of_its_training(toy, quick, home, tmp_path):
    path = tmp_path / "m.safetensors"
    made = train.fit(toy.samples, toy.store, quick, path)
    assert (
        train.fit(toy.samples, toy.store, quick, path).seconds == round(made.seconds, 1) == files.read_json(tmp_path / "m.json")["seconds"]
    )
    (tmp_path / "m.json").unlink()
    assert modules.seconds(path) == 0.0


def test_a_training_that_fails_leaves_the_module_that_is_there_and_its_last_good_state(toy, quick, home, tmp_path):
    path = tmp_path / "m.safetensors"
    train.fit(toy.samples, toy.store, quick, path)
    before = path.read_bytes()
    wild = quick.model_copy(update={"learning_rate": 1e38, "epochs": 3})
    for _ in range(2):
        with pytest.raises(TrainingError, match="training stopped: .*lower learning_rate"):
            train.fit(toy.samples, toy.store, wild, path)
        assert path.read_bytes() == before
    calm = wild.model_copy(update={"learning_rate": 0.01})
    train.fit(toy.samples, toy.store, calm, path)
    assert path.read_bytes() != before and not modules.checkpoint(path).exists()


def test_the_command_of_a_training_that_fails_says_one_sentence(home, tmp_path, capsys):
    command = ["train", "--profile", "smoke", "--limit", "2", "--set", "learning_rate=1e38", "--set", "epochs=3"]
    assert cli.main([*command, "--set", "reference_images=0", "--out", str(tmp_path / "m.safetensors")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("fmbseg: training stopped: ") and "lower learning_rate" in said
    assert [path.name for path in tmp_path.iterdir()] == ["m.checkpoint.safetensors"]  # of the step before


def test_a_module_of_one_direction_is_never_written_however_often_it_is_tried(toy, quick, home, tmp_path):
    start = Alignment(toy.result.alignment.width, toy.result.alignment.out, ModuleParams(module="linear"))
    start.std.fill_(1e12)
    modules.save(tmp_path / "dead.safetensors", start, {})
    params, path = quick.model_copy(update={"checkpoint_seconds": 0.0}), tmp_path / "m.safetensors"
    for _ in range(3):
        with pytest.raises(TrainingError, match="one and the same direction"):
            train.fit(toy.samples, toy.store, params, path, tmp_path / "dead.safetensors")
        assert not path.exists()


def test_the_module_in_use_is_kept_where_another_takes_its_place(toy, quick, home, tmp_path, capsys):
    params = quick.model_copy(update={"profile": "other", "results_dir": str(tmp_path)})
    path = train.module_path(params)
    previous = path.with_name("alignment.previous.safetensors")
    train.train(toy.samples, toy.store, params)
    first = path.read_bytes()
    train.train(toy.samples, toy.store, params)
    path.write_bytes(first[:100])
    train.train(toy.samples, toy.store, params)
    assert path.read_bytes() == first and not previous.exists()  # the same, read or made anew; a damaged one is not kept
    capsys.readouterr()
    train.train(toy.samples, toy.store, params.model_copy(update={"seed": 5}))
    assert previous.read_bytes() == first != path.read_bytes()
    assert capsys.readouterr().out == f"the module that was {path} is kept as {previous}\n"
    modules.load(previous)


def test_the_curve_in_a_modules_file_is_bounded_and_whole_beside_it(toy, quick, home, tmp_path, monkeypatch):
    params, path = quick.model_copy(update={"epochs": 6}), tmp_path / "m.safetensors"
    monkeypatch.setattr(train, "CURVE_ROWS", 5)
    made = train.fit(toy.samples, toy.store, params, path)
    assert modules.load(path)[1]["curve"]["step"] == [0, 2, 5, 8, 11] and len(made.steps) == 12
    whole = pd.read_csv(tmp_path / "m.curve.csv")
    assert whole.to_dict("records") == made.steps
    assert files.read_json(tmp_path / "m.json")["protocol"]["steps"] == 12
    assert train.fit(toy.samples, toy.store, params, path).steps == made.steps
    for other in (b"", b"step,loss\n0,1.5\n"):  # damaged, or another module's
        (tmp_path / "m.curve.csv").write_bytes(other)
        again = train.fit(toy.samples, toy.store, params, path)
        assert [row["step"] for row in again.steps] == [0, 2, 5, 8, 11] and again.steps[-1] == made.steps[-1]


def test_weights_that_are_not_finite_are_refused_where_they_are_read(toy, home, tmp_path):
    module = modules.load(toy.path)[0]
    module.module.project.bias.data[0] = float("nan")
    path = modules.save(tmp_path / "m.safetensors", module, {})
    with pytest.raises(DataError, match="m.safetensors: its weights are not finite numbers; train it again with a lower learning_rate"):
        modules.load(path)


def test_deterministic_is_said_to_torch_on_cuda_alone(quick, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    asked = quick.model_copy(update={"deterministic": True})
    with train.deterministic(asked), train.deterministic(quick.model_copy(update={"device": "cuda"})):
        assert not torch.are_deterministic_algorithms_enabled()
    with (
        pytest.raises(ParameterError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8"),
        train.deterministic(asked.model_copy(update={"device": "cuda:1"})),
    ):
        pass
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with train.deterministic(asked.model_copy(update={"device": "cuda"})):
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cuda.flash_sdp_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
