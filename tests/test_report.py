"""The report of a folder of results, on planted records: what stands in it, what is said to be missing, what is refused."""

import base64
import re
from html.parser import HTMLParser

import pytest
from conftest import ROOT
from PIL import Image

from fmbseg.errors import DataError
from fmbseg.runs import report
from fmbseg.runs.records import Record


def planted(kind, method, dataset, miou, images, **more):
    known = {"versions": {"python": "3.11.0", "torch": "9.8.7"}, "revision": "abc123", "hardware": "a machine"}
    return Record(kind, method, {"seed": 0}, dataset, "planted", images, miou=miou, iou={"cat": miou}, **(known | more))


class Page(HTMLParser):
    """Tables as rows of cells, by their section's heading; and every address that the page names."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tables, self.addresses, self.heading, self.into = text, {}, [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append("")
        self.heading = "" if tag == "h2" else self.heading
        self.into = tag if tag in ("td", "th", "h2") else self.into

    def handle_endtag(self, tag):
        self.into = None if tag == self.into else self.into

    def handle_data(self, data):
        if self.into == "h2":
            self.heading += data
        elif self.into:
            self.tables[self.heading][-1][-1] += data


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page of these records, written and read back; the working folder is the project."""
    monkeypatch.chdir(ROOT)

    def make(*made):
        for i, record in enumerate(made):
            record.write(tmp_path / "results" / "records", f"{record.kind}{i}")
        return Page(report.write(tmp_path / "results").read_text(encoding="utf-8"))

    return make


def test_ours_and_published_stand_apart_with_n_and_notes(page):
    made = page(
        planted("evaluate", "fmbseg", "voc20", 41.5, 1449),
        planted("evaluate", "fmbseg", "embedded_coco_object80", 3.25, 30, notes=["a stand-in"]),
    )
    head, *rows = made.tables["Table 1"]
    ours = rows[next(i for i, row in enumerate(rows) if row[0].startswith("reproduced")) :]
    assert [row[0] for row in rows if len(row) == 1] == [report.PUBLISHED, "reproduced, a stand-in", "reproduced"]
    cells = [{name: cell for name, cell in zip(head, row) if cell} for row in ours if len(row) > 1]
    assert cells == [{"method": "FMbSeg", "CO-80 embedded (n=30)": "3.25"}, {"method": "FMbSeg", "PV-20": "41.50"}]
    assert "Columns of ours without an n are the whole official split: PV-20 1449 images." in made.text
    beside = {row[0]: row for row in made.tables["FMbSeg beside the paper"]}
    assert beside["PV-20"][1:4] == ["85.65", "41.50", "-44.15"] and beside["CO-80"][1:4] == ["57.63", "", ""] and beside["CO-80"][4]
    assert "<strong>a stand-in</strong> (1 of 2 records)" in made.text


def test_what_is_not_there_is_said_in_a_sentence(page):
    made = page(planted("train", "transformer", "images", None, 64, seconds=9.0))
    for sentence in ("Nothing was evaluated yet", "No ablation was run yet", "No stages, encoders or fine-tuning", "No figure is here yet"):
        assert made.text.count(sentence) == 1
    assert set(made.tables) == {"FMbSeg beside the paper", "Training", "Versions"}
    assert made.tables["Training"][1] == ["transformer", "planted", "64", "9.00", "a machine", ""]
    assert all(row[2] == "" for row in made.tables["FMbSeg beside the paper"][1:])
    assert ["torch", "9.8.7"] in made.tables["Versions"] and ["revision", "abc123"] in made.tables["Versions"]


def test_ablations_and_comparisons_have_their_tables(page):
    made = page(
        planted("loss", "tsupcon", "embedded_coco_object80", 2.0, 30, notes=["a stand-in"]),
        planted("loss", "tsupcon", "embedded_coco_object80", 4.0, 30, notes=["a stand-in"]),
        planted("stages", "stage1.1", "embedded_coco_object80", 8.0, 30, precision=50.0, coverage=75.0, notes=["a stand-in"]),
    )
    head, *rows = made.tables["Table 2: architecture and loss"]
    row = next(dict(zip(head, row)) for row in rows if row[:2] == ["loss", "tsupcon"])
    assert row["CO-80 embedded (n=30)"] == "3.00" and row["seeds"] == "2" and "a stand-in" in row["notes"]
    assert row["published CS-171"] == "27.61" and row["reproduced CS-171"] == row["difference"] == ""
    row = ["stages", "embedded_coco_object80", "stage1.1", "30", "1", "8.00", "50.00", "75.00", "a stand-in"]
    assert made.tables["Other comparisons"][1] == row


def test_names_are_escaped(page):
    nasty = "<script>alert('&')</script>"
    made = page(planted("evaluate", nasty, "voc20", 1.0, 1449, notes=[nasty]), planted("stages", nasty, nasty, 1.0, 3))
    assert "<script" not in made.text and "&lt;script&gt;" in made.text
    assert nasty in [row[0] for row in made.tables["Table 1"]] and made.tables["Other comparisons"][1][2] == nasty


def test_the_page_needs_no_other_file(page, tmp_path):
    for name, colour in (("bear", "red"), ("table1", "blue")):
        (tmp_path / "results/figures").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), colour).save(tmp_path / f"results/figures/{name}.png")
    made = page(planted("evaluate", "dense", "voc20", 1.0, 1449))
    pictures = [a for a in made.addresses if not a.startswith("#")]
    expected = [base64.b64encode((tmp_path / f"results/figures/{name}.png").read_bytes()).decode() for name in ("table1", "bear")]
    assert pictures == [f"data:image/png;base64,{picture}" for picture in expected]
    assert {a[1:] for a in made.addresses if a.startswith("#")} <= set(re.findall(r'id="(\w+)"', made.text))
    assert not re.search(r"https?://|url\(|@import", made.text) and "prefers-color-scheme: dark" in made.text


def test_a_folder_without_records_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(DataError, match="holds no record; run notebooks 04 and 05"):
        report.write(tmp_path)
    with pytest.raises(DataError, match="none: no such folder; give one of results/"):
        report.write(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_out_is_where_the_page_goes(page, tmp_path):
    page(planted("evaluate", "dense", "voc20", 1.0, 1449))
    assert report.write(tmp_path / "results", tmp_path / "new" / "page.html").read_text() == report.html(tmp_path / "results")
    with pytest.raises(DataError, match="a folder; give --out the name of a file"):
        report.write(tmp_path / "results", tmp_path)
