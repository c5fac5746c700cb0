import subprocess
import sys

import torch

from fmbseg.models import _torchvision


def boxes_of(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 20, (count, 2), generator=generator).float()
    sides = torch.randint(0 if seed % 10 == 0 else 1, 12, (count, 2), generator=generator).float()
    return torch.cat([corners, corners + sides], dim=1), torch.rand(count, generator=generator)


def iou(a, b):
    width, height = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0.0) for i in (0, 1))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union else 0.0


def brute_force(boxes, scores, threshold):
    boxes, scores, kept = boxes.tolist(), scores.tolist(), []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if all(iou(boxes[i], boxes[k]) <= threshold for k in kept):
            kept.append(i)
    return kept


def test_nms_equals_brute_force():
    for seed in range(200):
        boxes, scores = boxes_of(seed % 23, seed)
        threshold = (0.0, 0.3, 0.5, 0.77)[seed % 4]
        assert _torchvision.nms(boxes, scores, threshold).tolist() == brute_force(boxes, scores, threshold), seed


def test_nms_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [20, 20, 30, 30], [0, 0, 10, 5]])
    scores = torch.tensor([0.5, 0.9, 0.1, 0.6])
    assert _torchvision.nms(boxes, scores, 0.7).tolist() == [1, 3, 2]
    assert _torchvision.nms(boxes, scores, 0.8).tolist() == [1, 3, 0, 2]  # 0.8 itself is not over 0.8
    assert _torchvision.nms(boxes, scores, 0.9).dtype == torch.int64


def test_nms_of_nothing():
    kept = _torchvision.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert kept.shape == (0,) and kept.dtype == torch.int64


def test_torchvision_operators_run():
    import torchvision

    boxes, scores = boxes_of(20, 1)
    assert torchvision.ops.nms(boxes, scores, 0.3).tolist() == brute_force(boxes, scores, 0.3)
    groups = torch.arange(20) % 3
    kept = torchvision.ops.batched_nms(boxes, scores, groups, 0.3).tolist()
    alone = [k for g in range(3) for k in brute_force(boxes[groups == g], scores[groups == g], 0.3)]
    assert len(kept) == len(alone) and scores[kept].tolist() == sorted(scores[kept].tolist(), reverse=True)
    for g in range(3):
        own = torch.nonzero(groups == g)[:, 0]
        expected = own[brute_force(boxes[own], scores[own], 0.3)].tolist()
        assert [k for k in kept if groups[k] == g] == expected


FRESH = """
import fmbseg.models, torch
import torchvision, open_clip, segment_anything, timm
print(torchvision.ops.nms(torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8]]), torch.tensor([0.1, 0.2]), 0.5).tolist())
"""


def test_everything_that_needs_torchvision_imports_in_a_fresh_process():
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[1]"
