"""Training the alignment module on pseudo labels and cached encoder patches (Sec. 3.3, 4.1)."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from fmbseg.data.samples import Sample
from fmbseg.errors import DataError
from fmbseg.models.texts import ClassTexts
from fmbseg.params import AlignParams, LossParams, ModuleParams
from fmbseg.runs import cache, parallel
from fmbseg.stage1.pseudo_labels import LabelStore, patch_labels
from fmbseg.stage2 import distributed, losses
from fmbseg.stage2.alignment import Alignment


@dataclass(frozen=True)
class TrainResult:
    """A trained module. steps: one row a step (step, epoch, loss, learning rate, labelled patches);
    classes: indices of the K classes that occur in the pseudo labels, the texts of the loss."""

    alignment: Alignment
    steps: list[dict[str, float]]
    classes: tuple[int, ...]
    seconds: float


class PatchDataset(Dataset):
    """One item an image: (width, h, w) fp16 encoder patches and (h, w) int64 labels, -1 where unlabelled.

    Item None fills up a part of a batch: some image's patches, all unlabelled.
    """

    def __init__(self, samples: list[Sample], store: LabelStore, params: AlignParams, device: str):
        self.samples, self.store, self.params, self.device = samples, store, params, device

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        sample = self.samples[index or 0]
        patches = cache.encoder_patches(sample.image, self.params, self.device)
        labels = self.labels(sample, tuple(patches.shape[1:]))
        return patches, torch.full_like(labels, -1) if index is None else labels

    def labels(self, sample: Sample, grid: tuple[int, int]) -> torch.Tensor:
        return patch_labels(self.store.read(sample), grid, self.params.min_labelled)


def _encode(sample: Sample, params: AlignParams, device: str) -> None:
    cache.encoder_patches(sample.image, params, device)


def prepare(samples: list[Sample], params: AlignParams, device: str = "cpu", workers: int = 1) -> None:
    """Encode every image once, on disk, in several processes; under torchrun each rank its share of them."""
    parallel.each(partial(_encode, params=params, device=device), distributed.share(samples), "encoder patches", workers)
    distributed.wait()


def loss_function(params: LossParams) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss that the parameters name, as a function of (z, labels, texts)."""
    if params.loss == "tsupcon":
        return partial(losses.tsupcon, temperature=params.temperature, text_weight=params.text_weight, image_weight=params.image_weight)
    return partial({"prototype": losses.prototype, "supcon": losses.supcon}[params.loss], temperature=params.temperature)


def standardise(alignment: Alignment, data: PatchDataset, at_most: int = 256) -> None:
    """Measure mean and standard deviation of the patches on up to ``at_most`` images and keep them in the module."""
    patches = torch.cat([data[i][0].float().flatten(1) for i in parallel.spread(range(len(data)), at_most)], dim=1)
    alignment.mean.copy_(patches.mean(dim=1))
    alignment.std.copy_(patches.std(dim=1).clamp(min=1e-3))


def labelled_classes(data: PatchDataset) -> tuple[int, ...]:
    """The classes that label any patch, sorted. Raises DataError when there is none."""
    grid = tuple(data[0][0].shape[1:])  # every image is squashed to the same square
    found: set[int] = set()
    for sample in data.samples:
        found.update(data.labels(sample, grid).unique().tolist())
    found.discard(-1)
    if not found:
        raise DataError(f"{data.store.folder}: no patch is labelled; lower min_votes or min_labelled, or give more images or other words")
    return tuple(sorted(found))


def train(
    samples: list[Sample],
    store: LabelStore,
    texts: ClassTexts,
    params: AlignParams,
    seed: int = 0,
    device: str = "cpu",
    initial: Alignment | None = None,
) -> TrainResult:
    """Train M on the images' pseudo labels: SGD, cosine to zero, 5 images a batch (Sec. 4.1).

    texts: of the whole vocabulary; the loss uses those of the classes that occur. The same seed gives the same module.
    initial: a trained module to go on from (fine-tuning), in place of a new one; it is left as it is. Under torchrun every rank takes its part of each batch, and all end with the same module.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    data = PatchDataset(samples, store, params, device)
    classes = labelled_classes(data)
    prototypes = texts.prototypes()[list(classes)].to(device)
    column = torch.full((256,), -1)  # class index -> row of the prototypes; -1, which indexes the last, stays -1
    column[list(classes)] = torch.arange(len(classes))

    if initial is None:
        alignment = Alignment(data[0][0].shape[0], prototypes.shape[1], ModuleParams(**params.part(ModuleParams)))
        standardise(alignment, data)
    else:
        alignment = copy.deepcopy(initial)
    alignment.to(device).train()
    network = distributed.parallel(alignment)
    loss_of = loss_function(params)
    optimiser = _optimiser(alignment, params)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.Generator().manual_seed(seed + distributed.rank())
    batches = BatchSampler(RandomSampler(data, generator=generator), params.images_per_batch, drop_last=False)
    loader = DataLoader(data, batch_sampler=distributed.Share(batches), generator=generator)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, params.epochs * len(loader))

    steps: list[dict[str, float]] = []
    with parallel.progress(params.epochs * len(loader), "training", "step") as bar:
        for epoch in range(params.epochs):
            for patches, labels in loader:
                z = network(patches.float().to(device)).permute(0, 2, 3, 1).flatten(0, 2)
                y = column[labels.flatten()]
                if params.patch_share < 1:
                    y[torch.rand(len(y), generator=drawn) >= params.patch_share] = -1
                y = y.to(device)
                loss, value, count = distributed.batch_loss(loss_of, z, y, prototypes, params.negatives == "batch")
                rate = optimiser.param_groups[0]["lr"]
                if count:
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                    schedule.step()
                    steps.append({"step": len(steps), "epoch": epoch, "loss": value, "learning_rate": rate, "patches": count})
                    bar.set_postfix(loss=f"{value:.3f}", refresh=False)
                bar.update()
    return TrainResult(alignment.cpu().eval(), steps, classes, time.perf_counter() - started)


def _optimiser(alignment: Alignment, params: AlignParams) -> torch.optim.Optimizer:
    if params.optimiser == "sgd":
        return torch.optim.SGD(alignment.parameters(), params.learning_rate, params.momentum, weight_decay=params.weight_decay)
    return torch.optim.AdamW(alignment.parameters(), params.learning_rate, weight_decay=params.weight_decay)
