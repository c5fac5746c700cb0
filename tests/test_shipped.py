"""The module that comes with the repository: found without training, and its numbers are those that were measured."""

import json

import pytest
from conftest import ROOT

import fmbseg
from fmbseg.data import benchmarks
from fmbseg.params import EvaluateParams, make
from fmbseg.runs import evaluate, modules
from fmbseg.runs.evaluate import Method

pytestmark = pytest.mark.embedded

MEASURED = 16.731
"""mIoU in per cent of six images of the embedded CO-80, evenly spaced, fp32."""


def test_it_is_used_where_nothing_was_trained(monkeypatch, tmp_path, sample):
    """A profile's own module comes first; without one, and without a word about it, the one of the repository."""
    monkeypatch.setattr(modules, "place", lambda profile="embedded", name="alignment": tmp_path / profile / f"{name}.safetensors")
    assert modules.default("embedded") == modules.SHIPPED and modules.default("paper") == tmp_path / "paper" / "alignment.safetensors"
    segmenter = fmbseg.Segmenter.load()
    found = segmenter.segment(sample.image, "bird, sand, sea, sky")
    assert found.labels.shape == sample.truth().shape and len(found.space) == 4
    own = modules.place("embedded")
    own.parent.mkdir(parents=True)
    own.write_bytes(modules.SHIPPED.read_bytes())
    assert modules.default("embedded") == own


def test_it_says_what_it_is():
    alignment, described = modules.load(modules.SHIPPED)
    assert (alignment.width, alignment.out) == (alignment.module.project.in_features, 384)
    assert described["prealigned"] == described["images"] == 2098 and any("not annotation-free" in note for note in described["notes"])
    assert modules.SHIPPED.stat().st_size < 3e6 and "2,098 unlabelled" in modules.SHIPPED.with_suffix(".md").read_text()
    assert "/" not in described["collection"] and described["parameters"]["data_root"] == ""


def test_its_numbers_are_the_measured_ones():
    """A few images of the embedded column, against the dense features; the record in results/ holds all of them."""
    column = benchmarks.load_benchmark("embedded_coco_object80")
    params = make(
        EvaluateParams, {"clip": "lit-efficientnet-lite2-minilm", "encoder": "efficientnet_lite2", "crop_input": 256, "eval_limit": 6}
    )
    (dense,), (shipped,) = (evaluate.measure([Method(*m)], [column], params)[0] for m in (("dense",), ("shipped", str(modules.SHIPPED))))
    assert shipped.miou == pytest.approx(MEASURED, abs=0.3) and shipped.miou > dense.miou
    (kept,) = (ROOT / "results/embedded/records").rglob("evaluate-shipped-embedded_coco_object80.json")
    whole = json.loads(kept.read_text())
    assert whole["miou"] == pytest.approx(15.0, abs=0.1) and whole["images"] == 30
