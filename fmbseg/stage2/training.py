"""Training the alignment module on labelled patches of the frozen encoder (Sec. 3.3, 4.1)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from fmbseg.data.images import IGNORED
from fmbseg.errors import TrainingError
from fmbseg.params import AlignParams, LossParams, ModuleParams
from fmbseg.stage2 import distributed, losses
from fmbseg.stage2.alignment import Alignment
from fmbseg.stage2.prealign import anchor


@dataclass(frozen=True)
class TrainResult:
    """A trained module.

    steps: one row a step (step, epoch, loss, learning_rate, patches: number of labelled patches);
    classes: indices of the K classes that occur in the pseudo labels, whose texts the loss takes; images: number of images.
    """

    alignment: Alignment
    steps: list[dict[str, float]]
    classes: tuple[int, ...]
    seconds: float
    images: int


@dataclass(frozen=True)
class TrainState:
    """A training after a batch: everything that the rest of it depends on.

    done: number of batches so far, in all epochs; weights: those of the module; optimiser: its tensors by "PARAMETER NUMBER.NAME";
    generator: (n,) uint8, the state at the beginning of the epoch of the generator that draws the batches; steps, seconds: as in
    TrainResult.
    """

    done: int
    weights: Mapping[str, torch.Tensor]
    optimiser: Mapping[str, torch.Tensor]
    generator: torch.Tensor
    steps: Sequence[dict[str, float]]
    seconds: float


def patch_labels(labels: np.ndarray, grid: tuple[int, int], min_labelled: float) -> torch.Tensor:
    """Label of every patch: (h, w) int64, the most frequent label of its pixels; IGNORED where too few are labelled.

    labels: (height, width) class indices, IGNORED where unlabelled; grid: (h, w) patches that share the image
    evenly; min_labelled: the least labelled share of a patch (ours: half).
    """
    rows = (np.arange(labels.shape[0]) * grid[0]) // labels.shape[0]
    columns = (np.arange(labels.shape[1]) * grid[1]) // labels.shape[1]
    patch = rows[:, None] * grid[1] + columns[None, :]
    pixels = np.bincount(labels.ravel() - IGNORED)
    present, column = np.flatnonzero(pixels), np.cumsum(pixels > 0) - 1
    shape = (grid[0] * grid[1], len(present))
    counts = np.bincount((patch * shape[1] + column[labels - IGNORED]).ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    present, total = present + IGNORED, counts.sum(axis=1)
    of_classes = np.where(present == IGNORED, 0, counts)
    labelled = of_classes.sum(axis=1)
    keep = (labelled > 0) & (labelled >= min_labelled * total)
    return torch.from_numpy(np.where(keep, present[of_classes.argmax(axis=1)], IGNORED).reshape(grid))


def loss_function(params: LossParams) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss that the parameters choose, as a function of (z, labels, texts)."""
    if params.loss == "tsupcon":
        return partial(losses.tsupcon, temperature=params.temperature, text_weight=params.text_weight, image_weight=params.image_weight)
    return partial({"prototype": losses.prototype, "supcon": losses.supcon}[params.loss], temperature=params.temperature)


def new_module(patches: Iterable[torch.Tensor], width: int, out: int, params: ModuleParams, seed: int = 0) -> Alignment:
    """A module with random weights, drawn with the seed.

    patches: (width, h, w) of every image on which the mean and standard deviation of its input are measured.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        alignment = Alignment(width, out, ModuleParams(**params.part(ModuleParams)))
    together = torch.cat([one.float().flatten(1) for one in patches], dim=1)
    alignment.mean.copy_(together.mean(dim=1))
    alignment.std.copy_(together.std(dim=1).clamp(min=1e-3))
    return alignment


def batches(data: Dataset, images_per_batch: int, seed: int, workers: int = 0) -> DataLoader:
    """Every image once an epoch, in random order by the seed. Under torchrun, this process's part of each batch.

    workers: number of processes that read batches ahead; it changes neither order nor content.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = BatchSampler(RandomSampler(data, generator=generator), images_per_batch, drop_last=False)
    pinned = workers > 0 and torch.cuda.is_available()
    return DataLoader(data, batch_sampler=distributed.RankBatchSampler(drawn), generator=generator, num_workers=workers, pin_memory=pinned)


def optimiser_of(alignment: nn.Module, params: AlignParams) -> torch.optim.Optimizer:
    """SGD (the paper's) or AdamW over the module's parameters."""
    if params.optimiser == "sgd":
        return torch.optim.SGD(alignment.parameters(), params.learning_rate, params.momentum, weight_decay=params.weight_decay)
    return torch.optim.AdamW(alignment.parameters(), params.learning_rate, weight_decay=params.weight_decay)


def learning_rate(params: AlignParams, batch: int, total: int) -> float:
    """The rate at batch 0, 1, ... of ``total``: a cosine from ``learning_rate`` to zero (Sec. 4.1)."""
    return params.learning_rate * (1 + math.cos(math.pi * batch / total)) / 2


def rows_of(classes: Sequence[int]) -> torch.Tensor:
    """Table from class index to row among the K classes of the loss; IGNORED (-1) indexes its last entry, which is IGNORED."""
    table = torch.full((max(classes) + 2,), IGNORED)
    table[list(classes)] = torch.arange(len(classes))
    return table


def train(
    data: Dataset,
    classes: Sequence[int],
    texts: torch.Tensor,
    initial: Alignment,
    params: AlignParams,
    seed: int = 0,
    *,
    device: str = "cpu",
    on_step: Callable[[dict[str, float] | None], None] = lambda row: None,
    state: TrainState | None = None,
    on_state: Callable[[Callable[[], TrainState]], None] = lambda take: None,
    encode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    workers: int = 0,
) -> TrainResult:
    """Train M on pseudo labels: SGD, cosine to zero, 5 images a batch (Sec. 4.1). The same seed gives the same module on a CPU.

    data: item i is an image's (width, h, w) patches and (h, w) int64 class indices, IGNORED where unlabelled. Item None, which
    fills up a part of a batch, is some image's patches, all unlabelled. With ``dense_weight`` each item has a third tensor,
    the (D, h, w) dense target of ``stage2.prealign`` (item None: zeros). classes: indices of the K classes that occur;
    texts: (K, D), their unit-norm text features t_k. initial: the module to begin with; it is not changed.
    on_step: called after every batch with the row of its step, or None where the batch had no labelled patch.
    on_state: called after every batch but the last with a function that returns the state of the training.
    state: such a state of the same training, from which to go on. No earlier batch is read, and the module is the same in the end.
    encode: makes (B, width, h, w) patches on the device, where items hold something else in their place, such as pixels.
    workers: processes that read ahead (``batches``). Under torchrun every rank takes its part of each batch, and all end with
    the same module.

    Raises TrainingError before a step whose loss or gradient is not finite, and at the end for weights that are not finite
    or give every patch the same direction or class.
    """
    started = time.perf_counter() - (state.seconds if state else 0.0)
    row_of, texts = rows_of(classes), texts.to(device)
    alignment = copy.deepcopy(initial).to(device).train()
    network, loss_of, optimiser = distributed.parallel(alignment), loss_function(params), optimiser_of(alignment, params)
    loader = batches(data, params.images_per_batch, seed, workers)
    total = params.epochs * len(loader)
    steps: list[dict[str, float]] = []
    done = 0
    if state:
        alignment.load_state_dict(state.weights)
        _restore(optimiser, state.optimiser)
        loader.generator.set_state(state.generator)
        steps, done = list(state.steps), state.done

    def take() -> TrainState:
        weights = {name: tensor.detach().cpu().clone() for name, tensor in alignment.state_dict().items()}
        _check_weights(weights, len(steps))
        kept = {f"{i}.{k}": v.cpu().clone() for i, of_one in optimiser.state_dict()["state"].items() for k, v in of_one.items()}
        return TrainState(done, weights, kept, at_start, list(steps), time.perf_counter() - started)

    last: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for epoch in range(max(done - 1, 0) // len(loader), params.epochs):  # the epoch of the last batch that is done
        at_start = loader.generator.get_state()
        loader.batch_sampler.skip = done - epoch * len(loader)
        for patches, labels, *dense in loader:
            maps = network(encode(patches) if encode else patches.to(device).float(), params.images_per_pass)
            z, y = maps.permute(0, 2, 3, 1).flatten(0, 2), row_of[labels.flatten()]
            if total - done <= LAST_BATCHES:
                nearest = (z.detach() @ texts.T).argmax(dim=1)
                last.append(tuple(distributed.gather(one).cpu() for one in (z.detach().mean(dim=0)[None], y.to(device), nearest)))
            loss, value, count = distributed.batch_loss(loss_of, z, y.to(device), texts, params.negatives == "batch")
            if params.dense_weight:
                pull = params.dense_weight * anchor(maps, dense[0].to(device))
                loss, value = loss + pull, value + pull.item()
            row = None
            if count or params.dense_weight:
                optimiser.zero_grad()
                loss.backward()
                _check_step(value, alignment, len(steps))
                rate = learning_rate(params, done, total)
                optimiser.param_groups[0]["lr"] = rate
                optimiser.step()
                row = {"step": len(steps), "epoch": epoch, "loss": value, "learning_rate": rate, "patches": count}
                steps.append(row)
            done += 1  # also after an empty batch: the rate ends at zero
            on_step(row)
            if done < total:
                on_state(take)
    alignment = alignment.cpu().eval()
    _check_weights(alignment.state_dict(), len(steps))
    _check_predictions(last)
    return TrainResult(alignment, steps, tuple(classes), time.perf_counter() - started, len(data))


def _restore(optimiser: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = tensor
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})


# ---------------------------------------------------------------- training that cannot be used

LAST_BATCHES = 10
"""Number of batches, the last ones, on which it is checked that the module tells patches apart."""

SAME_DIRECTION = 1e-5
"""Below this mean 1 - cos over all pairs of a batch's patches, all have the same direction but for rounding."""

COMMON = 0.1
"""Share of the labelled patches from which a class is common. A module that gives all patches one class, though two are common, is useless."""

REMEDY = "lower learning_rate, or raise temperature"


def _check_step(loss: float, module: nn.Module, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingError(f"training stopped: the loss is {loss} at step {step}; {REMEDY}")
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if not torch.nn.utils.get_total_norm(gradients).isfinite():
        raise TrainingError(f"training stopped: the gradient is not finite at step {step}; {REMEDY}")


def _check_weights(weights: Mapping[str, torch.Tensor], step: int) -> None:
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise TrainingError(f"training stopped: weights are not finite after {step} steps; {REMEDY}")


def _check_predictions(last: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    """Raise TrainingError where all patches have one direction, so that the mean of their unit-norm z has unit norm, or one class.

    last: for each of the last batches the means of z in each process, (processes, D), the labels and the nearest texts, (n,) each.
    """
    if not last:
        return
    means, labels, nearest = (torch.cat(parts) for parts in zip(*last))
    labelled = labels >= 0
    shares = labels[labelled].bincount() / max(int(labelled.sum()), 1)
    one_direction = (1 - means.square().sum(dim=1)).max() < SAME_DIRECTION
    if one_direction or ((shares >= COMMON).sum() > 1 and nearest[labelled].unique().numel() == 1):
        raise TrainingError(
            f"training stopped: every patch of the last {len(last)} batches comes out as one and the same"
            f" {'direction' if one_direction else 'class'}; {REMEDY}, or give images that differ"
        )
