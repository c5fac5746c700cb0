"""What the repository promises about itself: one environment, small files, short modules, one direction of imports."""

import ast
import fnmatch
import os
import re
import tomllib

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = sorted((ROOT / "fmbseg").rglob("*.py"))


def pins():
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    found = [Requirement(line) for line in lines if line]
    assert all(str(pin.specifier).startswith("==") and "*" not in str(pin.specifier) for pin in found)
    assert len({canonicalize_name(pin.name) for pin in found}) == len(found)
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in found}


def test_every_dependency_is_pinned_within_its_range():
    extras = PROJECT["optional-dependencies"]
    wanted = [Requirement(text) for text in [*PROJECT["dependencies"], *extras["dev"], *extras["ray"]]]
    pinned = pins()
    assert len(wanted) > 20 and {canonicalize_name(w.name) for w in wanted} == set(pinned)
    for one in wanted:
        assert one.specifier and pinned[canonicalize_name(one.name)] in one.specifier, one
    assert (pinned["torch"], pinned["torchvision"]) == ("2.13.0", "0.28.0")


def test_conda_makes_the_same_environment():
    described = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [d for d in described["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in described["dependencies"] if isinstance(d, dict)]
    assert described["name"] == "fmbseg" and plain == ["python=3.11", "pip"]
    assert (
        pip[0] == "-c constraints.txt"
        and pip.index("torch") < pip.index("-e .[dev,ray]")
        and pip.index("torchvision") < pip.index("-e .[dev,ray]")
    )
    assert PROJECT["requires-python"] == ">=3.11"


def test_make_installs_torch_and_torchvision_together_first():
    text = (ROOT / "Makefile").read_text()
    installs = [line for line in text.splitlines() if "pip install" in line]
    assert "torch torchvision" in installs[0] and '".[dev,ray]"' in installs[-1] and all("-c constraints.txt" in line for line in installs)
    assert "python3.11" in text and all(re.search(rf"^{target}:", text, re.M) for target in ("tables", "test", "setup"))


def test_every_import_is_a_declared_dependency():
    import sys

    declared = {canonicalize_name(Requirement(d).name) for d in PROJECT["dependencies"]}
    names = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open-clip-torch", "segment_anything": "segment-anything"}
    used = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                used.add(node.module.split(".")[0])
    third = {canonicalize_name(names.get(name, name)) for name in used - set(sys.stdlib_module_names) - {"fmbseg"}}
    assert third - {"ray"} <= declared and "torch" in third


def test_an_extra_is_imported_only_where_it_is_used():
    """Ray is optional: no module imports it at its top, one function of one module does, and says how to install it."""
    users = [p.name for p in MODULES if re.search(r"^\s*(import|from) ray\b", p.read_text(), re.M)]
    assert users == ["cluster.py"] and "ray" in {Requirement(d).name for d in PROJECT["optional-dependencies"]["ray"]}
    top = ast.parse((ROOT / "fmbseg/runs/cluster.py").read_text()).body
    assert not [node for node in top if isinstance(node, ast.Import) and node.names[0].name == "ray"]


def kept_files():
    """Files that git would keep: all but those that .gitignore names."""
    ignored = [line.strip() for line in (ROOT / ".gitignore").read_text().splitlines() if line.strip() and not line.startswith("#")] + [
        ".git/"
    ]
    for folder, folders, files in os.walk(ROOT):
        inside = os.path.relpath(folder, ROOT)

        def skip(name, suffix, inside=inside):
            path = os.path.normpath(os.path.join(inside, name)) + suffix
            return any(fnmatch.fnmatch(path if "/" in p.rstrip("/") else name + suffix, p.lstrip("/").replace("**/", "*")) for p in ignored)

        folders[:] = [f for f in folders if not skip(f, "/")]
        yield from (os.path.join(folder, f) for f in files if not skip(f, ""))


def test_no_file_is_larger_than_3_mb():
    sizes = {os.path.relpath(p, ROOT): os.path.getsize(p) for p in kept_files() if not os.path.islink(p)}
    assert "fmbseg/data/fetch.py" in sizes and not [p for p in sizes if p.startswith((".venv", ".git/", "results/smoke"))]
    assert {p: s for p, s in sizes.items() if s > 3e6} == {}
    assert not [p for p in sizes if p.endswith((".jpg", ".jpeg", ".pt", ".pth", ".pkl", ".whl"))]


def test_modules_are_short():
    assert {str(p.relative_to(ROOT)): n for p in MODULES if (n := len(p.read_text().splitlines())) > 320} == {}


def imported(path, everywhere=False):
    """Modules of the package that a module imports: at its top, or anywhere."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "fmbseg":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fmbseg."):
            found.add(node.module.removeprefix("fmbseg."))
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("fmbseg.") for alias in node.names if alias.name.startswith("fmbseg.")}
    return found


@pytest.mark.parametrize("name", ["params", "windows", "losses", "metrics"])
def test_the_lowest_modules_import_nothing_of_the_package(name):
    assert imported(ROOT / "fmbseg" / f"{name}.py", everywhere=True) <= {"errors", "images", "storage"}


def test_steps_import_only_those_below_them():
    """At their top, modules import without a circle, and none of the library imports what sits on it."""
    names = {str(p.relative_to(ROOT / "fmbseg").with_suffix("")).replace("/", "."): imported(p) for p in MODULES}
    assert "backbones.clip" in names["features"]
    for name, used in names.items():
        if name not in ("cli", "reproduce", "doctor", "widgets", "__init__"):
            assert not used & {"cli", "reproduce", "doctor", "widgets"}, name
    done = set()
    while rest := {n: used & set(names) - done for n, used in names.items() if n not in done}:
        free = {n for n, used in rest.items() if not used}
        assert free, f"imports in a circle among {sorted(rest)}"
        done |= free


def test_house_rules_of_the_code():
    for path in MODULES:
        text = path.read_text()
        assert ".cuda()" not in text and not re.search(r"^\s*assert ", text, re.M), path
        assert ast.get_docstring(ast.parse(text)), path


def test_continuous_integration_runs_from_a_clean_environment():
    path = ROOT / ".ci" / "run"
    text = path.read_text()
    assert os.access(path, os.X_OK) and "-m venv" in text and "make test" in text and "set -euo pipefail" in text
