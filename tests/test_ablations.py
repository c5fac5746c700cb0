"""Ablations, stages and fine-tuning on the drawn images with random weights: what is compared, not how well."""

import dataclasses

import pandas as pd
import pytest
from conftest import ROOT

from fmbseg.errors import ParameterError
from fmbseg.runs import ablations, label, modules, records, train
from fmbseg.runs.evaluate import find_benchmarks
from fmbseg.schemas import ArchitectureRun, CompareRun, FineTuneRun, StagesRun


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """One FMBSEG_HOME and one results folder for this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMBSEG_HOME", str(tmp_path_factory.mktemp("home")))
        patch.chdir(ROOT)
        yield tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def make(smoke, place):
    common = {"profile": "smoke", "results_dir": str(place), "eval_limit": 2, "module": "linear", "reference_images": 0}
    return lambda schema, **values: smoke(schema, **(common | values))


@pytest.fixture(scope="module")
def ablation(make):
    """Two variants with two seeds each: (parameters, runs, images, store, benchmarks, frame)."""
    variants = {"warm": {"temperature": 1.0}, "cold": {"temperature": 0.05}}
    params = make(CompareRun, variants=variants, baseline="warm", seeds=[0, 3], learning_rate=0.5, epochs=2)
    samples = label.collection(params)
    store, found = label.label(samples, params)[0], find_benchmarks(params.benchmarks)
    runs = ablations.plan(params, "loss")
    return params, runs, samples, store, found, ablations.compare(runs, "loss", samples, store, found)


def test_a_plan_is_every_variant_with_every_seed(make):
    params = make(ArchitectureRun, seeds=[1, 2])
    runs = ablations.plan(params, "architecture")
    assert [(r.variant, r.params.module, r.params.seed) for r in runs] == [
        (name, name, seed) for name in ("linear", "mlp", "transformer") for seed in (1, 2)
    ]
    assert len({r.path for r in runs}) == 6
    one, two = ablations.encoder_runs(params, ["a", "b+c"])
    assert (one.params.encoder, two.params.encoder, two.params.seed) == ("a", "b+c", 1) and one.path != two.path


def test_variants_are_checked_before_anything_runs(make):
    for values, message in (
        ({"variants": {"a": {"modul": "mlp"}}, "baseline": "a"}, "variant 'a' sets 'modul'; a variant may set "),
        ({"variants": {"a": {"epochs": 3}}, "baseline": "a"}, "variant 'a' sets 'epochs'"),
        ({"variants": {"a": {"module": "cnn"}}, "baseline": "a"}, "variant 'a': module = 'cnn'"),
        ({"variants": {"a": {}}, "baseline": "b"}, "baseline = 'b' is none of the variants a"),
        ({"variants": {"a": {}}, "baseline": "a", "seeds": [1, 1]}, "seeds = .*twice"),
    ):
        with pytest.raises(ParameterError, match=message):
            make(CompareRun, **values)


def test_every_run_is_recorded_with_its_own_parameters(ablation, place):
    params, _, _, _, _, frame = ablation
    assert len(frame) == 4 and set(frame["kind"]) == {"loss"} and (frame["images"] == 2).all()
    assert set(zip(frame["method"], frame["param.seed"], frame["param.temperature"])) == {
        ("warm", 0, 1.0), ("warm", 3, 1.0), ("cold", 0, 0.05), ("cold", 3, 0.05),
    }  # fmt: skip
    names = {f"loss-{variant}-drawn-seed{seed}-n2.json" for variant in ("warm", "cold") for seed in (0, 3)}
    assert names <= {path.name for path in (place / "smoke/records/main").iterdir()}
    assert all(frame["run"] == "main") and frame["module"].nunique() == 4


def test_same_seed_same_number_another_seed_another(ablation):
    params, runs, samples, store, found, frame = ablation
    for run in runs:
        run.path.unlink()
    again = ablations.compare(runs, "loss", samples, store, found)
    columns = ["method", "param.seed", "miou"]
    assert again[columns].equals(frame[columns])
    assert frame[frame["method"] == "cold"]["miou"].nunique() == 2
    tensors = [modules.load(run.path)[0].module.project.weight for run in runs]
    assert not tensors[0].equal(tensors[1])


def test_curves_hold_every_step(ablation):
    _, runs, _, _, _, _ = ablation
    curves = ablations.curves(runs)
    assert len(curves) == 4 * 4 and set(curves["variant"]) == {"warm", "cold"} and set(curves["seed"]) == {0, 3}


def test_summary_and_pairs_by_hand():
    rows = [("a", 0, 10.0), ("a", 1, 14.0), ("b", 0, 11.0), ("b", 1, 13.0)]
    frame = pd.DataFrame([("set", m, s, v, 5) for m, s, v in rows], columns=["dataset", "method", "param.seed", "miou", "images"])
    made = ablations.summary(frame).set_index("variant")
    assert made.loc["a", ["mean", "seeds", "images"]].tolist() == [12.0, 2, 5] and round(made.loc["a", "spread"], 4) == 2.8284
    pairs = ablations.paired(frame, "a").iloc[0]
    assert (pairs["variant"], pairs["difference to a"], pairs["seeds better"]) == ("b", 0.0, "1 of 2")
    assert round(pairs["spread"], 4) == 1.4142 and pairs["p"] == 1.0


@pytest.mark.parametrize("differences, p", [((1, 2, 3), 0.25), ((1, 2, -3), 1.0), ((1, 2, -1), 0.75), ((1, 1, 1, 1, 1, 1), 2 / 64)])
def test_p_is_of_the_exact_sign_flip_test(differences, p):
    """The share of all choices of signs whose mean is as far from zero, counted by hand."""
    rows = [("set", name, s, 10.0 + (name == "b") * d) for s, d in enumerate(differences) for name in ("a", "b")]
    assert ablations.paired(pd.DataFrame(rows, columns=["dataset", "method", "param.seed", "miou"]), "a")["p"].tolist() == [p]


def test_a_comparison_replaces_what_the_run_held_of_it(ablation, place):
    """Fewer seeds and renamed variants leave nothing stale; other kinds, other runs and whole sets beside a quick look stay."""
    params, runs, samples, store, found, _ = ablation
    before = {path.name for path in (place / "smoke/records/main").iterdir()}
    few = [dataclasses.replace(run, variant="hot", params=run.params.model_copy(update={"run": "other"})) for run in runs[:1]]
    for run, limit in ((few, None), (runs[:3], 2), (runs[2:], 2)):
        given = [dataclasses.replace(r, params=r.params.model_copy(update={"run": "other", "eval_limit": limit})) for r in run]
        frame = ablations.compare(given, "loss", samples, store, found)
        assert len(frame) == len(run)
    kept = {path.name for path in (place / "smoke/records/other").iterdir()}
    assert kept == {"loss-hot-drawn-seed0.json", "loss-cold-drawn-seed0-n2.json", "loss-cold-drawn-seed3-n2.json"}
    given = [dataclasses.replace(r, params=r.params.model_copy(update={"run": "other", "eval_limit": None})) for r in runs[2:3]]
    ablations.compare(given, "loss", samples, store, found)
    assert {path.name for path in (place / "smoke/records/other").iterdir()} == {"loss-cold-drawn-seed0.json"}
    assert {path.name for path in (place / "smoke/records/main").iterdir()} == before


def test_stages_with_and_without_labels_and_fmbseg_on_each(make):
    params = make(StagesRun)
    frame = ablations.stages(label.collection(params), find_benchmarks(params.benchmarks), params)
    plain = {"stage1.1", "stage1.2", "stage1"}
    assert set(frame["method"]) == plain | {f"{m}+labels" for m in plain} | {f"fmbseg on {m}" for m in plain}
    table = ablations.stages_table(frame)
    trained = table["FMbSeg trained on them"]
    assert trained.xs("given", level="image-level labels").isna().all(axis=None), "no names were given to train on"
    assert table["the pseudo labels"].notna().all(axis=None)
    by_method = frame.set_index("method")["miou"]
    assert table.loc[("drawn", "given", "1.2"), ("the pseudo labels", "miou")] == by_method["stage1.2+labels"]
    assert table.loc[("drawn", "detected", "1.1 + 1.2"), ("FMbSeg trained on them", "miou")] == by_method["fmbseg on stage1"]


def test_fine_tuning_goes_on_from_the_module_and_uses_no_truth(make, place):
    params = make(
        FineTuneRun,
        target_collection="drawn",
        target_vocabulary="voc21",
        target_limit=3,
        fine_tune_epochs=1,
        fine_tune_rate=1e-9,
        weight_decay=0.0,
    )
    samples = label.collection(params)
    before = train.module_path(params)
    train.fit(samples, label.label(samples, params)[0], params, before)
    frame = ablations.fine_tune(find_benchmarks(params.benchmarks), params)
    assert list(frame["method"]) == ["before", "after"] and frame["miou"].nunique() == 1, "a rate of nothing changes nothing"
    tuned, described = modules.load(train.module_path(params, "fine_tuned"))
    start, _ = modules.load(before)
    assert (tuned.module.project.weight - start.module.project.weight).abs().max() < 1e-6
    assert tuned.mean.equal(start.mean) and described["images"] == 3
    ablations.fine_tune(find_benchmarks(params.benchmarks), params.model_copy(update={"fine_tune_rate": 0.5}))
    tuned, _ = modules.load(train.module_path(params, "fine_tuned"))
    assert (tuned.module.project.weight - start.module.project.weight).abs().max() > 1e-4
    with pytest.raises(ParameterError, match="target_collection and target_vocabulary: not given"):
        ablations.fine_tune([], make(FineTuneRun))
    kept = records.load(place / "smoke/records/main")
    assert set(kept[kept["kind"] == "fine_tune"]["param.learning_rate"]) == {params.learning_rate, 0.5}
