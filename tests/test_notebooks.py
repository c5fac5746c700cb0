"""The notebooks as they are committed, and one run of all of them on the smoke profile (some minutes): what they say is checked."""

import math
import os
import re
import shutil

import nbformat
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image

from fmbseg import files, profiles, schemas
from fmbseg.runs import records, reproduce, train
from fmbseg.schemas import TrainRun

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
AGREEMENTS = {"01": 6, "02": 5, "03": 3, "04": 6, "05": 3, "06": 1, "07": 5, "08": 1, "10": 6, "11": 1}
"""How many cells of a notebook check that the method in the open and the library agree."""


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_notebook_does_a_step():
    assert {p.stem for p in PATHS} == set(schemas.NOTEBOOKS)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_a_notebook_is_clean_and_short(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.kernelspec.language == "python"
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5) and len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    cells = code_of(notebook)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    lines = [line for cell in cells for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 120 and max(len(cell.source.splitlines()) for cell in cells) <= 25
    assert not [line for line in lines if re.match(r"\s*(async def|def|class|from .* import \*|assert)\b", line)]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_a_notebook_opens_with_the_equations_then_the_parameters(path):
    notebook = nbformat.read(path, as_version=4)
    first, parameters, imports = notebook.cells[:3]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "$" in first.source
    assert parameters.metadata.tags == ["parameters"] and parameters.source.splitlines()[-1] == 'profile = "embedded"'
    assert [c.metadata.get("tags", []) for c in notebook.cells].count(["parameters"]) == 1
    assert f'p = profiles.of_notebook("{path.stem}", globals())' in imports.source.splitlines()


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_no_path_device_or_profile_outside_the_parameters(path):
    for cell in code_of(nbformat.read(path, as_version=4))[1:]:
        for text in re.findall(r"(?<![\w.])[rf]?([\"'])(.*?)\1", cell.source):
            assert not re.search(r"^(cpu|cuda|mps|embedded|paper|smoke)\b|^[~.]{0,2}/|/\w+/|\.(png|jpg|yaml|safetensors)$", text[1]), text
        assert "os.environ" not in cell.source and "Path(" not in cell.source and "open(" not in cell.source


# ---------------------------------------------------------------- one run of all


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


@pytest.fixture(scope="module")
def printed(reproduced):
    """Number of a notebook -> all that its executed copy printed."""
    found = {}
    for name in schemas.NOTEBOOKS:
        executed = nbformat.read(reproduced / "notebooks" / f"{name}.ipynb", as_version=4)
        outputs = [output for cell in code_of(executed) for output in cell.outputs]
        found[name[:2]] = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    return found


@pytest.mark.minutes
def test_all_notebooks_run_and_show_figures(project, reproduced):
    assert reproduced == project / "results" / "smoke"
    for name in schemas.NOTEBOOKS:
        cells = code_of(nbformat.read(reproduced / "notebooks" / f"{name}.ipynb", as_version=4))
        outputs = [output for cell in cells for output in cell.outputs]
        assert all(cell.execution_count for cell in cells if cell.source) and not [o for o in outputs if o.output_type == "error"]
        assert "image/png" in {kind for output in outputs for kind in output.get("data", {})}, name


@pytest.mark.minutes
@pytest.mark.parametrize("number", AGREEMENTS)
def test_the_method_in_the_open_agrees_with_the_library(printed, number):
    said = re.findall(r"agree: (\w+)", printed[number])
    assert said == ["True"] * len(said) and len(said) >= AGREEMENTS[number], printed[number]


@pytest.mark.minutes
def test_stage_1_2_finds_and_paints_masks(printed):
    assert int(re.search(r"Stage 1\.2 masks: (\d+)", printed["03"])[1]) > 0
    painted = {title: int(share) for title, share in re.findall(r"(Stage 1\.[12]|combined) labels (\d+)%", printed["03"])}
    assert painted["Stage 1.1"] > 0 and painted["Stage 1.2"] > 0
    assert painted["combined"] >= max(painted["Stage 1.1"], painted["Stage 1.2"])


@pytest.mark.minutes
def test_the_weight_of_the_texts_is_what_eq_1_gives(printed):
    k, n, same, weight = re.search(r"K / \(BN \+ K\) = (\d+) / \((\d+) \+ (\d+)\) = ([\d.]+)", printed["04"]).groups()
    assert k == same and math.isclose(int(k) / (int(n) + int(k)), float(weight), abs_tol=1e-4) and int(n) > 100
    in_the_open, run = (re.search(rf"{title} +([\d. ]+)\n", printed["04"])[1].split() for title in ("in the open", "runs.train"))
    assert in_the_open == run and len(run) == 2


@pytest.mark.minutes
def test_the_background_rule_makes_more_of_the_image_background(printed):
    words = re.findall(r"(\d+) words -> (\d+) classes", printed["05"])
    assert words == [("21", "21"), ("46", "21")]


@pytest.mark.minutes
def test_what_differs_between_modules_is_seen(printed):
    seen = {
        name: (int(changed), int(all_)) for name, all_, changed in re.findall(r"(\w+): 1 patch of (\d+) changed -> (\d+)", printed["06"])
    }
    assert seen == {"linear": (1, 64), "mlp": (1, 64), "transformer": (64, 64)}


@pytest.mark.minutes
def test_two_seeds_tell_no_variants_apart(printed):
    for number, count in (("06", 2), ("07", 3)):
        assert printed[number].count("CANNOT be told apart") == count and "can be told apart:" not in printed[number]
        assert "2 seeds: no p-value can be under 0.5" in printed[number]


@pytest.mark.minutes
def test_table_1_holds_published_and_reproduced_rows(project, reproduced):
    table = pd.read_csv(reproduced / "table1.csv")
    published = pd.read_csv(project / "results/published/table1.csv")
    assert list(table[table["origin"] == "published"]["method"]) == list(published["method"])
    ours = table[table["origin"] != "published"]
    assert len(ours) == len(profiles.load("evaluate", "smoke").methods) and ours["drawn (n=6)"].between(0, 100).all()
    assert ours["origin"].str.contains("random weights: the number means nothing").all()
    assert ours[[column for column in published if column not in ("method", "protocol", "training_data")]].isna().all(axis=None)


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
    everything = records.load(reproduced / "records/main")
    assert set(everything["kind"]) == {"train", "evaluate", "architecture", "encoder", "loss", "stages", "fine_tune"}
    numbers = everything[everything["kind"] == "evaluate"]
    assert set(numbers["method"]) == set(profiles.load("evaluate", "smoke").methods)
    assert (numbers["images"] == 6).all() and (numbers["failed"] == 0).all() and numbers["miou"].between(0, 100).all()
    record = files.read_json(reproduced / "records/main" / "evaluate-fmbseg-drawn.json")
    assert set(record["iou"]) == {"sky", "grass", "sun", "house"}
    assert record["parameters"]["temperature"] == profiles.load("train", "smoke").temperature
    assert record["weights"]["module"] == files.sha256_of(train.module_path(TrainRun(profile="smoke")))
    assert record["versions"]["torch"] and record["hardware"] and record["protocol"]["window"] == 128
    stage = files.read_json(reproduced / "records/main" / "evaluate-stage1-drawn.json")
    assert stage["weights"] == {"clip": "random:ViT-S-32", "sam": "random:tiny_sam"}


FIGURES = """images votes- similarity- query- failure- masks- labels- patches- loss aligned- drawn- figure4- table1 classes explore-
    ablation-architecture ablation-architecture-curves ablation-loss ablation-loss-curves encoders stages-drawn fine_tune"""


@pytest.mark.minutes
def test_figures_of_every_step_are_kept(reproduced):
    paths = list((reproduced / "figures").iterdir())
    for kind in FIGURES.split():
        assert [p for p in paths if (p.stem.startswith(kind) if kind.endswith("-") else p.stem == kind)], kind
    for path in paths:
        with Image.open(path) as shown:
            assert shown.format == "PNG" and min(shown.size) > 100 and shown.convert("L").getextrema() != (255, 255)


@pytest.mark.minutes
def test_a_second_run_makes_nothing_again(project, reproduced):
    kept = ("cache", "labels", "modules")
    before = {p: p.stat().st_mtime_ns for folder in kept for p in (project / "home" / folder).rglob("*") if p.is_file()}
    assert len(before) > 20
    reproduce.reproduce("smoke", ["03_stage_1_2_label_masks", "04_train_alignment"])
    assert {p: p.stat().st_mtime_ns for folder in kept for p in (project / "home" / folder).rglob("*") if p.is_file()} == before
