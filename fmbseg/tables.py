"""Tables 1 and 2: the paper's numbers beside ours, and the reason where there is no number of ours."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fmbseg import storage

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
"""Columns of Table 1 and the benchmark behind each; the ones with background beside those without (see NOTES)."""

METHOD_ROWS = {
    "dense": "dense zero-shot (MaskCLIP style), window",
    "dense_high_resolution": "dense zero-shot, overlapping crops",
    "stage1.1": "Stage 1.1 alone",
    "stage1.2": "Stage 1.2 alone",
    "stage1": "Stage 1.1 + 1.2",
    "fmbseg": "FMbSeg",
}

NOTES = (
    "CS-171 is 29.88 in the paper's Table 1 and 27.61 in its Table 2 for the same model; the ablation's setting is not stated.",
    "Many published PC-59 baselines are other papers' Context-60 numbers and many CO-80 ones COCO-Object with background (81);"
    " FMbSeg's own are without background. With and without are separate columns here and never to be compared.",
    "ReCo's published CO-80 of 31.6 repeats TCL's cell; others report 15.7. TCL's row is with PAMR refinement; FMbSeg uses none.",
    "Eq. 1 taken literally gives the text term a few per cent of the weight and no temperature; what was used is in each record.",
)


def published(table: int) -> pd.DataFrame:
    """The paper's Table 1 or 2, from results/published/."""
    return pd.read_csv(storage.project_root() / "results" / "published" / f"table{table}.csv")


def reproduced(records: pd.DataFrame) -> pd.DataFrame:
    """Our rows: one a method and column, with what it was measured on. records: as ``records.load`` gives them."""
    runs = records[records.kind == "evaluate"]
    frame = runs[["method", "dataset", "miou", "images", "source", "notes"]].copy()
    frame["row"] = frame["method"].map(METHOD_ROWS).fillna(frame["method"])
    order = {method: i for i, method in enumerate(METHOD_ROWS)}
    return frame.sort_values(["dataset", "method"], key=lambda c: c.map(order) if c.name == "method" else c).reset_index(drop=True)


def table1(records: pd.DataFrame) -> pd.DataFrame:
    """Table 1 as the paper lays it out: published rows, then ours; a column of our own photographs says its n.

    A cell that was not made is empty; ``missing`` says why.
    """
    paper = published(1).assign(origin="published").set_index(["origin", "method"])
    ours = reproduced(records)
    names = {benchmark: column for column, benchmark in COLUMNS.items()}
    ours["column"] = [f"{names.get(dataset) or _short(dataset)} (n={int(n)})" for dataset, n in zip(ours["dataset"], ours["images"])]
    ours["origin"] = ["reproduced, " + note if note else "reproduced" for note in ours["notes"]]
    wide = ours.pivot_table(index=["origin", "row"], columns="column", values="miou", sort=False)
    wide.index.names = ["origin", "method"]
    return pd.concat([paper, wide])


def _short(dataset: str) -> str:
    known = {f"embedded_{benchmark}": f"{column} embedded" for column, benchmark in COLUMNS.items()}
    return known.get(dataset, dataset.replace("embedded_coco_panoptic133", "panoptic-133 embedded"))


def missing(records: pd.DataFrame) -> pd.DataFrame:
    """Columns of Table 1 without a number of ours, each with the reason."""
    here = set(records[records.kind == "evaluate"]["dataset"])
    rows = [
        (
            column,
            "its data set is not under data_root; embedded photographs stand in where they can"
            if column.startswith("CO")
            else "its data set is not under data_root",
        )
        for column, benchmark in COLUMNS.items()
        if benchmark not in here
    ]
    return pd.DataFrame(rows, columns=["column", "reason"])


def styled(frame: pd.DataFrame):
    """The table for a notebook: two decimals, empty cells blank, our rows set off."""
    ours = frame.index.get_level_values("origin") != "published"

    def shade(column: pd.Series) -> list[str]:
        return ["font-weight: bold" if mine else "" for mine in ours]

    return frame.style.format(precision=2, na_rep="").apply(shade, axis=0)


def write(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a table as CSV, atomically."""
    with storage.atomic_path(path) as part:
        frame.to_csv(part, float_format="%.2f")
    return Path(path)
