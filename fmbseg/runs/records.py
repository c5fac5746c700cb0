"""Run records: JSON files that say what was run, on what, and what came out; and all of them as one frame."""

from __future__ import annotations

import dataclasses
import functools
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fmbseg import files
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.data.samples import Dataset
from fmbseg.errors import DataError
from fmbseg.models import clip as clip_models
from fmbseg.models import sam as sam_models
from fmbseg.params import EvaluateParams, Params, RunParams, SegmentParams, TextParams
from fmbseg.runs import modules
from fmbseg.schemas import TrainRun
from fmbseg.stage2 import distributed
from fmbseg.stage2.metrics import Confusion
from fmbseg.stage2.training import TrainResult

STAND_IN = "stand-in trained with image-level names: not annotation-free"
PACKAGES = ("torch", "torchvision", "open_clip_torch", "segment-anything", "timm", "transformers", "numpy", "pandas")


@dataclass(frozen=True)
class Record:
    """One run.

    kind: "train", "evaluate", or a comparison: "architecture", "encoder", "loss", "stages", "fine_tune"; method: the
    method or the variant; notes: what a reader of the number has to know.
    """

    kind: str
    method: str
    parameters: dict[str, Any]
    dataset: str = ""
    source: str = ""
    images: int = 0
    failed: int = 0
    protocol: dict[str, Any] = field(default_factory=dict)
    miou: float | None = None
    precision: float | None = None
    coverage: float | None = None
    iou: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    weights: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: versions())
    revision: str = field(default_factory=lambda: revision())
    hardware: str = field(default_factory=lambda: hardware())
    notes: list[str] = field(default_factory=list)

    def write(self, folder: str | Path, name: str = "") -> Path:
        """Write it as JSON under ``folder``, named after kind, method and data set; returns the path."""
        return files.write_json(Path(folder) / f"{name or self.stem}.json", dataclasses.asdict(self))

    @property
    def stem(self) -> str:
        """Its file's name, without the ending."""
        return "-".join(part for part in (self.kind, self.method, self.dataset.replace("/", "_").replace(":", "_")) if part)


def results_folder(params: RunParams) -> Path:
    """Where this profile's records, tables and figures go (made if it is not there)."""
    folder = Path(params.results_dir).expanduser()
    folder = (folder if folder.is_absolute() else files.working_root() / folder) / params.profile
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def file_name(text: str) -> str:
    """A name that is safe as a file's."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in text)


def figure_path(params: RunParams, name: str) -> Path:
    return results_folder(params) / "figures" / f"{name}.png"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@functools.cache
def revision() -> str:
    """The git revision of the checkout, "+changes" where more than results/ is not as committed; "" outside one."""
    try:
        root = Path(__file__).resolve().parents[2]
        run = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, check=True)
        head = run(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        changed = run(["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"]).stdout.strip()
        return head + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def hardware(device: str = "cpu") -> str:
    """The name of the device that did the work."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def used_weights(params: Params, sam: bool = True) -> dict[str, str]:
    """Names and hashes of the weights that the parameters name. sam: whether SAM's are among those used."""
    found = {"clip": clip_models.weights_key(params.clip)}
    return found | {"sam": sam_models.weights_key(params.sam)} if sam else found


def notes_of(params: Params) -> list[str]:
    if params.clip == clip_models.LIT:
        return [STAND_IN]
    return ["random weights: the number means nothing"] if params.clip.startswith("random:") else []


def of_training(params: TrainRun, result: TrainResult, module: Path, **about: Any) -> Record:
    """The record of one training. about: other fields of the record."""
    described = modules.load(module)[1]
    steps = result.steps
    protocol = {
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "steps": steps[-1]["step"] + 1,
        "processes": distributed.size(),
    }
    values = {
        "kind": "train",
        "method": params.module,
        "parameters": params.model_dump(),
        "dataset": params.collection,
        "source": f"{described['images']} unlabelled images",
        "images": described["images"],
        "seconds": round(result.seconds, 1),
        "weights": described["weights"] | {"module": files.sha256_of(module)},
        "hardware": hardware(params.device),
        "notes": described["notes"],
        "protocol": protocol,
    }
    return Record(**values | about)


def of_evaluation(method: str, dataset: Dataset, space: LabelSpace, params: EvaluateParams, module: str, device: str) -> Record:
    """The record of one number of Table 1, not yet counted. FMbSeg's says what its module was trained with."""
    protocol = params.part(SegmentParams) | {
        **params.part(TextParams),
        "background": list(space.prompts[0]) if space.background else None,
    }
    parameters = params.part(EvaluateParams)
    used, notes = used_weights(params, sam=method.startswith("stage")), notes_of(params)
    if module:
        described = modules.load(module)[1]
        parameters |= described["parameters"]
        used, notes = described["weights"] | {"module": files.sha256_of(module)}, described["notes"]
    return Record(
        "evaluate",
        method,
        parameters,
        dataset.name,
        dataset.source,
        protocol=protocol,
        weights=used,
        notes=notes,
        hardware=hardware(device),
    )


def counted(record: Record, names: Sequence[str], confusion: Confusion, images: int, failed: int, seconds: float) -> Record:
    """The record with the numbers of a confusion matrix over these classes; None where nothing was counted."""

    def number(value: float) -> float | None:
        return None if value != value else round(float(value), 3)

    return dataclasses.replace(
        record,
        images=images,
        failed=failed,
        miou=number(confusion.miou()),
        precision=number(confusion.precision()),
        coverage=number(confusion.coverage()),
        iou={name: number(100 * value) for name, value in zip(names, confusion.iou())},
        seconds=round(seconds, 1),
    )


def load(folder: str | Path) -> pd.DataFrame:
    """All records under a folder as one tidy frame: a row a run; parameters as ``param.NAME``, IoU as ``iou.CLASS``.

    Raises DataError when there is none.
    """
    paths = sorted(file for file in Path(folder).rglob("*.json") if not file.name.startswith("."))
    found = [(str(file), files.read_json(file)) for file in paths]
    rows = [_row(record, file) for file, record in found if isinstance(record, dict) and "kind" in record]
    if not rows:
        raise DataError(f"{folder}: holds no record; run notebooks 04 and 05, or: fmbseg reproduce embedded")
    return pd.DataFrame(rows)


def frame(made: Sequence[Record]) -> pd.DataFrame:
    """Records as ``load`` gives them, without having been written."""
    return pd.DataFrame([_row(dataclasses.asdict(record), "") for record in made])


def _row(record: dict[str, Any], file: str) -> dict[str, Any]:
    row = {k: v for k, v in record.items() if not isinstance(v, (dict, list))} | {"file": file, "notes": "; ".join(record["notes"])}
    row |= {f"param.{k}": v for k, v in record["parameters"].items()}
    return row | {f"iou.{k}": v for k, v in record["iou"].items()}
