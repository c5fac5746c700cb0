"""Tables 1 and 2: the paper's numbers beside ours, and the reason where there is no number of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from fmbseg import files, profiles
from fmbseg.data.benchmarks import LAYOUTS
from fmbseg.errors import DataError
from fmbseg.runs.evaluate import METHODS

COLUMNS = {
    "PV-21": "voc21",
    "PV-20": "voc20",
    "PC-59": "context59",
    "PC-60": "context60",
    "CO-80": "coco_object80",
    "CO-81": "coco_object81",
    "CS-171": "coco_stuff171",
    "City": "cityscapes19",
    "ADE": "ade150",
}
"""Columns of Table 1 and the benchmark of each; those with background are next to those without (see NOTES)."""

NOTES = (
    "CS-171 is 29.88 in the paper's Table 1 and 27.61 in its Table 2 for the same model; the ablation's setting is not stated.",
    "Many published PC-59 baselines are other papers' Context-60 numbers and many CO-80 ones COCO-Object with background (81);"
    " FMbSeg's own are without background. With and without background are separate columns here; never compare the two.",
    "ReCo's published CO-80 of 31.6 repeats TCL's cell; others report 15.7. TCL's row is with PAMR refinement; FMbSeg uses none.",
    "Eq. 1 taken literally gives the text term a few per cent of the weight and no temperature; what was used is in each record.",
)


OFFICIAL = {benchmark: LAYOUTS[benchmark].images for benchmark in COLUMNS.values()}
"""Number of images of each official validation split: a result on fewer images is not compared with the paper's."""


def published(table: int) -> pd.DataFrame:
    """The paper's Table 1 or 2, from results/published/."""
    return pd.read_csv(profiles.published_folder() / f"table{table}.csv")


def later() -> pd.DataFrame:
    """Published rows of later methods, with backbone, supervision, protocol and source. Their protocols are not Table 1's."""
    return pd.read_csv(profiles.published_folder() / "later.csv").set_index(["method", "backbone"])


def _one_each(records: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The records, if no two have the same values in these columns. Raises DataError that names two that do: none is averaged."""
    columns = [name for name in columns if name in records]
    for _, doubled in records[records.duplicated(columns, keep=False)].groupby(columns, dropna=False, sort=False):
        one, two = doubled["file"].iloc[:2]
        number = ", ".join(str(value) for value in doubled[columns].iloc[0])
        raise DataError(f"{one} and {two}: two records of one number ({number}); delete one, or give each its run (--set run=NAME)")
    return records


def reproduced(records: pd.DataFrame) -> pd.DataFrame:
    """Our results: a row for each method and column, with the images it was measured on. records: the frame of ``records.load``.

    Where a method was measured with several modules, the notes name them. Raises DataError for two records of one number.
    """
    runs = _one_each(records[records.kind == "evaluate"], "method", "dataset", "images")
    frame = runs[["method", "dataset", "miou", "images", "source", "notes"]].copy()
    several = runs.groupby("method")["module"].transform("nunique") > 1
    frame.loc[several, "notes"] += ("; module " + runs["module"][several]).where(
        frame["notes"][several] != "", "module " + runs["module"][several]
    )
    frame["row"] = frame["method"].map(METHODS).fillna(frame["method"])
    order = {method: i for i, method in enumerate(METHODS)}
    return frame.sort_values(["dataset", "method"], key=lambda c: c.map(order) if c.name == "method" else c).reset_index(drop=True)


def column_of(dataset: str, images: int) -> str:
    """The heading of a benchmark's column: the paper's where the whole official split was measured, else one with its n."""
    names = {benchmark: column for column, benchmark in COLUMNS.items()}
    if dataset in names and images == OFFICIAL[dataset]:
        return names[dataset]
    base = dataset.removeprefix("embedded_")
    short = names.get(base, base.replace("coco_panoptic133", "panoptic-133"))
    return f"{short}{' embedded' if dataset.startswith('embedded_') else ''} (n={int(images)})"


def origin(notes: str) -> str:
    """The origin of one of our rows: "reproduced", with the notes of its record."""
    return f"reproduced, {notes}" if notes else "reproduced"


def table1(records: pd.DataFrame) -> pd.DataFrame:
    """Table 1 in the paper's layout: published rows, then ours; a column of a subset says its n.

    A cell that was not made is empty; ``missing`` says why. ``differences`` compares our numbers with the paper's. Where a method
    was measured with several modules, each has its own row. Raises DataError for two records of one cell: none is averaged.
    """
    paper = published(1).assign(origin="published").set_index(["origin", "method"])
    ours = reproduced(records)
    ours["column"] = [column_of(dataset, images) for dataset, images in zip(ours["dataset"], ours["images"])]
    ours["origin"] = ours["notes"].map(origin)
    wide = ours.pivot_table(index=["origin", "row"], columns="column", values="miou", sort=False)
    wide.index.names = ["origin", "method"]
    made = pd.concat([paper, wide])
    protocol = made.pop("protocol")  # after the paper's own columns
    made.insert(len(paper.columns) - 1, "protocol", protocol)
    return made


def differences(records: pd.DataFrame) -> pd.DataFrame:
    """Published, reproduced and difference of FMbSeg for every column of the paper; for an empty cell the reason."""
    paper = published(1).set_index("method").loc["FMbSeg (paper)"]
    mine = records[(records.kind == "evaluate") & (records.method == "fmbseg")].sort_values("images")
    ours = mine.drop_duplicates("dataset", keep="last").set_index("dataset")  # the whole split before a quick look
    rows = []
    for column, benchmark in COLUMNS.items():
        target = float(paper[column]) if column in paper.index else None
        mine, reason = None, _reason(records, benchmark)
        if benchmark in ours.index:
            run = ours.loc[benchmark]
            mine = run["miou"] if run["images"] == OFFICIAL[benchmark] else None
            reason = "" if mine is not None else f"only a subset was measured: {int(run['images'])} of {OFFICIAL[benchmark]} images"
        if target is None:
            reason = "; ".join(part for part in ("not in the paper", reason) if part)
        rows.append((column, target, mine, mine - target if mine is not None and target is not None else None, reason))
    return pd.DataFrame(rows, columns=["column", "published", "reproduced", "difference", "why empty"]).set_index("column")


def _reason(records: pd.DataFrame, benchmark: str) -> str:
    """Why FMbSeg has no number on a benchmark."""
    if benchmark in set(records[records.kind == "evaluate"]["dataset"]):
        return "FMbSeg was not among the methods evaluated"
    embedded = f"embedded_{benchmark}" in set(records["dataset"])
    return "its data set is not under data_root" + ("; embedded images stand in, in a column of their own" if embedded else "")


def missing(records: pd.DataFrame) -> pd.DataFrame:
    """Columns of Table 1 without a number of ours, each with the reason."""
    here = set(records[records.kind == "evaluate"]["dataset"])
    rows = [(column, _reason(records, benchmark)) for column, benchmark in COLUMNS.items() if benchmark not in here]
    return pd.DataFrame(rows, columns=["column", "reason"])


ABLATIONS = {"architecture": ("linear", "mlp", "transformer"), "loss": ("supcon", "prototype", "tsupcon")}


def table2(records: pd.DataFrame) -> pd.DataFrame:
    """Table 2: the ablations of architecture and loss, published beside ours.

    For CS-171 published, reproduced (mean over the seeds), difference, and why a cell is empty; then, for every measured
    benchmark, mean and spread (sample standard deviation over the seeds). Our own variants follow the paper's.
    Raises DataError for two records of one number.
    """
    paper = published(2).set_index(["ablation", "variant"])["CS-171"]
    runs = _one_each(records[records.kind.isin(list(ABLATIONS))], "kind", "method", "dataset", "images", "param.seed")
    rows = {}
    for kind, known in ABLATIONS.items():
        mine = runs[runs.kind == kind]
        for variant in dict.fromkeys([*known, *mine["method"]]):
            of_variant = mine[mine["method"] == variant]
            whole = of_variant[(of_variant["dataset"] == "coco_stuff171") & (of_variant["images"] == OFFICIAL["coco_stuff171"])]
            target, made = paper.get((kind, variant)), whole["miou"].mean() if len(whole) else None
            row = {"published CS-171": target, "reproduced CS-171": made}
            row["difference"] = made - target if made is not None and target is not None else None
            reason = "the data set is not under data_root" if len(of_variant) else "its notebook has not been run"
            row["why empty"] = "" if made is not None else reason
            for (dataset, images), group in of_variant.groupby(["dataset", "images"], sort=False):
                column = column_of(dataset, images)
                row |= {column: group["miou"].mean(), f"{column} spread": group["miou"].std(), "seeds": len(group)}
                row["notes"] = origin(group["notes"].iloc[0])
            rows[kind, variant] = row
    made = pd.DataFrame.from_dict(rows, orient="index")
    made.index = pd.MultiIndex.from_tuples(made.index, names=["ablation", "variant"])
    return made


def styled(frame: pd.DataFrame):
    """A table for a notebook: two decimals, empty cells blank, our rows in bold."""
    shown = frame.style.format(precision=2, na_rep="")
    if "origin" not in frame.index.names:
        return shown
    ours = frame.index.get_level_values("origin") != "published"
    return shown.apply(lambda column: ["font-weight: bold" if mine else "" for mine in ours], axis=0)


def write(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a table as CSV, atomically."""
    with files.atomic_path(path) as part:
        frame.to_csv(part, float_format="%.2f")
    return Path(path)


def write_markdown(parts: Mapping[str, pd.DataFrame], path: str | Path) -> Path:
    """Write tables under their headings, and the notes on protocol, as one Markdown file."""
    blocks = []
    for heading, frame in parts.items():
        flat = frame.reset_index() if frame.index.names != [None] else frame
        text = flat.map(lambda v: "" if pd.isna(v) else f"{v:.2f}" if isinstance(v, float) else str(v).replace("|", "/"))
        rows = [" | ".join(map(str, row)) for row in [text.columns, ["---"] * len(text.columns), *text.to_numpy().tolist()]]
        blocks.append("\n".join([f"## {heading}", "", *(f"| {row} |" for row in rows)]))
    notes = "\n".join(f"- {note}" for note in NOTES)
    with files.atomic_path(path) as part:
        part.write_text("\n\n".join([*blocks, f"## Read beside the numbers\n\n{notes}"]) + "\n", encoding="utf-8")
    return Path(path)
