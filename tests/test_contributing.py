"""Licence, citation, and the hooks before a commit: they leave notebooks fit for papermill."""

import shlex
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def hooks():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local" and all(hook["language"] == "system" for hook in repository["hooks"])
    return {hook["id"]: hook for hook in repository["hooks"]}


def strip(path):
    """Run the hook on a file exactly as pre-commit would: entry, arguments, files."""
    hook = hooks()["nbstripout"]
    program, *rest = shlex.split(hook["entry"])
    subprocess.run([Path(sysconfig.get_path("scripts"), program), *rest, *hook["args"], path], check=True)


def test_an_executed_notebook_is_stripped_to_what_was_committed(tmp_path):
    """As Jupyter and papermill leave it: outputs, counts, times, versions. What papermill needs stays, byte for byte."""
    path = tmp_path / "executed.ipynb"
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    notebook.metadata.language_info |= {"version": "3.11.7", "file_extension": ".py", "mimetype": "text/x-python"}
    notebook.metadata.language_info |= {"codemirror_mode": {"name": "ipython", "version": 3}, "nbconvert_exporter": "python"}
    notebook.metadata.language_info["pygments_lexer"] = "ipython3"
    notebook.metadata.papermill = {"duration": 1.0, "input_path": "a.ipynb"}
    for i, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        cell.execution_count = i + 1
        cell.outputs = [nbformat.v4.new_output("stream", text="seen\n")]
        cell.metadata |= {"execution": {"iopub.status.idle": "now"}, "papermill": {"duration": 0.1}}
    nbformat.write(notebook, path)
    assert "seen" in path.read_text()
    strip(path)
    stripped, committed = nbformat.read(path, as_version=4), nbformat.read(NOTEBOOKS[0], as_version=4)
    assert stripped.metadata.kernelspec == committed.metadata.kernelspec and stripped.metadata.kernelspec.name == "python3"
    assert [c.id for c in stripped.cells] == [c.id for c in committed.cells]
    assert [c.metadata.get("tags") for c in stripped.cells] == [c.metadata.get("tags") for c in committed.cells]
    assert ["parameters"] in [c.metadata.get("tags") for c in stripped.cells]
    assert all(c.outputs == [] and c.execution_count is None for c in stripped.cells if c.cell_type == "code")
    assert path.read_text() == NOTEBOOKS[0].read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebooks_are_as_the_hook_leaves_them(path, tmp_path):
    copy = Path(shutil.copy(path, tmp_path))
    strip(copy)
    assert copy.read_bytes() == path.read_bytes()


def test_licence_and_citation_agree_with_the_package():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["license"] == cited["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]
    assert cited["cff-version"] == "1.2.0" and cited["version"] == PROJECT["version"]
    paper = cited["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Seifi", "Olmeda Reino", "Despinoy", "Aljundi"]
    assert paper["year"] == 2024 and paper["url"].endswith("2403.09307")
