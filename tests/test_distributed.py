"""Two real processes over gloo against one: the same loss, the same gradient, the same module."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch import nn
from torch.utils.data import BatchSampler, Dataset, SequentialSampler

from fmbseg import files
from fmbseg.errors import ParameterError
from fmbseg.params import AlignParams, ModuleParams
from fmbseg.runs import modules, parallel, train
from fmbseg.stage2 import distributed, losses, training
from fmbseg.stage2.alignment import Alignment

LOSSES = ("tsupcon", "prototype", "supcon")
FOUR = torch.tensor([0, 1, -1, 2, 0, -1]), torch.tensor([1, -1, -1, -1, -1, 1])  # labels of the two processes' patches
NONE = torch.tensor([0, 1, -1, 2, 0, -1]), torch.full((6,), -1)


def small():
    """A linear module, the two processes' patches and the texts, in double precision."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(5, 4, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(torch.randn(4, 5, generator=generator, dtype=torch.float64))
        module.bias.zero_()
    x = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    return module, x, nn.functional.normalize(torch.randn(3, 4, generator=generator, dtype=torch.float64), dim=1)


def loss_of(name):
    return lambda z, y, texts: getattr(losses, name)(z, y, texts, 0.5)


def embed(module, x):
    return nn.functional.normalize(module(x), dim=-1)


def of_toy(name, labels, across):
    """(gradient, loss, patches) as a process of the group has them after DDP's mean."""
    module, x, texts = small()
    network, rank = distributed.parallel(module), distributed.rank()
    loss, value, count = distributed.batch_loss(loss_of(name), embed(network, x[rank]), labels[rank], texts, across)
    if count:
        loss.backward()
    return module.weight.grad, value, count


class Images(Dataset):
    """Six images of 3 x 4 patches, two of them unlabelled."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.patches = torch.randn(6, 8, 3, 4, generator=generator)
        self.labels = torch.randint(-1, 3, (6, 3, 4), generator=generator)
        self.labels[[1, 4]] = -1

    def __len__(self):
        return 6

    def __getitem__(self, index):
        labels = self.labels[index or 0]
        return self.patches[index or 0], torch.full_like(labels, -1) if index is None else labels


def arguments(**values):
    """What ``training.train`` takes."""
    torch.manual_seed(0)
    texts = nn.functional.normalize(torch.randn(3, 5), dim=1)
    values = {"module": "mlp", "epochs": 2, "temperature": 0.2, "learning_rate": 0.2} | values
    initial = Alignment(8, 5, ModuleParams(module=values["module"]))
    return Images(), (0, 1, 2), texts, initial, AlignParams(**values), 3


def run_process(rank, rendezvous, out, trainings):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    made = {(n, a, k): of_toy(n, labels, a) for n in LOSSES for a in (True, False) for k, labels in enumerate((FOUR, NONE))}
    made["nothing labelled"] = of_toy("tsupcon", (NONE[1], NONE[1]), True)
    made["share"] = parallel.split_by_rank("abcde")
    for name, given in trainings.items():
        result = training.train(*given)
        modules.save(out / f"{name}-{rank}", result.alignment, {})
        made[name] = result.steps
    torch.save(made, out / f"made-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the two processes computed, what one computes alone, and the folder with the modules."""
    folder = tmp_path_factory.mktemp("two")
    trainings = {f"five-{n}": arguments(loss=n) for n in LOSSES}
    trainings |= {"again": trainings["five-tsupcon"], "one": arguments(images_per_batch=1), "device": arguments(negatives="device")}
    trainings |= {f"parts-{m}": arguments(module=m, images_per_pass=1) for m in ("linear", "mlp", "transformer")}
    torch.multiprocessing.spawn(run_process, (folder / "rendezvous", folder, trainings), nprocs=2)
    alone = {name: training.train(*given) for name, given in trainings.items()}
    return [torch.load(folder / f"made-{rank}") for rank in (0, 1)], alone, folder


@pytest.mark.parametrize("labels", (0, 1))
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_one_process(name, labels, both):
    """Different numbers of labelled patches a process, none in one of them."""
    module, x, texts = small()
    y = torch.cat((FOUR, NONE)[labels])
    loss = loss_of(name)(embed(module, x.flatten(0, 1))[y >= 0], y[y >= 0], texts)
    loss.backward()
    for made in both[0]:
        gradient, value, count = made[name, True, labels]
        torch.testing.assert_close(gradient, module.weight.grad, rtol=1e-12, atol=1e-12)
        assert value == pytest.approx(loss.item(), abs=1e-12) and count == int((y >= 0).sum())


@pytest.mark.parametrize("labels", (0, 1))
@pytest.mark.parametrize("name", LOSSES)
def test_without_exchange_it_is_the_mean_of_the_processes_losses(name, labels, both):
    module, x, texts = small()
    parts = [(part, y) for part, y in zip(x, (FOUR, NONE)[labels]) if (y >= 0).any()]
    loss = sum(loss_of(name)(embed(module, part)[y >= 0], y[y >= 0], texts) for part, y in parts) / len(parts)
    loss.backward()
    for made in both[0]:
        gradient, value, _ = made[name, False, labels]
        torch.testing.assert_close(gradient, module.weight.grad, rtol=1e-12, atol=1e-12)
        assert value == pytest.approx(loss.item(), abs=1e-12)


def test_a_batch_without_a_label_is_no_step(both):
    for made in both[0]:
        assert made["nothing labelled"] == (None, 0.0, 0)


@pytest.mark.parametrize("name", [*(f"five-{n}" for n in LOSSES), "one", *(f"parts-{m}" for m in ("linear", "mlp", "transformer"))])
def test_training_in_two_processes_is_training_in_one(name, both):
    """Six images, five a batch and one a batch: the last batch is smaller, and a process gets no image of some."""
    made, alone, home = both
    expected = alone[name]
    for rank in (0, 1):
        found, _ = modules.load(home / f"{name}-{rank}")
        for key, value in expected.alignment.state_dict().items():
            torch.testing.assert_close(found.state_dict()[key], value, rtol=1e-5, atol=1e-6)
        assert len(made[rank][name]) == len(expected.steps) > 2
        for step, other in zip(made[rank][name], expected.steps):
            assert step == pytest.approx(other, abs=1e-5) and step["patches"] == other["patches"]


@pytest.mark.parametrize("module", ("linear", "mlp", "transformer"))
def test_a_batch_in_parts_has_the_gradient_of_the_whole(module):
    data, _, texts, initial, _, _ = arguments(module=module)
    initial, patches, labels = initial.double(), data.patches[:5].double(), data.labels[:5].flatten()
    made, sizes = {}, []
    initial.module.register_forward_hook(lambda _, given, z: sizes.append(len(z)))
    for at_once in (None, 2, 5):
        z = initial(patches, at_once).permute(0, 2, 3, 1).flatten(0, 2)
        losses.tsupcon(z[labels >= 0], labels[labels >= 0], texts.double(), 0.2).backward()
        made[at_once] = [z, *(p.grad for p in initial.parameters())]
        initial.zero_grad()
    assert sorted(sizes) == [1, 1, 2, 2, 2, 2, 5, 5]  # each part twice, and the whole once
    for one, whole in zip(made[2], made[None], strict=True):
        torch.testing.assert_close(one, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("module", ("linear", "mlp", "transformer"))
def test_training_in_parts_is_training_in_one_pass(module):
    given, sizes = arguments(module=module, images_per_pass=2), []
    given[3].module.register_forward_hook(lambda _, given, z: sizes.append(len(z)))
    whole, parts = training.train(*arguments(module=module)), training.train(*given)
    assert len(parts.steps) == 4 and max(sizes) == 2
    for key, value in whole.alignment.state_dict().items():
        torch.testing.assert_close(parts.alignment.state_dict()[key], value, rtol=1e-6, atol=1e-6)


def test_the_same_seed_gives_the_same_file_in_every_process(both):
    _, _, home = both
    files = {(home / f"{name}-{rank}").read_bytes() for name in ("five-tsupcon", "again") for rank in (0, 1)}
    assert len(files) == 1


def test_own_negatives_give_another_module(both):
    made, alone, home = both
    assert modules.load(home / "device-0")[0].module.project.weight.equal(modules.load(home / "device-1")[0].module.project.weight)
    assert made[0]["device"][0]["loss"] != pytest.approx(alone["device"].steps[0]["loss"], abs=1e-4)
    assert alone["device"].steps == alone["five-tsupcon"].steps  # it means nothing to one process


def test_items_are_shared_out(both):
    assert [made["share"] for made in both[0]] == [["a", "c", "e"], ["b", "d"]] and parallel.split_by_rank("abc") == ["a", "b", "c"]


@pytest.mark.parametrize("processes", (1, 2, 3, 4))
def test_the_parts_of_a_batch_in_order_are_the_batch(processes, monkeypatch):
    batches = list(BatchSampler(SequentialSampler(range(12)), 5, drop_last=False))
    monkeypatch.setattr(distributed, "size", lambda: processes)
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(list(distributed.RankBatchSampler(batches)))
    for batch, *of_ranks in zip(batches, *parts, strict=True):
        assert [i for part in of_ranks for i in part if i is not None] == batch and len({len(p) for p in of_ranks}) == 1
    assert len(distributed.RankBatchSampler(batches)) == 3


@pytest.mark.parametrize(
    ("device", "part"), [("cuda:1", "give device=cuda"), ("mps", "one GPU each"), ("cuda", "process 9 of this machine has no GPU")]
)
def test_devices_of_several_processes(device, part, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "9")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ParameterError, match=part), parallel.group(device):
        pass


def test_one_process_is_no_group():
    with parallel.group("cuda:1") as device:
        assert device == "cuda:1" and not dist.is_initialized() and distributed.size() == 1
    module = nn.Linear(2, 2)
    assert distributed.parallel(module) is module


def test_another_process_than_the_first_writes_nothing(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("FMBSEG_HOME", str(toy.home))
    monkeypatch.setattr(training, "train", lambda *_, **__: toy.result)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    params = toy.params.model_copy(update={"results_dir": str(tmp_path / "results")})
    assert train.train(toy.samples, toy.store, params, tmp_path / "module.safetensors") is toy.result
    assert not (tmp_path / "module.safetensors").exists() and not (tmp_path / "results").exists()


def test_torchrun_writes_one_module_and_one_record(tmp_path):
    """The command of the README: both processes label and encode their share; the first alone prints and writes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FMBSEG_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "module.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fmbseg.cli", "train"]
    command += ["--profile", "smoke", "--set", f"results_dir={tmp_path / 'results'}", "--out", str(out)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    assert made.returncode == 0, made.stderr[-2000:]
    assert made.stdout.count("the module is") == 1 and made.stderr.count("training: 100%") == 1
    assert len(list((tmp_path / "home/labels").glob("*/drawn_*.png"))) == len(list((tmp_path / "home/cache/encoder").iterdir())) == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "module.json", "module.safetensors"]
    record = files.read_json(tmp_path / "module.json")
    assert record["protocol"]["processes"] == 2 and record["weights"]["module"] == files.file_sha256(out) and record["images"] == 6
