"""One HTML page of a profile's results: tables, figures, records and versions, read without a server or a network."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from fmbseg import files
from fmbseg.errors import DataError
from fmbseg.runs import records, tables

CAPTIONS = {
    "table1": "mIoU of every method on every benchmark measured here",
    "classes": "IoU of single classes by every method",
    "loss": "The loss in training",
    "ablation-architecture": "mIoU of every architecture of the module, a point a seed",
    "ablation-architecture-curves": "Loss of every architecture, a line a seed",
    "ablation-loss": "mIoU of every loss, a point a seed",
    "ablation-loss-curves": "Every loss in training, a line a seed",
    "encoders": "mIoU with every frozen encoder",
    "fine_tune": "mIoU before and after training on with the target's own images",
}
"""Charts of known names, shown first in this order; any other figure follows under its file's name."""

TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}
LAST = ("protocol", "hardware", "why empty", "notes")
"""Columns of words, which follow the numbers."""
PUBLISHED = "published: the paper and what it compares itself with"


@dataclass(frozen=True)
class Group:
    """Rows of a table, under a heading where there are several groups; ours: made here and set off from what is published."""

    rows: list[list[str]]
    heading: str = ""
    ours: bool = False


@dataclass(frozen=True)
class Part:
    """A section of the page: a table, or one sentence on why there is none."""

    heading: str
    columns: list[str] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    about: list[str] = field(default_factory=list)
    absent: str = ""


def text(value: Any) -> str:
    """A cell: two decimals for a fraction, a whole number as it is, nothing for what is not there."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def part(heading: str, frame: pd.DataFrame, about: list[str] | None = None, whole: tuple[str, ...] = ()) -> Part:
    """A frame as a section, its index as the first columns. whole: columns of counts, without decimals."""
    flat = frame.reset_index() if frame.index.names != [None] else frame
    flat = flat[[name for name in flat if name not in LAST] + [name for name in LAST if name in flat]]
    rows = [[text(value) for value in row] for row in flat.itertuples(index=False)]
    for column in (list(flat.columns).index(name) for name in whole if name in flat):
        rows = [[*row[:column], row[column].removesuffix(".00"), *row[column + 1 :]] for row in rows]
    return Part(heading, [str(column) for column in flat.columns], [Group(rows)], about or [])


def table_1(frame: pd.DataFrame) -> Part:
    """Table 1, published rows and ours in groups of their own; what was measured on a whole split says its n below."""
    heading = "Table 1"
    if frame[frame["kind"] == "evaluate"].empty:
        return Part(heading, absent="Nothing was evaluated yet; run: fmbseg reproduce embedded --notebooks 05_evaluate 08_tables")
    table = tables.table1(frame).rename(columns={"training_data": "training data"})
    whole = [f"{column} {tables.OFFICIAL[b]}" for column, b in tables.COLUMNS.items() if (b, tables.OFFICIAL[b]) in measured(frame)]
    about = ["mIoU in per cent; n is the number of images. An empty cell was not measured; the next table says why."]
    about += [f"Columns of ours without an n are the whole official split: {', '.join(whole)} images."] if whole else []
    groups, shown = [], part("", table.droplevel("origin"))
    for origin, rows in table.groupby(level="origin", sort=False):
        published = origin == "published"
        (group,) = part("", rows.droplevel("origin")).groups
        groups.append(Group(group.rows, PUBLISHED if published else origin, not published))
    return Part(heading, shown.columns, groups, about)


def measured(frame: pd.DataFrame) -> set[tuple[str, int]]:
    """Every benchmark that was evaluated, with its number of images."""
    runs = frame[frame["kind"] == "evaluate"]
    return set(zip(runs["dataset"], runs["images"]))


def table_2(frame: pd.DataFrame) -> Part:
    """Table 2, or that no ablation was run."""
    heading = "Table 2: architecture and loss"
    if frame[frame["kind"].isin(list(tables.ABLATIONS))].empty:
        names = "06_ablate_architecture 07_ablate_loss 08_tables"
        return Part(heading, absent=f"No ablation was run yet; run: fmbseg reproduce embedded --notebooks {names}")
    about = ["Mean mIoU over the seeds in per cent, and its spread (sample standard deviation)."]
    return part(heading, tables.table2(frame), about, whole=("seeds",))


def comparisons(frame: pd.DataFrame) -> Part:
    """Every other comparison that has records: stages, encoders, fine-tuning."""
    heading = "Other comparisons"
    runs = frame[~frame["kind"].isin(["train", "evaluate", *tables.ABLATIONS])]
    if runs.empty:
        return Part(heading, absent="No stages, encoders or fine-tuning were compared yet; their notebooks are 06, 10 and 11.")
    made = runs.groupby(["kind", "dataset", "method", "images", "notes"], sort=False)
    made = made.agg(runs=("miou", "size"), mIoU=("miou", "mean"), precision=("precision", "mean"), coverage=("coverage", "mean"))
    shown = made.reset_index().rename(columns={"images": "n"})
    return part(
        heading, shown, ["Means over the runs in per cent; precision: labelled pixels that are right; coverage: pixels that have a label."]
    )


def trainings(frame: pd.DataFrame) -> Part:
    """What was trained on how many images."""
    heading = "Training"
    runs = frame[frame["kind"] == "train"]
    if runs.empty:
        return Part(heading, absent="No training was recorded here; run: fmbseg train")
    shown = runs[["method", "source", "images", "seconds", "hardware", "notes"]]
    return part(heading, shown.rename(columns={"method": "module", "images": "n"}))


def figures(folder: Path) -> list[dict[str, str]]:
    """Every image under ``figures/`` as a data URI with its caption, the known charts first."""
    known = list(CAPTIONS)
    found = [path for path in (folder / "figures").glob("*") if path.suffix.lower() in TYPES and not path.name.startswith(".")]
    order = sorted(found, key=lambda path: (known.index(path.stem) if path.stem in CAPTIONS else len(known), path.name))
    return [{"name": path.name, "caption": CAPTIONS.get(path.stem, path.stem), "uri": _uri(path)} for path in order]


def _uri(path: Path) -> str:
    return f"data:{TYPES[path.suffix.lower()]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def versions(made: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Every package with the version, or versions, that the records were made with; then revisions and machines."""
    packages = dict.fromkeys(name for record in made for name in record.get("versions", {}))
    lists = [(name, [record.get("versions", {}).get(name, "") for record in made]) for name in packages]
    lists += [(name, [record.get(name, "") for record in made]) for name in ("revision", "hardware")]
    return [(name, ", ".join(dict.fromkeys(value for value in values if value))) for name, values in lists]


def html(folder: str | Path) -> str:
    """The page of one folder of results. Raises DataError where there is no such folder, or no record in it."""
    from jinja2 import Environment, StrictUndefined

    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one of results/, such as results/embedded")
    frame = records.load(folder)
    made = [files.read_json(file) for file in frame["file"]]
    beside = "FMbSeg beside the paper"
    parts = [
        table_1(frame),
        part(beside, tables.differences(frame), ["A difference stands only where the whole official split was measured."]),
        table_2(frame),
        comparisons(frame),
        trainings(frame),
    ]
    template = (Path(__file__).parent / "assets" / "report.html.jinja").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(template)
    return page.render(
        name=folder.resolve().name,
        parts=parts,
        read_beside=tables.NOTES,
        notes=frame.loc[frame["notes"] != "", "notes"].value_counts().to_dict(),
        figures=figures(folder),
        records=[(record, text(record["miou"]), json.dumps(record, indent=1, ensure_ascii=False)) for record in made],
        versions=versions(made),
    )


def write(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page (default: report.html in the folder itself), whole or not at all; returns its path."""
    path = Path(out) if out else Path(folder) / "report.html"
    page = html(folder)
    if path.is_dir():
        raise DataError(f"{path}: a folder; give --out the name of a file, such as {path / 'report.html'}")
    with files.atomic_path(path) as part_of:
        part_of.write_text(page, encoding="utf-8")
    return path
