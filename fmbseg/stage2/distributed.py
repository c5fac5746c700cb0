"""Training in several processes: each takes a part of a batch, and the parts are gathered into one loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Sampler

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def size() -> int:
    """Number of processes; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0; only process 0 writes results and prints."""
    return dist.get_rank() if size() > 1 else 0


def parallel(module: nn.Module) -> nn.Module:
    """The module with its gradients averaged over the processes (DDP); with one process, the module itself."""
    return module if size() == 1 else nn.parallel.DistributedDataParallel(module)


class RankBatchSampler(Sampler):
    """This process's part of every batch, as indices. All parts have one length: a short one is filled with None.

    batches: the batches of all processes together; each process must draw the same. The parts in order of rank are the batch.
    skip: how many batches are left out at the beginning of a pass.
    """

    def __init__(self, batches: Sampler):
        self.batches, self.skip = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int | None]]:
        for batch in islice(self.batches, self.skip, None):
            part = -(-len(batch) // size())
            yield (batch + [None] * (part * size() - len(batch)))[rank() * part : (rank() + 1) * part]


class _Gather(torch.autograd.Function):
    """The tensors of all processes. The gradient is that of the own part times the number of processes, which DDP's mean undoes."""

    @staticmethod
    def forward(context, own: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(own) for _ in range(size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> torch.Tensor:
        return size() * gradient.chunk(size())[rank()]


def gather(own: torch.Tensor) -> torch.Tensor:
    """(n, ...) of each process -> (processes * n, ...), in order of rank. n must be the same in all processes.

    Where all processes compute the same loss of it, DDP's averaged gradient is the gradient of that loss.
    """
    return own if size() == 1 else _Gather.apply(own)


def batch_loss(loss_of: Loss, z: torch.Tensor, labels: torch.Tensor, texts: torch.Tensor, across: bool) -> tuple[torch.Tensor, float, int]:
    """(loss to be differentiated, its value over all processes, number of labelled patches of all processes).

    z: (n, D) patch embeddings of this process; labels: (n,), -1 where unlabelled; n must be the same in all processes.
    across: one loss over the patches of all processes, as one process would compute it. Otherwise each process has a loss
    over its own patches, and the value is their mean: no patches are exchanged, and the n x n product is smaller. With no
    labelled patch anywhere the loss is 0.
    """
    everyones = gather(labels)
    count = int((everyones >= 0).sum())
    if not count:
        return z.sum() * 0, 0.0, 0
    if across or size() == 1:
        z, labels = gather(z), everyones
        loss = loss_of(z[labels >= 0], labels[labels >= 0], texts)
        return loss, loss.item(), count
    labelled = int((everyones.reshape(size(), -1) >= 0).any(dim=1).sum())  # processes that have a loss
    own = labels >= 0
    loss = loss_of(z[own], labels[own], texts) * (size() / labelled) if own.any() else z.sum() * 0
    return loss, gather(loss.detach()[None]).mean().item(), count
