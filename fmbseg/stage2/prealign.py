"""Pre-alignment (ours): before it sees a label, M learns CLIP's dense maps of the same images.

The last layer of M is fitted so that every patch is mapped to the dense CLIP feature at its place:

    minimise over W, b   1/n sum_i || W (h_i - mean) / std + b - d_i ||^2 + ridge ||W||^2

h_i is the input of the last layer at patch i (of the linear module the standardised patch, of the MLP its hidden layer, of the
transformer module the output of its block, both with their random initial weights), d_i the unit-norm dense CLIP feature
(Sec. 3.1, 3.2). The solution has a closed form, from sums over the patches. It needs neither words nor SAM, so it can take all
images of a collection even where Stage 1, which is slow, takes a part of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from fmbseg.data.images import resize_map
from fmbseg.params import PrealignParams
from fmbseg.stage2.alignment import Alignment


def dense_target(dense: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """d_i: a dense CLIP map, (D, rows, columns), interpolated to the encoder's (h, w) grid, unit norm at each patch."""
    return F.normalize(resize_map(dense[None].float(), grid)[0], dim=0)


class NormalEquations:
    """The sums that the closed form needs. Their size, (width + 1)^2, does not grow with the number of images."""

    def __init__(self, width: int, out: int):
        self.count = 0
        self.gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)  # sum of [h; 1][h; 1]^T
        self.cross = torch.zeros(width + 1, out, dtype=torch.float64)  # sum of [h; 1] d^T

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """features: (n, width); targets: (n, D)."""
        h = F.pad(features.double().cpu(), (0, 1), value=1.0)
        self.count += len(h)
        self.gram += h.T @ h
        self.cross += h.T @ targets.double().cpu()

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight (D, width), bias (D,)) at the minimum, for the features as added (not standardised). The bias has no penalty."""
        gram, cross = self.gram / self.count, self.cross / self.count
        mean, target_mean = gram[:-1, -1], cross[-1]
        covariance = gram[:-1, :-1] - torch.outer(mean, mean)
        std = covariance.diagonal().clamp(min=1e-12).sqrt()
        normal = covariance / torch.outer(std, std) + ridge * torch.eye(len(mean), dtype=torch.float64)
        weight = (torch.linalg.lstsq(normal, (cross[:-1] - torch.outer(mean, target_mean)) / std[:, None]).solution / std[:, None]).T
        return weight, target_mean - weight @ mean

    def output_norm(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        """Root mean square length of (weight h + bias) over all features h added."""
        whole = torch.cat([weight, bias[:, None]], dim=1)
        return float(((whole @ (self.gram / self.count)) * whole).sum().clamp(min=0).sqrt())


@torch.no_grad()
def prealign(fresh: Alignment, items: Iterable[tuple[torch.Tensor, torch.Tensor]], params: PrealignParams) -> Alignment:
    """A copy of a module whose last layer is fitted to the dense maps.

    items: (patches (width, h, w), dense target (D, h, w)) of each image. The output is scaled to the RMS length
    ``prealign_norm``. As z is normalised, this changes no similarity, but how far a later training step turns z.
    """
    made = copy.deepcopy(fresh)
    last = made.module.project
    equations = NormalEquations(last.in_features, last.out_features)
    for patches, target in items:
        equations.add(made.features(patches[None].float())[0], target.flatten(1).T)
    weight, bias = equations.solve(params.prealign_ridge)
    scale = params.prealign_norm / max(equations.output_norm(weight, bias), 1e-12)
    last.weight.copy_(scale * weight), last.bias.copy_(scale * bias)
    return made.eval()


def anchor(z: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The anchor, mean_i (1 - z_i . d_i) over the patches of (B, D, h, w) unit-norm z and targets; its weight is ``dense_weight``."""
    return (1 - (z * target).sum(dim=1)).mean()


@torch.no_grad()
def average(start: Alignment, trained: Alignment, share: float) -> Alignment:
    """The weighted average of the module before and after training (ours, after Wortsman et al. 2022):

        share s W_0 + (1 - share) W_T        s = |W_T| / |W_0| of the last layer's weights, for its weight and bias; else s = 1

    Training improves the classes that the pseudo labels name and worsens the others; the average keeps a part of what the
    initial module knew of these. share: in [0, 1]; 0 is the trained module.
    """
    made, before = copy.deepcopy(trained), start.state_dict()
    scale = trained.module.project.weight.norm() / start.module.project.weight.norm()
    for name, after in made.state_dict().items():
        if name not in ("mean", "std"):
            factor = scale if name.startswith("module.project.") else 1.0
            after.copy_(share * factor * before[name].to(after.device) + (1 - share) * after)
    return made
