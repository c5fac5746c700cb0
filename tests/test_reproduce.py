"""Notebooks run headlessly, and the report of a folder of results."""

import dataclasses
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

from fmbseg.errors import DataError, ParameterError
from fmbseg.runs import reproduce
from fmbseg.runs.records import Record


def planted(kind, method, dataset, miou, images, **more):
    known = {"versions": {"python": "3.11.0", "torch": "9.8.7"}, "revision": "abc123", "hardware": "a machine"}
    return Record(kind, method, {"seed": more.pop("seed", 0)}, dataset, "planted", images, miou=miou, iou={"cat": miou}, **(known | more))


def test_every_parameter_is_checked_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    ran = []
    monkeypatch.setattr(reproduce, "_execute", lambda name, values, out: ran.append((name, values, out)))
    for wrong in ({"temprature": 1}, {"temperature": "hot"}, {"limit": 0}):
        with pytest.raises(ParameterError):
            reproduce.reproduce("smoke", (), wrong | {"results_dir": str(tmp_path)})
    with pytest.raises(ParameterError, match="notebook '99_none': unknown"):
        reproduce.reproduce("smoke", ["99_none"])
    assert not ran and not list(tmp_path.iterdir())
    reproduce.reproduce("smoke", ["04_train_alignment", "08_tables"], {"epochs": 3, "results_dir": str(tmp_path)})
    wanted = {"profile": "smoke", "results_dir": str(tmp_path)}
    assert ran == [  # a notebook is given what it has
        ("04_train_alignment", wanted | {"epochs": 3}, tmp_path / "smoke/notebooks/04_train_alignment.ipynb"),
        ("08_tables", wanted, tmp_path / "smoke/notebooks/08_tables.ipynb"),
    ]


def test_the_report_holds_the_tables_and_the_figures_of_its_records(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = [
        planted("evaluate", "fmbseg", "voc20", 41.53, 1449),
        planted("evaluate", "dense", "embedded_coco_object80", 3.25, 30, notes=["a stand-in"]),
        planted("loss", "tsupcon", "embedded_coco_object80", 2.0, 30),
        planted("loss", "tsupcon", "embedded_coco_object80", 4.18, 30, seed=1),
    ]
    folder = tmp_path / "smoke"
    for i, record in enumerate(made):
        record.write(folder / "records" / "main", f"{record.kind}{i}")
    out = reproduce.report(folder, tmp_path / "new" / "page.html")
    text = out.read_text(encoding="utf-8")
    body = re.sub(r"<script.*?</script>|<style.*?</style>", "", text, flags=re.S)
    for shown in ("85.65", "41.53", "-44.12", "CO-80 embedded (n=30)", "3.25", "a stand-in", "3.09", "27.61"):
        assert shown in body, shown
    assert "import pandas" not in body  # the code is left out
    assert set(re.findall(r'<img[^>]*src="(\w+:\w+/\w+)', body)) == {"data:image/png"}


def test_a_folder_without_records_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="holds no record"):
            reproduce.report(folder)
    assert list(tmp_path.iterdir()) == []
    planted("train", "linear", "pool", None, 80).write(tmp_path / "smoke/records/main")
    with pytest.raises(DataError, match="records/main: holds records of train alone; run notebook 05 or fmbseg evaluate first"):
        reproduce.report(tmp_path / "smoke")
    with pytest.raises(DataError, match="records/other: holds no record"):
        reproduce.report(tmp_path / "smoke", run="other")


def test_the_report_is_of_the_run_that_was_asked_for(monkeypatch, tmp_path):
    dataclasses.replace(planted("evaluate", "dense", "voc20", 1.0, 9), run="mine").write(tmp_path / "smoke/records/mine")
    given = []
    monkeypatch.setattr(reproduce, "_execute", lambda name, values, out: given.append(values) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reproduce.report(tmp_path / "smoke", run="mine")
    assert given == [{"profile": "smoke", "results_dir": str(tmp_path), "run": "mine"}]


def test_widgets_that_print_do_not_stop_a_headless_run_and_keep_their_output(tmp_path):
    """With plain papermill, one of so many cells waits for ever for a message whose arrival was lost."""
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}})
    show = "for i in range(5):\n    ipywidgets.interact(lambda x: print('shown', x) or display(x), x=(1, 5))"
    notebook.cells = [nbformat.v4.new_code_cell(text) for text in ["import ipywidgets", *[show] * 6]]
    nbformat.write(notebook, tmp_path / "in.ipynb")
    command = [sys.executable, "-m", "fmbseg.runs.headless", str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), "--no-progress-bar"]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    state = nbformat.read(tmp_path / "out.ipynb", 4).metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    shown = [one["state"]["outputs"] for one in state.values() if one["model_name"] == "OutputModel"]
    assert len(shown) == 30 and all(outputs[0]["text"] == "shown 3\n" for outputs in shown)
