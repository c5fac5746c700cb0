"""Evaluation in shards: each machine counts its own images, and the confusion matrices are added up afterwards.

A shard's file holds its matrix and its record, so nothing else has to be shared. The sum is exactly the unsharded result.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fmbseg import files
from fmbseg.errors import DataError
from fmbseg.runs import records
from fmbseg.runs.records import Record
from fmbseg.stage2.metrics import Confusion


@dataclass(frozen=True)
class Part:
    """What one shard of an evaluation counted on one benchmark.

    record: of its own images; confusion: the matrix behind it; images: how many the whole evaluation has;
    key: of everything that the shards must have in common.
    """

    record: Record
    confusion: Confusion
    shard: int
    num_shards: int
    pictures: int
    key: str

    @property
    def noted(self) -> Record:
        """The record with a note that its number is not the benchmark's."""
        return dataclasses.replace(self.record, notes=[*self.record.notes, f"shard {self.shard} of {self.num_shards} alone"])

    def write(self, folder: str | Path) -> Path:
        """Write it under ``folder``, named after method, data set and shard; returns the path."""
        described = dataclasses.asdict(self)
        described.pop("confusion")
        path = Path(folder) / f"{self.record.stem}-{self.shard}-of-{self.num_shards}.safetensors"
        return files.write_tensors(path, {"counts": torch.from_numpy(self.confusion.counts)}, {"part": json.dumps(described)})


def read(path: str | Path) -> Part:
    """A shard's file. Raises DataError when it is none."""
    tensors, metadata = files.read_tensors(path)
    if "part" not in metadata:
        raise DataError(f"{path}: not a shard of an evaluation; give the folder that fmbseg evaluate --shard wrote to")
    described = json.loads(metadata["part"])
    counts = tensors["counts"].numpy()
    return Part(**described | {"record": Record(**described["record"]), "confusion": Confusion(len(counts), counts)})


def read_folders(folders: Iterable[str | Path]) -> list[Part]:
    """All shards under these folders. Raises DataError when there is none."""
    folders = list(folders)
    found = [read(path) for folder in folders for path in sorted(Path(folder).rglob("*.safetensors"))]
    if not found:
        raise DataError(f"{', '.join(map(str, folders))}: no shard there; run: fmbseg evaluate --shard 0 --num-shards N")
    return found


def merge(parts: Sequence[Part]) -> list[Record]:
    """One record for every method and benchmark, from all their shards.

    Raises DataError where a shard is missing, counted twice with different results, or of another evaluation.
    """
    groups: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        groups.setdefault((part.record.method, part.record.dataset), []).append(part)
    return [_merge(f"{method} on {dataset}", group) for (method, dataset), group in groups.items()]


def _merge(what: str, parts: list[Part]) -> Record:
    if len({(part.key, part.num_shards) for part in parts}) > 1:
        raise DataError(
            f"{what}: the shards are of different evaluations (parameters, weights, words, images or number of shards);"
            " give only those of one"
        )
    by_shard: dict[int, Part] = {}
    for part in parts:
        other = by_shard.setdefault(part.shard, part)
        if (other.confusion.counts != part.confusion.counts).any():
            raise DataError(f"{what}: shard {part.shard} is there twice with different counts; remove one of them")
    count = parts[0].num_shards
    if absent := [str(i) for i in range(count) if i not in by_shard]:
        raise DataError(f"{what}: of {count} shards these are missing: {', '.join(absent)}; run: fmbseg evaluate --shard {absent[0]}")
    ordered = [by_shard[i] for i in range(count)]
    total = ordered[0].confusion
    for part in ordered[1:]:
        total = total + part.confusion
    made = [part.record for part in ordered]
    first = made[0]
    notes = list(first.notes)
    if any((record.versions, record.revision) != (first.versions, first.revision) for record in made):
        notes.append("the shards ran with different versions")
    summed = records.counted(
        first, list(first.iou), total, sum(r.images for r in made), sum(r.failed for r in made), sum(r.seconds for r in made)
    )
    if summed.images + summed.failed != ordered[0].pictures:
        raise DataError(f"{what}: the shards hold {summed.images + summed.failed} images, and the evaluation {ordered[0].pictures}")
    hardware = "; ".join(dict.fromkeys(record.hardware for record in made))
    return dataclasses.replace(summed, hardware=hardware, source=first.source, notes=notes)
