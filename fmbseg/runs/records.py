"""Records: JSON files with the inputs and the results of a run; and all of them as one frame."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fmbseg import files
from fmbseg.data import collections, label_spaces
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.data.samples import Dataset
from fmbseg.errors import DataError, ParameterError
from fmbseg.models import clip as clip_models
from fmbseg.models import encoders, texts
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
    """One number, or one training.

    kind: "train", "evaluate", or a comparison: "architecture", "encoder", "loss", "stages", "fine_tune"; method: the
    method or the variant; run: the name of its run; limit: the number of images to which the data set was cut, None where it
    was not; left_out: number of images of the collection that were not trained on because they are evaluated on; notes: what
    a reader of the number has to know; deviations: those of the function ``deviations``.
    """

    kind: str
    method: str
    parameters: dict[str, Any]
    dataset: str = ""
    source: str = ""
    images: int = 0
    failed: int = 0
    limit: int | None = None
    left_out: int | None = None
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
    deviations: dict[str, str] = field(default_factory=dict)
    run: str = "main"
    time: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    def write(self, folder: str | Path, name: str = "") -> Path:
        """Write the record as JSON under ``folder``; returns the path. name: the file's, without suffix; empty: ``stem``."""
        return files.write_json(Path(folder) / f"{name or self.stem}.json", dataclasses.asdict(self))

    @property
    def stem(self) -> str:
        """The name of its file, without suffix. It tells the record from all others of the run."""
        parts = [file_name(part) for part in (self.kind, self.method, self.dataset) if part]
        if self.kind != "evaluate" and "seed" in self.parameters:
            parts.append(f"seed{self.parameters['seed']}")
        return "-".join([*parts, f"n{self.limit}"] if self.limit else parts)


def results_folder(params: RunParams) -> Path:
    """The folder of this profile's records, tables and figures, made where it is missing. Raises ParameterError where it cannot be."""
    folder = Path(params.results_dir).expanduser()
    folder = (folder if folder.is_absolute() else files.working_root() / folder) / params.profile
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ParameterError(f"results_dir {folder}: cannot be made ({error.strerror}); give a place that can be written") from error
    return folder


def run_folder(params: RunParams) -> Path:
    """The folder of the records of the parameters' run."""
    return results_folder(params) / "records" / params.run


def file_name(text: str) -> str:
    """A safe file name, different for different texts. A text that is not a safe name, or has upper case, gets a hash."""
    if re.fullmatch(r"[a-z0-9_][a-z0-9_.+]{0,79}", text):
        return text
    return f"{re.sub('[^A-Za-z0-9_.+-]', '_', text)[:80].lstrip('.')}~{files.digest(text)[:8]}"


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
    """The git revision of the clone, with "+changes" where files outside results/ differ from it; "" outside a clone."""
    try:
        root = Path(__file__).resolve().parents[2]
        run = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, check=True)
        head = run(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        changed = run(["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"]).stdout.strip()
        return head + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def hardware(device: str = "cpu") -> str:
    """The name of a device, for records."""
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


POSITIONS = {
    "dinov2": "transformers' bicubic (the original scales by a factor)",
    "dinov2_reg": "transformers' bicubic, antialiased",
    "dinov3": "none: rotary",
    "siglip2": "transformers' bicubic",
}


def deviations(params: TextParams, space: LabelSpace, used: Mapping[str, str], encoder: str = "") -> dict[str, str]:
    """Our choices behind a number that are no parameters or are easily overlooked; docs/profiles.md lists them.

    space: the classes with their prompt words; encoder: the name of a module's encoder; empty: no module.
    """
    renamed = sum(p != (name,) for name, p in list(zip(space.names, space.prompts))[int(space.background) :])
    found = {
        "resize_filter": "PIL bicubic, antialiased, but for the evaluated image where the protocol (resize) says otherwise",
        "renamed_prompts": f"{renamed} of {len(space)} classes are prompted by other words than their name",
        "template": "with a full stop" if texts.templates(params.templates)[0].endswith(".") else "without a full stop",
    }
    if "sam" in used:
        found["mask_feature"] = "mean of unnormalised features"
        found["sam_embedding"] = "rounded to fp16"
    if encoder:
        found["module_input"] = "standardised per channel"
        families = {name: POSITIONS[kind.family] for name, kind in encoders.VITS.items()}
        parts = [part.strip().removeprefix("random:") for part in encoder.split("+")]
        found["position_interpolation"] = "; ".join(families.get(part, "none: convolutional") for part in parts)
    return found


def of_training(params: TrainRun, result: TrainResult, module: Path, **about: Any) -> Record:
    """The record of one training. about: other fields of the record."""
    described, space = modules.load(module)[1], label_spaces.vocabulary(params.vocabulary, params.words)
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
        "limit": params.limit,
        "left_out": collections.left_out(params.collection, params.data_root, getattr(params, "benchmarks", ())),
        "seconds": round(result.seconds, 1),
        "weights": described["weights"] | {"module": files.sha256_of(module)},
        "hardware": hardware(params.device),
        "notes": described["notes"],
        "protocol": protocol,
        "deviations": deviations(params, space, described["weights"], described["encoder"]),
        "run": params.run,
    }
    return Record(**values | about)


def of_evaluation(
    method: str, dataset: Dataset, space: LabelSpace, params: EvaluateParams, device: str, module: str, described: Mapping[str, Any]
) -> Record:
    """The record of one number of Table 1, without the number. A method with a module has the parameters of its training.

    module: the module's file, empty for the other methods; described: the description in that file.
    """
    protocol = params.part(SegmentParams) | {
        **params.part(TextParams),
        "background": dataclasses.asdict(space.rule) | {"words": list(space.prompts[0])} if space.background else None,
    }
    parameters = params.part(EvaluateParams)
    used, notes = used_weights(params, sam=method.startswith("stage")), notes_of(params)
    if module:
        parameters |= described["parameters"]
        used, notes = described["weights"] | {"module": files.sha256_of(module)}, described["notes"]
    return Record(
        "evaluate",
        method,
        parameters,
        dataset.name,
        dataset.source,
        limit=params.eval_limit if params.eval_limit and params.eval_limit < len(dataset.samples) else None,
        protocol=protocol,
        weights=used,
        notes=notes,
        hardware=hardware(device),
        deviations=deviations(params, space, used, described.get("encoder", "")),
    )


def counted(record: Record, names: Sequence[str], confusion: Confusion, images: int, failed: int, seconds: float) -> Record:
    """The record with the numbers of a confusion matrix over these classes; a number is None where nothing was counted."""

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


def keep(made: Sequence[Record], params: RunParams, kind: str = "") -> pd.DataFrame:
    """Write records into the parameters' run; returns these records as a frame.

    kind: the comparison to which they all belong. The run's earlier records of that comparison are removed, except that a quick
    look (``eval_limit``) does not remove records of whole data sets.
    """
    made = [dataclasses.replace(record, run=params.run, kind=kind or record.kind) for record in made]
    folder = run_folder(params)
    written, same = {record.write(folder) for record in made}, {(record.dataset, record.limit) for record in made}
    for path in set(folder.glob("*.json")) - written if kind else ():
        record = files.read_json(path)
        whole = params.eval_limit is None or record["limit"] is not None
        if record["kind"] == kind and (whole or (record["dataset"], record["limit"]) in same):
            path.unlink()
    return frame(made)


def load(folder: str | Path) -> pd.DataFrame:
    """All records of one run (``run_folder``) as one frame: a row a record; parameters as ``param.NAME``, IoU as ``iou.CLASS``.

    Raises DataError when there is no record, and for a record that does not belong to the run.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.json")):
        record = files.read_json(path)
        if record.get("run") != Path(folder).name:
            raise DataError(
                f"{path}: belongs to {record.get('run', 'no run')}, and the folder to {Path(folder).name}; delete it or move it"
            )
        rows.append(_row(record, str(path)))
    if not rows:
        older = next(Path(folder).parent.glob("*.json"), None)
        hint = f" (records such as {older.name}, of an older format, belong to no run and are not read)" if older else ""
        raise DataError(f"{folder}: holds no record; run notebooks 04 and 05, or: fmbseg reproduce embedded{hint}")
    return pd.DataFrame(rows)


def frame(made: Sequence[Record]) -> pd.DataFrame:
    """Records as a frame like that of ``load``, without files."""
    return pd.DataFrame([_row(dataclasses.asdict(record), "") for record in made])


def _row(record: dict[str, Any], file: str) -> dict[str, Any]:
    row = {k: v for k, v in record.items() if not isinstance(v, (dict, list))} | {"file": file, "notes": "; ".join(record["notes"])}
    row["module"] = record["weights"].get("module", "")[:8]
    row |= {f"param.{k}": v for k, v in record["parameters"].items()}
    return row | {f"iou.{k}": v for k, v in record["iou"].items()}
