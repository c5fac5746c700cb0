"""Tables 1 and 2 from planted records, checked cell by cell."""

import dataclasses
import math

import pandas as pd
import pytest
from conftest import ROOT

from fmbseg.errors import DataError
from fmbseg.runs import records, tables
from fmbseg.runs.records import Record


def planted(kind, method, dataset, miou, images, seed=0, **more):
    parameters = {"temperature": 0.07, "seed": seed}
    return Record(kind, method, parameters, dataset, "planted", images, miou=miou, iou={"cat": miou, "dog": None}, **more)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Writes records and reads them back as a frame; the working folder is the project."""
    monkeypatch.chdir(ROOT)

    def write(*made):
        for i, record in enumerate(made):
            record.write(tmp_path / "main", str(i))
        return records.load(tmp_path / "main")

    return write


def test_published_rows_stand_as_published(load):
    table = tables.table1(load(planted("evaluate", "fmbseg", "voc20", 11.5, 1449)))
    paper = pd.read_csv(ROOT / "results/published/table1.csv").set_index("method")
    for method in paper.index:
        for column in ("PV-21", "PV-20", "PC-59", "CO-80", "CS-171", "City", "ADE"):
            given, shown = paper.loc[method, column], table.loc[("published", method), column]
            assert given == shown or (math.isnan(given) and math.isnan(shown))


def test_every_row_of_later_methods_has_its_source_and_protocol(monkeypatch):
    monkeypatch.chdir(ROOT)
    later = tables.later()
    assert later.index.is_unique and len(later) > 20
    assert later.reset_index()[["method", "backbone", "supervision", "protocol", "source"]].notna().all(axis=None)
    eight = later[["PV-21", "PV-20", "PC-60", "PC-59", "CO-81", "CS-171", "City", "ADE"]]
    assert set(eight) <= set(tables.COLUMNS) and (eight.notna().any(axis=1) | later["mean of eight"].notna()).all()
    whole = eight.dropna()
    assert len(whole) > 5 and (whole.mean(axis=1) - later.loc[whole.index, "mean of eight"]).abs().max() < 0.06


def test_every_cell_of_ours_is_where_it_was_measured(load):
    frame = load(
        planted("evaluate", "dense", "voc20", 40.0, 1449),
        planted("evaluate", "fmbseg", "voc20", 50.0, 1449),
        planted("evaluate", "fmbseg", "voc21", 30.0, 116),
        planted("evaluate", "fmbseg", "embedded_coco_object80", 7.0, 30, notes=["a note"]),
        planted("loss", "tsupcon", "voc20", 99.0, 1449),
        planted("train", "linear", "voc20", None, 5),
    )
    table = tables.table1(frame)
    ours = table[table.index.get_level_values("origin") != "published"]
    dense, mine = "dense zero-shot (MaskCLIP style), window", "FMbSeg"
    assert set(ours.index) == {("reproduced", dense), ("reproduced", mine), ("reproduced, a note", mine)}
    cells = {(row[1], column): value for row, values in ours.iterrows() for column, value in values.items() if pd.notna(value)}
    assert cells == {
        (dense, "PV-20"): 40.0,
        (mine, "PV-20"): 50.0,
        (mine, "PV-21 (n=116)"): 30.0,
        (mine, "CO-80 embedded (n=30)"): 7.0,
    }
    assert table.loc[("published", "FMbSeg (paper)")].filter(like="n=").isna().all()
    assert list(table.columns[:2]) == ["training_data", "PV-21"] and "protocol" in table.columns


def test_a_difference_stands_only_where_the_whole_split_was_measured(load):
    made = tables.differences(
        load(
            planted("evaluate", "fmbseg", "voc20", 80.0, 1449),
            planted("evaluate", "fmbseg", "voc21", 60.0, 116),
            planted("evaluate", "dense", "ade150", 9.0, 2000),
            planted("evaluate", "fmbseg", "embedded_coco_object80", 7.0, 30),
            planted("evaluate", "fmbseg", "context60", 33.0, 5104),
        )
    )
    row = made.loc["PV-20"]
    assert (row["published"], row["reproduced"], round(row["difference"], 2), row["why empty"]) == (85.65, 80.0, -5.65, "")
    assert made.loc["PV-21", ["reproduced", "difference"]].isna().all()
    assert made.loc["PV-21", "why empty"] == "only a subset was measured: 116 of 1449 images"
    assert made.loc["ADE", "why empty"] == "FMbSeg was not among the methods evaluated"
    assert made.loc["CO-80", "why empty"].startswith("its data set is not under data_root; embedded images stand in")
    assert made.loc["City", "why empty"] == "its data set is not under data_root"
    assert made.loc["PC-60", "reproduced"] == 33.0 and math.isnan(made.loc["PC-60", "difference"])
    assert made.loc["PC-60", "why empty"] == "not in the paper" and len(made) == 9


def test_two_records_of_one_number_are_refused_and_never_averaged(load):
    """A quick look beside the whole set is another number, and so is another seed."""
    quick = planted("evaluate", "fmbseg", "voc20", 10.0, 3, limit=3)
    frame = load(planted("evaluate", "fmbseg", "voc20", 50.0, 1449), quick, planted("evaluate", "dense", "voc20", 40.0, 1449))
    cells = tables.table1(frame).loc[("reproduced", "FMbSeg")]
    assert (cells["PV-20"], cells["PV-20 (n=3)"]) == (50.0, 10.0)
    assert tables.differences(frame).loc["PV-20", "reproduced"] == 50.0
    with pytest.raises(DataError, match=r"main/1.json and .*main/3.json: two records of one number \(fmbseg, voc20, 3\)"):
        tables.table1(load(planted("evaluate", "dense", "voc20", 50.0, 1449), quick, planted("evaluate", "dense", "ade150", 1.0, 9), quick))
    twice = [planted("loss", "tsupcon", "voc20", value, 9, seed=1) for value in (1.0, 3.0)]
    with pytest.raises(DataError, match=r"two records of one number \(loss, tsupcon, voc20, 9, 1\); delete one, or give each its run"):
        tables.table2(load(*twice))


def test_each_module_has_a_row_of_its_own(load):
    first, second = {"module": "a" * 64}, {"module": "b" * 64}
    frame = load(
        planted("evaluate", "fmbseg", "voc20", 50.0, 1449, weights=first),
        planted("evaluate", "fmbseg", "voc21", 30.0, 1449, weights=second, notes=["a note"]),
        planted("evaluate", "dense", "voc20", 40.0, 1449),
    )
    ours = tables.table1(frame)
    rows = [index for index in ours.index if index[0] != "published"]
    dense = "dense zero-shot (MaskCLIP style), window"
    assert set(rows) == {
        ("reproduced", dense),
        ("reproduced, module aaaaaaaa", "FMbSeg"),
        ("reproduced, a note; module bbbbbbbb", "FMbSeg"),
    }
    assert ours.loc[("reproduced, module aaaaaaaa", "FMbSeg")][["PV-20"]].tolist() == [50.0]
    same = load(*[planted("evaluate", "fmbseg", name, 1.0, 1449, weights=first) for name in ("voc20", "voc21")])
    assert ("reproduced", "FMbSeg") in tables.table1(same).index


def test_missing_columns_have_a_reason(load):
    made = tables.missing(load(planted("evaluate", "dense", "voc20", 1.0, 1449))).set_index("column")["reason"]
    assert "PV-20" not in made and set(made.index) == set(tables.COLUMNS) - {"PV-20"} and all(made)


def test_table_2_cell_by_cell(load):
    made = tables.table2(
        load(
            *[planted("architecture", "linear", "coco_stuff171", value, 5000, seed) for seed, value in enumerate((20.0, 22.0))],
            *[planted("architecture", "mlp", "embedded_coco_panoptic133", value, 20, seed) for seed, value in enumerate((1.0, 2.0, 6.0))],
            planted("loss", "tsupcon", "coco_stuff171", 90.0, 18),
            planted("loss", "colder", "embedded_coco_panoptic133", 4.0, 20),
            planted("evaluate", "fmbseg", "coco_stuff171", 77.0, 5000),
        )
    )
    assert list(made.index)[:3] == [("architecture", "linear"), ("architecture", "mlp"), ("architecture", "transformer")]
    assert list(made.index)[3:] == [("loss", "supcon"), ("loss", "prototype"), ("loss", "tsupcon"), ("loss", "colder")]
    linear = made.loc[("architecture", "linear")]
    assert (linear["published CS-171"], linear["reproduced CS-171"], round(linear["difference"], 2), linear["seeds"]) == (
        25.32,
        21.0,
        -4.32,
        2,
    )
    assert linear["CS-171"] == 21.0 and round(linear["CS-171 spread"], 4) == round(math.sqrt(2), 4)
    mlp = made.loc[("architecture", "mlp")]
    assert (mlp["panoptic-133 embedded (n=20)"], mlp["seeds"]) == (3.0, 3) and math.isnan(mlp["reproduced CS-171"])
    assert mlp["why empty"] == "the data set is not under data_root"
    assert made.loc[("architecture", "transformer"), "why empty"] == "its notebook has not been run"
    subset = made.loc[("loss", "tsupcon")]  # 18 images are not the split: never set against the paper's number
    assert math.isnan(subset["reproduced CS-171"]) and subset["CS-171 (n=18)"] == 90.0 and math.isnan(subset["difference"])
    assert math.isnan(made.loc[("loss", "colder"), "published CS-171"])
    assert made.loc[("loss", "supcon"), "published CS-171"] == 24.61


def test_table_2_without_any_record_is_all_published_and_reasons(load):
    made = tables.table2(load(planted("evaluate", "dense", "voc20", 1.0, 1449)))
    assert made["reproduced CS-171"].isna().all() and (made["why empty"] == "its notebook has not been run").all() and len(made) == 6


def test_written_tables_hold_the_same_numbers(load, tmp_path):
    frame = load(planted("evaluate", "fmbseg", "voc20", 80.125, 1449), planted("loss", "tsupcon", "coco_stuff171", 30.0, 5000))
    table, second = tables.table1(frame), tables.table2(frame)
    back = pd.read_csv(tables.write(table, tmp_path / "t.csv"), index_col=[0, 1])
    assert back.shape == table.shape and back.loc[("reproduced", "FMbSeg"), "PV-20"] in (80.12, 80.13)
    text = tables.write_markdown({"Table 1": table, "Table 2": second}, tmp_path / "t.md").read_text()
    assert "## Table 1" in text and "| loss | tsupcon | 27.61 | 30.00 | 2.39 |" in text
    assert all(note in text for note in tables.NOTES)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = {block: {row.count("|") for row in rows if (block in row)} for block in ("published |", "loss |")}
    assert all(len(found) == 1 for found in widths.values()), "every row of a table has as many cells"


def test_records_are_one_tidy_frame(load):
    frame = load(
        planted("loss", "tsupcon", "voc20", 1.5, 3, seed=4), dataclasses.replace(planted("train", "linear", "p", None, 2), seconds=9.0)
    )
    row = frame[frame.kind == "loss"].iloc[0]
    assert (row["param.seed"], row["param.temperature"], row["iou.cat"], row["miou"]) == (4, 0.07, 1.5, 1.5) and pd.isna(row["iou.dog"])
    assert frame[frame.kind == "train"].iloc[0]["seconds"] == 9.0
    pivot = frame.pivot_table(index="method", columns="dataset", values="miou")
    assert pivot.loc["tsupcon", "voc20"] == 1.5


def test_no_record_is_told(tmp_path):
    with pytest.raises(DataError, match="holds no record; run notebooks 04 and 05, or: fmbseg reproduce embedded"):
        records.load(tmp_path)
