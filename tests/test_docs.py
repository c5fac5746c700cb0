"""The documentation: it builds without a warning or a broken link, and every name in it is one of the package's."""

import importlib.util
import pkgutil
import re

import pytest
import yaml
from conftest import ROOT

import fmbseg
from fmbseg import files
from fmbseg.data import fetch
from fmbseg.params import EvaluateParams, make

EQUATIONS = (ROOT / "docs" / "equations.md").read_text()
NAMES = sorted(
    {name for page in ("equations", "index") for name in re.findall(r"`(fmbseg[\w.]*)`", (ROOT / f"docs/{page}.md").read_text())}
)


@pytest.fixture(scope="module")
def builder():
    pytest.importorskip("pdoc", reason="pdoc is not installed; it is one of the development tools: pip install -e '.[dev]'")
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(builder, tmp_path_factory):
    """(folder of the built pages, what was wrong)."""
    folder = tmp_path_factory.mktemp("docs") / "built"
    return folder, builder.build(folder)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_one_of_the_packages(name):
    assert pkgutil.resolve_name(name) is not None


def test_every_equation_has_its_function():
    rows = [line.split("|")[1:-1] for line in EQUATIONS.splitlines() if line.startswith("| ")][2:]
    parts = ", ".join(row[0] for row in rows)
    assert all(part in parts for part in ("3.1", "3.2", "3.3", "4.1", "Eq. 1", "Eq. 2", "Eq. 3", "Eq. 4", "Table 1"))
    assert all("`fmbseg." in row[2] for row in rows)


def test_every_protocol_can_be_set_as_the_page_says():
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/protocols.md").read_text(), re.DOTALL)
    made = [make(EvaluateParams, yaml.safe_load(block)) for block in blocks]
    assert (
        [p.templates for p in made] == ["nine", "eighty", "one"]
        and [p.resize for p in made] == ["cv2_bilinear"] * 3
        and [p.path for p in made] == ["value", "qqkk", "value"]
    )


def test_every_test_that_holds_a_promise_exists():
    """``tests/FILE.py::NAME`` in docs/reliability.md; ``::NAME`` is of the file named before it."""
    file, found = None, 0
    for named, name in re.findall(r"`(tests/\w+\.py)?(?:::(\w+))?`", (ROOT / "docs/reliability.md").read_text()):
        file = named or file
        text = (ROOT / file).read_text() if file else ""
        assert text and f"def {name}(" in text if name else True, f"{file}::{name}"
        found += bool(name)
    assert found > 10


def test_the_docs_build_without_a_warning_or_a_broken_link(built):
    folder, wrong = built
    assert wrong == []
    modules = {m.name for m in pkgutil.walk_packages(fmbseg.__path__, "fmbseg.") if not m.name.rpartition(".")[2].startswith("_")}
    pages = {str(p.relative_to(folder).with_suffix("")).replace("/", ".") for p in folder.rglob("*.html")}
    assert modules | {"fmbseg", "index"} | {path.stem for path in (ROOT / "docs").glob("*.md")} <= pages


@pytest.mark.parametrize("page", ["equations", "index"])
def test_every_name_on_the_pages_leads_to_its_api(built, page):
    text = (built[0] / f"{page}.html").read_text()
    for name in re.findall(r"`(fmbseg[\w.]*)`", (ROOT / f"docs/{page}.md").read_text()):
        assert re.search(rf'<code><a href="[\w/.#]+">{re.escape(name)}</a></code>', text), name
    assert page == "index" or '<a href="fmbseg/stage2/losses.html#tsupcon">' in text


def test_broken_links_are_found(builder, tmp_path):
    (tmp_path / "a.html").write_text('<p id="here"><a href="b.html#there">b</a><a href="#here">a</a><a href="https://x.org/y">x</a></p>')
    (tmp_path / "b.html").write_text('<a href="a.html#here">a</a><a href="c.html">c</a><img src="d.svg">')
    assert sorted(builder.broken_links(tmp_path)) == ["a.html: b.html#there", "b.html: c.html", "b.html: d.svg"]


def test_photographs_in_the_documentation_may_be_published():
    """Each image that the scripts draw is CC BY 2.0 by COCO's own table, and the page that shows it credits it."""
    used = {n for script in ("example_image", "screens") for n in re.findall(r"0{6}\d{6}", (ROOT / f"scripts/{script}.py").read_text())}
    table = files.read_json(fetch.require("coco_panoptic_20") / "panoptic.json")
    licences = {one["file_name"].removesuffix(".jpg"): one["license"] for one in table["images"]}
    (free,) = [one["id"] for one in table["licenses"] if one["url"] == "http://creativecommons.org/licenses/by/2.0/"]
    assert len(used) >= 4 and {licences[name] for name in used} == {free}
    credited = "".join((ROOT / page).read_text() for page in ("README.md", "docs/explore.md", "docs/tools.md"))
    assert "311303" in credited and "356387" in credited and "393226" in credited
