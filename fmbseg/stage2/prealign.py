"""Pre-alignment (ours): before any label, M learns the image-text model's own dense map of the same images.

    minimise over M   mean_i || M(x_i) - d_i ||^2 + ridge ||W||^2        (linear module: closed form)
    minimise over M   mean_i (1 - cos(M(x_i), d_i))                      (MLP, transformer block)

x_i is a patch of the frozen encoder and d_i the unit-norm dense CLIP feature at its place (Sec. 3.1, 3.2). It needs
neither words nor SAM, so it can take every image of a collection where Stage 1 takes as many as time allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from fmbseg.data.images import resize_map
from fmbseg.params import ModuleParams, PrealignParams
from fmbseg.stage2.alignment import Alignment

Items = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""(patches (width, h, w), dense target (D, h, w)) of one image after the other."""


def dense_target(dense: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """d_i: a dense CLIP map, (D, rows, columns), interpolated to the encoder's (h, w) grid, unit norm at each patch."""
    return F.normalize(resize_map(dense[None].float(), grid)[0], dim=0)


class NormalEquations:
    """The sums that the closed form needs, streamed: memory is (width + 1)^2 whatever the number of images."""

    def __init__(self, width: int, out: int):
        self.count = 0
        self.gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)  # sum of [x; 1][x; 1]^T
        self.cross = torch.zeros(width + 1, out, dtype=torch.float64)  # sum of [x; 1] d^T

    def add(self, patches: torch.Tensor, target: torch.Tensor) -> None:
        """patches: (width, h, w); target: (D, h, w)."""
        x = F.pad(patches.flatten(1).T.double(), (0, 1), value=1.0)
        self.count += len(x)
        self.gram += (x.T @ x).to(self.gram)
        self.cross += (x.T @ target.flatten(1).T.double()).to(self.cross)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, standard deviation) of each input dimension, (width,) float64 each."""
        mean = self.gram[:-1, -1] / self.count
        return mean, (self.gram.diagonal()[:-1] / self.count - mean**2).clamp(min=1e-6).sqrt()

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight (D, width), bias (D,)) for the STANDARDISED input (x - mean) / std; ridge is the penalty an input dimension.

        The bias is not penalised: it is the mean target.
        """
        mean, std = self.moments()
        bias = self.cross[-1] / self.count
        covariance = (self.gram[:-1, :-1] / self.count - torch.outer(mean, mean)) / torch.outer(std, std)
        cross = (self.cross[:-1] / self.count - torch.outer(mean, bias)) / std[:, None]
        weight = torch.linalg.solve(covariance + ridge * torch.eye(len(mean), dtype=torch.float64), cross)
        return weight.T, bias

    def output_norm(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        """Root mean square length of weight (x - mean) / std + bias over all patches added."""
        mean, std = self.moments()
        whole = torch.cat([weight / std, (bias - (weight / std) @ mean)[:, None]], dim=1)
        return float(((whole @ (self.gram / self.count)) * whole).sum().sqrt())


def closed_form(equations: NormalEquations, params: PrealignParams) -> Alignment:
    """The linear module of the ridge solution, rescaled so that its output has the RMS length ``prealign_norm``.

    z is normalised, so the scale changes no similarity; it only decides how far a later step of training turns z.
    """
    weight, bias = equations.solve(params.prealign_ridge)
    scale = params.prealign_norm / equations.output_norm(weight, bias)
    made = Alignment(weight.shape[1], weight.shape[0], ModuleParams(module="linear"))
    mean, std = equations.moments()
    with torch.no_grad():
        made.mean.copy_(mean), made.std.copy_(std)
        made.module.project.weight.copy_(scale * weight), made.module.project.bias.copy_(scale * bias)
    return made.eval()


def regress(
    alignment: Alignment,
    batches: Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]],
    params: PrealignParams,
    device: str = "cpu",
    on_step: Callable[[float], None] = lambda loss: None,
) -> Alignment:
    """Cosine regression of any module by AdamW: ``prealign_epochs`` passes, the rate falling to zero as a cosine.

    batches: gives (patches (B, width, h, w), targets (B, D, h, w)), anew each epoch; on_step: called with the loss.
    """
    alignment = alignment.to(device).train()
    optimiser = torch.optim.AdamW(alignment.parameters(), params.prealign_rate, weight_decay=1e-4)
    total = params.prealign_epochs * sum(1 for _ in batches())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
    for _ in range(params.prealign_epochs):
        for patches, target in batches():
            loss = anchor(alignment(patches.float().to(device)), target.to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            on_step(loss.item())
    return alignment.cpu().eval()


def anchor(z: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """mean_i (1 - z_i . d_i) over the patches of (B, D, h, w) unit-norm z and targets: what ``dense_weight`` weighs in training."""
    return (1 - (z * target).sum(dim=1)).mean()
