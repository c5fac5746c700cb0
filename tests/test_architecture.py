"""Wings and arrows: what may import what, and what a user finds under the package's own name."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fmbseg

PACKAGE = ROOT / "fmbseg"
MODULES = sorted(PACKAGE.rglob("*.py"))
METHOD = [path for path in MODULES if path.parent.name in ("stage1", "stage2")]


@functools.cache
def imported(path):
    """Full names of all that a module imports, at its top or in a function: a module, or a name of it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def test_arrows_point_down():
    """cli -> viz, tools -> runs -> stage2 -> stage1 -> models -> data -> ground floor, as pyproject.toml has it."""
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    layers = re.findall(r"fmbseg\.\w+", (ROOT / "pyproject.toml").read_text().split("layers = [")[1].split("\n]")[0])
    rooms = {f"fmbseg.{p.stem if p.suffix else p.name}" for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert rooms - {"fmbseg.__init__"} <= set(layers), "a wing that the contract does not know"


@pytest.mark.parametrize("path", METHOD, ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_the_method_knows_no_disk_no_process_and_no_progress_bar(path):
    """Images, tensors and models in, results out: so that a reader sees the paper's steps alone, a notebook can do each of them on
    one image in memory, and the cache, which has to know all that a result depends on, wraps them from outside."""
    forbidden = ("pathlib", "os", "tqdm", "multiprocessing", "joblib", "subprocess", "tempfile", "fmbseg.files", "fmbseg.runs")
    assert {name for name in imported(path) if name.startswith(tuple(f"{f}." for f in forbidden)) or name in forbidden} == set()
    calls = {node.func.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and hasattr(node.func, "id")}
    assert not calls & {"open", "print"}


def test_models_are_handed_on_not_looked_up():
    """No function of the method loads a model by its name, and no loader keeps one for the whole process."""
    for path in METHOD:
        assert not {name for name in imported(path) if re.search(r"\.load(_\w+)?$", name)}, path
    for load in (fmbseg.load_clip, fmbseg.load_sam, fmbseg.load_encoder):
        assert not hasattr(load, "cache_clear")
    name = "random:tiny_sam"
    assert fmbseg.load_sam(name) is not fmbseg.load_sam(name)


def test_the_public_names_are_there():
    names = {"Segmenter", "label_image", "train", "evaluate", "load_clip", "load_sam", "load_encoder"}
    assert names == set(fmbseg.__all__) <= set(dir(fmbseg))
    assert all(callable(getattr(fmbseg, name)) for name in names)
    with pytest.raises(AttributeError, match="fmbseg has no 'nothing'; it has Segmenter, "):
        fmbseg.nothing  # noqa: B018


def test_house_rules_of_the_code():
    """Device and dtype are decided in one place, users' input is never asserted, every module says what it is."""
    for path in MODULES:
        text = path.read_text()
        assert ".cuda()" not in text and not re.search(r"^\s*assert ", text, re.M), path
        assert ast.get_docstring(ast.parse(text)), path


OPTIONAL = {
    "ray": "runs/cluster.py",
    "onnxruntime": "tools/deploy.py",
    "onnxscript": "tools/deploy.py",
    "rasterio": "tools/tiles.py",
    "av": "tools/video.py",
}


@pytest.mark.parametrize(("package", "module"), OPTIONAL.items())
def test_an_optional_package_is_imported_where_it_is_used_and_nowhere_else(package, module):
    """Functions of one module import it, and say how to install it."""
    assert [path for path in MODULES if package in {name.split(".")[0] for name in imported(path)}] == [PACKAGE / module]
    top = ast.Module([node for node in ast.parse((PACKAGE / module).read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert package not in ast.unparse(top)


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {canonicalize_name(Requirement(d).name) for d in project["dependencies"]}
    names = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open-clip-torch", "segment_anything": "segment-anything"}
    used = {name.split(".")[0] for path in MODULES for name in imported(path)} - set(sys.stdlib_module_names) - {"fmbseg", *OPTIONAL}
    assert {canonicalize_name(names.get(name, name)) for name in used} <= declared
