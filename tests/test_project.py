"""What the repository promises about itself: one environment, pinned; small files; a clean install before a change lands."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fmbseg import files
from fmbseg.data import fetch
from fmbseg.schemas import STEPS

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def pins():
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    found = [Requirement(line) for line in lines if line]
    assert all(str(pin.specifier).startswith("==") and "*" not in str(pin.specifier) for pin in found)
    assert len({canonicalize_name(pin.name) for pin in found}) == len(found)
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in found}


def test_every_dependency_is_pinned_within_its_range():
    extras = PROJECT["optional-dependencies"].values()
    wanted = [Requirement(text) for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]]
    pinned = pins()
    assert {canonicalize_name(w.name) for w in wanted} == set(pinned)
    for one in wanted:
        assert one.specifier and pinned[canonicalize_name(one.name)] in one.specifier, one


def test_every_wing_and_its_data_is_packaged():
    wings = {f"fmbseg.{path.parent.name}" for path in (ROOT / "fmbseg").glob("*/__init__.py")} | {"fmbseg"}
    setup = PYPROJECT["tool"]["setuptools"]
    moved = setup["package-dir"]
    assert set(setup["packages"]) == wings | set(moved) and set(setup["package-data"]) == {"fmbseg", *moved}
    for name, folder in moved.items():
        suffixes = {path.suffix for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert suffixes and suffixes <= {Path(pattern).suffix for pattern in setup["package-data"][name]}, name


def test_conda_makes_the_same_environment():
    described = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [d for d in described["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in described["dependencies"] if isinstance(d, dict)]
    assert plain == ["python=3.11", "pip"] and PROJECT["requires-python"] == ">=3.11"
    assert pip == ["-c constraints.txt", "torch", "torchvision", "-e .[dev,ray]"]


def test_make_installs_torch_and_torchvision_together_first():
    text = (ROOT / "Makefile").read_text()
    installs = [line for line in text.splitlines() if "pip install" in line]
    assert "torch torchvision" in installs[0] and '".[dev,ray]"' in installs[-1] and all("-c constraints.txt" in line for line in installs)
    assert "python3.11" in text and all(re.search(rf"^{target}:", text, re.M) for target in ("tables", "test", "setup"))


def test_nothing_large_and_nothing_fetched_is_kept():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    kept = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    assert [name for name in kept if os.path.getsize(ROOT / name) > 3e6] == []
    assert [name for name in kept if name.endswith((".jpg", ".jpeg", ".pt", ".pth", ".pkl", ".whl"))] == []


def test_continuous_integration_runs_from_a_clean_environment():
    path = ROOT / ".ci" / "run"
    text = path.read_text()
    assert os.access(path, os.X_OK) and "-m venv" in text and "make test" in text and "set -euo pipefail" in text
    set_there = set(re.findall(r"--set \W?(\w+)=", text))
    assert set_there and set_there <= {name for step in STEPS.values() for name in step.schema.model_fields}
    assert str(fetch.find("pool_pets_streets").folder.relative_to(files.home())) in text
