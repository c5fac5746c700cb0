"""Let torchvision be imported beside a torch build that its compiled operators do not fit.

A CPU build of torch beside the registry's (CUDA) wheel of torchvision fails at import with
``operator torchvision::nms does not exist``; open_clip, segment_anything and timm then fail too. Of these
operators only non-maximum suppression is needed here, so it is defined in plain torch where they cannot be
loaded. Where they can, nothing is changed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

_library: torch.library.Library | None = None  # operators vanish when their library is collected


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression, as ``torchvision.ops.nms``.

    boxes: (N, 4) as (x0, y0, x1, y1); scores: (N,). Returns the kept indices, best score first.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order].float()
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    alive = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    kept = []
    for i in range(len(boxes)):
        if not alive[i]:
            continue
        kept.append(i)
        corner_low = torch.maximum(boxes[i, :2], boxes[i + 1 :, :2])
        corner_high = torch.minimum(boxes[i, 2:], boxes[i + 1 :, 2:])
        overlap = (corner_high - corner_low).clamp(min=0).prod(dim=1)
        iou = overlap / (areas[i] + areas[i + 1 :] - overlap)
        alive[i + 1 :] &= ~(iou > iou_threshold)
    return order[torch.tensor(kept, dtype=torch.long, device=order.device)]


def _operators_load(folder: Path) -> bool:
    for library in sorted(folder.glob("_C*.so")) + sorted(folder.glob("_C*.pyd")):
        try:
            torch.ops.load_library(str(library))
            return True
        except OSError:
            continue
    return False


def ensure() -> None:
    """Make ``import torchvision`` work; call before anything that imports it."""
    global _library
    if _library is not None or "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or _operators_load(Path(spec.origin).parent):
        return
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.impl("nms", nms, "CompositeExplicitAutograd")

    import torchvision.extension

    torchvision.extension._assert_has_ops = lambda: None  # the one operator asked for is there
    import torchvision.ops.boxes

    torchvision.ops.boxes._assert_has_ops = lambda: None
