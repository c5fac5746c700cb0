"""The benchmarks run, and what they count is what a hand counts."""

import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

from fmbseg import files


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    yield
    for name in ("costs", "ratios", "scaling", "throughput"):
        sys.modules.pop(name, None)


def test_flops_and_memory_of_a_layer_are_those_by_hand():
    import costs

    layer, x = nn.Linear(10, 20, bias=False, device="meta"), torch.empty(7, 10, device="meta")
    with torch.no_grad():
        assert costs.count(lambda: layer(x)) == costs.Count(2 * 7 * 10 * 20, 7 * 20 * 4)
        made = costs.count(lambda: layer(x).add(1).add(1).add(1))
    assert made.memory == 2 * 7 * 20 * 4  # what is not needed any more is free


def test_a_transformers_flops_are_those_by_hand():
    """ViT-S/32 with 50 tokens of width 384: 12 blocks, the last one's values only; convolution, attention, MLP."""
    import costs

    tokens, width, crops = 50, 384, 2
    block = 2 * tokens * width * (4 * width + 8 * width) + 4 * tokens**2 * width
    made = costs.cost("smoke", {})
    assert made["crops"] == crops and made["flops"]["CLIP features"] / crops == pytest.approx(12 * block, rel=0.1)
    assert made["parameters"]["clip"] == pytest.approx(63.1e6, rel=0.01)
    assert made["memory"]["labels"] < 4 * 1.1 * (made["parameters"]["clip"] + made["parameters"]["sam"]) + 0.3e9


def test_the_cost_table_marks_what_is_computed(capsys):
    import costs

    costs.main(["smoke"])
    out = capsys.readouterr().out
    assert (
        "| computed, not measured |" in out
        and out.count("| smoke, fp32 |") == 3
        and "| smoke | 6 |" in out
        and "| disk, GB, computed |" in out
    )
    disk = costs.cost("paper", {})["disk"]
    assert disk["weights and images"] == pytest.approx((1710 + 1217 + 2564) * 1e6) and disk["kept of images"] == 0
    assert sum(disk.values()) < 20e9
    kept = costs.cost("smoke", {"keep_features": True, "keep_embeddings": False})["disk"]["kept of images"]
    assert kept > 0 and costs.cost("smoke", {"keep_features": False, "keep_embeddings": False})["disk"]["kept of images"] == 0


def test_throughput_measures_every_step_and_writes_a_record(capsys, monkeypatch, own_home, tmp_path):
    import throughput

    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    out = tmp_path / "record.json"
    throughput.main(["--profile", "smoke", "--images", "2", "--compare", "precision", "--note", "a test", "--out", str(out)])
    record, told = files.read_json(out), capsys.readouterr().out
    found = record["protocol"]["steps"]
    assert [(r["step"], r["variant"]) for r in found] == [(s, v) for s in throughput.STEPS for v in ("fp32", "bf16")]
    assert all(r["seconds"] > 0 and 0 < sum(r["shares"].values()) <= 1.001 for r in found)
    assert all(1e8 < r["peak_bytes"] < 1e11 for r in found)
    assert set(found[0]["shares"]) == {"CLIP"} and set(found[-1]["shares"]) == {"encoder", "alignment module"}
    assert "a test" in record["notes"] and record["hardware"] in told and set(record["protocol"]["ratios"]) == {"bf16 / fp32"}


def test_scaling_measures_growth_and_draws_it(capsys, monkeypatch, tmp_path):
    import scaling

    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert scaling.slope([10, 100, 1000], [3, 300, 30000]) == 2 and scaling.slope([1, 4, 16], [7, 7, 7]) == 0
    held = []

    def sizes():
        for n in (4, 8, 16):
            yield n, lambda n=n: held.clear() or held.append(torch.ones(n, 2**20).sum())

    monkeypatch.setattr(scaling, "MEASURED", {"ones": ("make ones", "millions", sizes, False)})
    out = tmp_path / "scaling.json"
    scaling.main(["--out", str(out)])
    (row,) = files.read_json(out)["protocol"]["growth"]
    assert row["sizes"] == [4, 8, 16] and 0.8 < row["slope_of_bytes"] < 1.2 and 12e6 < row["bytes"][0] < 40e6
    assert "make ones" in out.with_suffix(".svg").read_text() and "slope" in capsys.readouterr().out
