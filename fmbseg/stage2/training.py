"""Training the alignment module on labelled patches of the frozen encoder (Sec. 3.3, 4.1)."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from fmbseg.params import AlignParams, LossParams, ModuleParams
from fmbseg.stage2 import distributed, losses
from fmbseg.stage2.alignment import Alignment
from fmbseg.stage2.prealign import anchor


@dataclass(frozen=True)
class TrainResult:
    """A trained module.

    steps: one row a step (step, epoch, loss, learning_rate, patches: how many were labelled);
    classes: indices of the K classes that occur in the pseudo labels, the texts of the loss.
    """

    alignment: Alignment
    steps: list[dict[str, float]]
    classes: tuple[int, ...]
    seconds: float


def loss_function(params: LossParams) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss that the parameters name, as a function of (z, labels, texts)."""
    if params.loss == "tsupcon":
        return partial(losses.tsupcon, temperature=params.temperature, text_weight=params.text_weight, image_weight=params.image_weight)
    return partial({"prototype": losses.prototype, "supcon": losses.supcon}[params.loss], temperature=params.temperature)


def new_module(patches: Iterable[torch.Tensor], width: int, out: int, params: ModuleParams, seed: int = 0) -> Alignment:
    """A module with fresh weights, which the seed gives.

    patches: (width, h, w) of every image on which mean and standard deviation of its input are measured.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        alignment = Alignment(width, out, ModuleParams(**params.part(ModuleParams)))
    together = torch.cat([one.float().flatten(1) for one in patches], dim=1)
    alignment.mean.copy_(together.mean(dim=1))
    alignment.std.copy_(together.std(dim=1).clamp(min=1e-3))
    return alignment


def batches(data: Dataset, images_per_batch: int, seed: int) -> DataLoader:
    """Every image once an epoch, in an order that the seed gives. Under torchrun, this process's part of each batch."""
    generator = torch.Generator().manual_seed(seed)
    drawn = BatchSampler(RandomSampler(data, generator=generator), images_per_batch, drop_last=False)
    return DataLoader(data, batch_sampler=distributed.RankBatchSampler(drawn), generator=generator)


def optimiser_of(alignment: nn.Module, params: AlignParams) -> torch.optim.Optimizer:
    """SGD (the paper's) or AdamW over the module's parameters."""
    if params.optimiser == "sgd":
        return torch.optim.SGD(alignment.parameters(), params.learning_rate, params.momentum, weight_decay=params.weight_decay)
    return torch.optim.AdamW(alignment.parameters(), params.learning_rate, weight_decay=params.weight_decay)


def rows_of(classes: Sequence[int]) -> torch.Tensor:
    """(256,) table from class index to its row among the K classes of the loss; -1, which indexes the last, stays -1."""
    table = torch.full((256,), -1)
    table[list(classes)] = torch.arange(len(classes))
    return table


def train(
    data: Dataset,
    classes: Sequence[int],
    texts: torch.Tensor,
    initial: Alignment,
    params: AlignParams,
    seed: int = 0,
    device: str = "cpu",
    on_step: Callable[[dict[str, float] | None], None] = lambda row: None,
) -> TrainResult:
    """Train M on pseudo labels: SGD, cosine to zero, 5 images a batch (Sec. 4.1). The same seed gives the same module on a CPU.

    data: item i is an image's (width, h, w) patches and (h, w) int64 class indices, -1 where unlabelled; item None fills
    up a part of a batch: some image's patches, all unlabelled. With ``dense_weight`` each item has a third tensor,
    the (D, h, w) dense target of ``stage2.prealign`` (item None: zeros). classes: indices of the K classes that occur;
    texts: (K, D) unit-norm text features of them, t_k. initial: the module to begin with, which is left as it is.
    on_step: called after every step with its row, or None where a batch had no labelled patch.
    Under torchrun every rank takes its part of each batch, and all end with the same module.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    row_of, texts = rows_of(classes), texts.to(device)
    alignment = copy.deepcopy(initial).to(device).train()
    network, loss_of, optimiser = distributed.parallel(alignment), loss_function(params), optimiser_of(alignment, params)
    loader = batches(data, params.images_per_batch, seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, params.epochs * len(loader))

    steps: list[dict[str, float]] = []
    for epoch in range(params.epochs):
        for patches, labels, *dense in loader:
            maps = network(patches.float().to(device))
            z, y = maps.permute(0, 2, 3, 1).flatten(0, 2), row_of[labels.flatten()]
            loss, value, count = distributed.batch_loss(loss_of, z, y.to(device), texts, params.negatives == "batch")
            if params.dense_weight:
                pull = params.dense_weight * anchor(maps, dense[0].to(device))
                loss, value = loss + pull, value + pull.item()
            row = None
            if count or params.dense_weight:
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                rate = optimiser.param_groups[0]["lr"]
                row = {"step": len(steps), "epoch": epoch, "loss": value, "learning_rate": rate, "patches": count}
                steps.append(row)
            schedule.step()  # also after an empty batch: the rate ends at zero
            on_step(row)
    return TrainResult(alignment.cpu().eval(), steps, tuple(classes), time.perf_counter() - started)
