"""The notebooks as they are committed, and one run of all of them on the smoke profile (about two minutes)."""

import os
import re
import shutil

import nbformat
import pandas as pd
import papermill
import pytest
from conftest import ROOT
from PIL import Image

from fmbseg import files, schemas
from fmbseg.errors import ParameterError
from fmbseg.runs import records, reproduce, steps
from fmbseg.schemas import TrainRun

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_notebook_has_a_schema():
    assert {p.stem for p in PATHS} == set(schemas.NOTEBOOKS) and len(PATHS) >= 6


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_notebook_is_clean_and_short(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.kernelspec.language == "python"
    cells = code_of(notebook)
    assert [c.metadata.get("tags", []) for c in cells].count(["parameters"]) == 1 and cells[0].metadata.tags == ["parameters"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    lines = [line for cell in cells for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 120 and not [
        line for line in lines if re.match(r"\s*(async def|def|class|from .* import \*|import torch|assert)\b", line)
    ]
    assert max(len(cell.source.splitlines()) for cell in cells) <= 15
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_no_path_device_or_profile_outside_the_parameters(path):
    cells = code_of(nbformat.read(path, as_version=4))
    for cell in cells[1:]:
        for text in re.findall(r"(?<![\w.])[rf]?([\"'])(.*?)\1", cell.source):
            assert not re.search(r"^(cpu|cuda|mps|embedded|paper|smoke)\b|^[~.]{0,2}/|/\w+/|\.(png|jpg|yaml|safetensors)$", text[1]), text
        assert "os.environ" not in cell.source and "Path(" not in cell.source and "open(" not in cell.source
    assert f'profiles.of_notebook("{path.stem}", globals())' in cells[1].source


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project's notebooks, parameters and published tables as the working folder, with its own home."""
    root = tmp_path_factory.mktemp("project")
    for name in ("notebooks", "params", "results/published"):
        shutil.copytree(ROOT / name, root / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMBSEG_HOME", str(root / "home"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.chdir(root)
        yield root


@pytest.fixture(scope="module")
def reproduced(project):
    return reproduce.reproduce("smoke")


@pytest.mark.minutes
def test_all_notebooks_run_and_write_the_table(project, reproduced):
    assert reproduced == project / "results" / "smoke"
    for name in schemas.NOTEBOOKS:
        executed = nbformat.read(reproduced / "notebooks" / f"{name}.ipynb", as_version=4)
        cells = code_of(executed)
        assert all(cell.execution_count for cell in cells if cell.source) and not [
            o for c in cells for o in c.outputs if o.output_type == "error"
        ]
        kinds = {kind for cell in cells for output in cell.outputs for kind in output.get("data", {})}
        assert {"text/html", "image/png"} <= kinds, name
    table = (reproduced / "table1.csv").read_text().splitlines()
    published = (project / "results/published/table1.csv").read_text().splitlines()
    assert len(table) == len(published) + 6 and "drawn (n=6)" in table[0]
    ours = [line for line in table if line.startswith("reproduced") or line.startswith('"reproduced')]
    assert len(ours) == 6 and all("random weights: the number means nothing" in line for line in ours)
    for line in published[1:]:
        assert [other for other in table if other.startswith(f"published,{line.split(',')[0]},")]


@pytest.mark.minutes
def test_ablations_reach_table_2(reproduced):
    table = pd.read_csv(reproduced / "table2.csv").set_index(["ablation", "variant"])
    assert set(table.index) == {
        *(("architecture", name) for name in ("linear", "mlp", "transformer")),
        *(("loss", name) for name in ("supcon", "prototype", "tsupcon", "tsupcon at 0.1")),
    }
    assert (table["seeds"] == 2).all() and table["drawn (n=6)"].between(0, 100).all() and table["drawn (n=6) spread"].notna().all()
    assert table["reproduced CS-171"].isna().all() and table["difference"].isna().all() and (table["why empty"].str.len() > 0).all()
    differences = pd.read_csv(reproduced / "differences.csv").set_index("column")
    assert differences["reproduced"].isna().all() and (differences["why empty"].str.len() > 0).all()
    text = (reproduced / "tables.md").read_text()
    assert all(part in text for part in ("## Table 1", "## Table 2", "| architecture | transformer | 27.61 |"))


@pytest.mark.minutes
def test_records_say_everything(reproduced):
    everything = records.load(reproduced / "records")
    assert set(everything["kind"]) == {"train", "evaluate", "architecture", "encoder", "loss", "stages", "fine_tune"}
    frame = everything[everything.kind.isin(["train", "evaluate"])].set_index("method")
    assert set(frame.index) == {"transformer", "dense", "dense_high_resolution", "stage1.1", "stage1.2", "stage1", "fmbseg"}
    numbers = frame[frame.kind == "evaluate"]
    assert (numbers.images == 6).all() and (numbers.failed == 0).all() and numbers.miou.between(0, 100).all()
    record = files.read_json(reproduced / "records" / "evaluate-fmbseg-drawn.json")
    assert (
        set(record["iou"]) == {"sky", "grass", "sun", "house"}
        and record["parameters"]["temperature"] == frame["param.temperature"]["fmbseg"]
    )
    assert (
        set(record["weights"]) == {"clip", "module"}
        and record["versions"]["torch"]
        and record["hardware"]
        and record["protocol"]["window"] == 128
    )
    stage = files.read_json(reproduced / "records" / "evaluate-stage1-drawn.json")
    assert stage["weights"] == {"clip": "random:ViT-S-32", "sam": "random:tiny_sam"}
    module = steps.module_path(TrainRun(profile="smoke"))
    assert record["weights"]["module"] == files.file_sha256(module)


@pytest.mark.minutes
def test_pictures_of_every_step_are_kept(reproduced):
    names = [p.name for p in (reproduced / "figures").iterdir()]
    for kind in (
        "images",
        "votes-",
        "similarity-",
        "query-",
        "masks-",
        "labels-",
        "patches-",
        "loss",
        "aligned-",
        "drawn-",
        "table1",
        "explore-",
        "ablation-architecture",
        "ablation-loss",
        "encoders",
        "stages-",
        "fine_tune",
        "figure4-",
        "classes",
    ):
        assert [n for n in names if n.startswith(kind)], kind
    for path in (reproduced / "figures").iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG" and min(picture.size) > 100 and picture.convert("L").getextrema() != (255, 255)


@pytest.mark.minutes
def test_a_second_run_makes_nothing_again(project, reproduced):
    def products():
        return {p: p.stat().st_mtime_ns for folder in ("cache", "labels") for p in (project / "home" / folder).rglob("*") if p.is_file()}

    before = products()
    assert len(before) > 20
    reproduce.reproduce("smoke", ["03_stage_1_2_label_masks"])
    assert products() == before


@pytest.mark.minutes
def test_a_parameter_that_papermill_injects_is_checked(project):
    for values, message in (
        ({"temprature": 1}, "did you mean"),
        ({"seed": "one"}, "seed = 'one'"),
        ({"profile": "none"}, "no such folder of params/"),
    ):
        out = project / "executed.ipynb"
        with pytest.raises(papermill.PapermillExecutionError) as caught:
            papermill.execute_notebook(
                project / "notebooks/08_tables.ipynb",
                out,
                {"profile": "smoke"} | values,
                cwd=project / "notebooks",
                progress_bar=False,
                kernel_name="python3",
            )
        assert caught.value.ename == "ParameterError" and message in caught.value.evalue.replace("known are", "did you mean")


def test_bad_overrides_are_refused_before_anything_runs(project, monkeypatch):
    monkeypatch.setattr(reproduce, "_execute", lambda *_: pytest.fail("ran"))
    for values in ({"temprature": 0.1}, {"epochs": "two"}, {"min_area": 7}):
        with pytest.raises(ParameterError, match=next(iter(values))):
            reproduce.reproduce("smoke", overrides=values)
    with pytest.raises(ParameterError, match="99_none"):
        reproduce.reproduce("smoke", ["99_none"])
