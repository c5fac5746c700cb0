"""Every command that README and docs show is one that the command line takes; the README's Python runs."""

import re
import shlex

import pytest
from conftest import ROOT
from PIL import Image

from fmbseg import cli, profiles
from fmbseg.data import benchmarks
from fmbseg.models.encoders import load_encoder
from fmbseg.params import ModuleParams
from fmbseg.runs import modules
from fmbseg.schemas import NOTEBOOKS, STEPS
from fmbseg.stage2.alignment import Alignment

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    """(page, words after ``fmbseg``) of every command line in an indented block or between backquotes."""
    for page in PAGES:
        text = page.read_text()
        lines = [line.strip() for line in text.splitlines() if line.startswith("    ")] + re.findall(r"`([^`\n]+)`", text)
        for line in lines:
            found = re.match(r"(?:\.venv/bin/|torchrun .*-m )?fmbseg(?:\.cli)? ([a-z].*)", line)
            if found:
                yield page.name, tuple(shlex.split(found.group(1), comments=True))


@pytest.mark.parametrize("page, words", sorted(set(commands())), ids=lambda v: " ".join(v)[:60] if isinstance(v, tuple) else v)
def test_the_command_line_takes_it(page, words):
    if len(words) == 1:  # a command's name in running text
        assert f"\n    {words[0]} " in cli._parser().format_help() or words[0] in cli._parser().format_help()
        return
    options = cli._parser().parse_args(list(words))
    assert callable(options.function)
    settings = dict(pair.split("=", 1) for pair in getattr(options, "set", None) or ())
    known = {name for step in STEPS.values() for name in step.schema.model_fields}
    assert set(settings) <= known
    for notebook in getattr(options, "notebooks", None) or ():
        assert notebook in NOTEBOOKS
    if hasattr(options, "profile"):
        profiles.load("evaluate", options.profile)


def test_enough_commands_were_found():
    found = list(commands())
    assert len(found) > 12 and {words[0] for page, words in found if page == "README.md"} >= {
        "segment", "label", "doctor", "fetch", "reproduce", "report",
    }  # fmt: skip


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        for target in re.findall(r"(?:^    |`)make ([a-z]+)", page.read_text(), re.M):
            assert target in targets, (page.name, target)


def test_every_file_that_the_readme_names_is_there():
    for name in re.findall(r"`((?:docs|fmbseg|results|params|notebooks|benchmarks)/[\w./-]*)`", (ROOT / "README.md").read_text()):
        assert (ROOT / name).exists(), name
    notebooks = re.findall(r"^\| (\d\d_\w+) \|", (ROOT / "README.md").read_text(), re.M)
    assert notebooks == sorted(NOTEBOOKS)


def test_the_readmes_python_runs(own_home, tmp_path, monkeypatch, smoke):
    """As it stands, on an image of that name, with a module in the embedded profile's place."""
    block, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    described = {"key": "toy", "encoder": "random:efficientnet_lite2", "clip": "random:ViT-S-32", "crop_input": None, "templates": "one"}
    width = load_encoder(described["encoder"]).width
    modules.save(modules.place(), Alignment(width, 384, ModuleParams(module="linear")), described)
    Image.open(benchmarks.load_benchmark("drawn").samples[0].image).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["labels"].shape == (128, 160) and names["labels"].max() <= 3


def test_the_readmes_python_of_stage_1_runs(tmp_path, monkeypatch, real_image):
    _, block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    Image.fromarray(real_image).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["made"].labels.shape == real_image.shape[:2] and names["made"].detected
