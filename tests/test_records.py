"""Records: where they lie, what they are named after, whose run they belong to, and what they say of deviations."""

import dataclasses
import datetime

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from fmbseg import files
from fmbseg.data import collections, label_spaces
from fmbseg.errors import DataError, ParameterError
from fmbseg.models import encoders
from fmbseg.params import TextParams, make
from fmbseg.runs import evaluate, modules, records, train
from fmbseg.runs.records import Record
from fmbseg.schemas import EvaluateRun, TrainRun

CHEAP = "dense_high_resolution"
TEXTS = [
    "",
    "a",
    "A",
    "a/b",
    "a_b",
    "a__b",
    "a:b",
    "a b",
    "a-b",
    "folder:siteA/test",
    "folder:siteB/test",
    "folder:sitea/test",
    "é",
    "x" * 300,
]


@pytest.fixture
def params(smoke, own_home, tmp_path):
    return smoke(EvaluateRun, profile="smoke", methods=[CHEAP], results_dir=str(tmp_path / "results"))


def names(params):
    return sorted(path.name for path in records.run_folder(params).iterdir())


# ---------------------------------------------------------------- names


def test_different_texts_never_give_one_file_name_whatever_the_disk_thinks_of_case():
    made = [records.file_name(text) for text in TEXTS[1:]]
    assert len({name.lower() for name in made}) == len(made) and all(0 < len(name) < 120 for name in made)
    assert all("/" not in name and ":" not in name and not name.startswith(".") for name in [*made, records.file_name("..")])
    assert records.file_name("stage1.1+labels") == "stage1.1+labels"


def test_a_records_file_name_holds_all_that_makes_it_another_number():
    one = Record("loss", "a", {"seed": 0}, "b")
    others = [{"kind": "encoder"}, {"method": "A"}, {"dataset": "B"}, {"parameters": {"seed": 1}}, {"limit": 3}, {"limit": 33}]
    split = [Record("loss", "a-b", {}, "c"), Record("loss", "a", {}, "b-c")]
    stems = [one.stem, *(dataclasses.replace(one, **changed).stem for changed in others), *(record.stem for record in split)]
    assert len({stem.lower() for stem in stems}) == 9 and one.stem == "loss-a-b-seed0"
    assert Record("evaluate", "dense", {"seed": 4}, "drawn", limit=3).stem == "evaluate-dense-drawn-n3"


@pytest.fixture
def sites(tmp_path, toy):
    """Two folders of one base name: the same image, other truths."""
    for site, wrong in (("siteA", 0), ("siteB", 1)):
        folder = tmp_path / "data" / site / "test"
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True)
        Image.open(toy.samples[0].image).save(folder / "images" / "one.png")
        Image.fromarray(((toy.samples[0].truth() + wrong) % 4).astype(np.uint8)).save(folder / "masks" / "one.png")
        (folder / "classes.txt").write_text("\n".join(toy.drawn.space.names))
    return tmp_path / "data"


def test_two_data_sets_of_one_base_name_are_two_rows_and_two_records_each_with_its_own_number(params, sites, monkeypatch):
    """And a truth that is put right has its own number too."""
    asked = ["folder:siteA/test", "folder:siteB/test"]
    truth = evaluate.find_benchmarks(asked, str(sites))[0].samples[0].truth()
    monkeypatch.setattr(evaluate, "predict_on_device", lambda method, columns, *_: [truth for _ in columns])
    frame = evaluate.evaluate(evaluate.find_benchmarks(asked, str(sites)), params)
    assert frame["dataset"].tolist() == asked and frame["miou"].tolist() == [100.0, 0.0] and len(names(params)) == 2
    (sites / "siteB/test/masks/one.png").write_bytes((sites / "siteA/test/masks/one.png").read_bytes())
    assert evaluate.evaluate(evaluate.find_benchmarks(asked, str(sites)), params)["miou"].tolist() == [100.0, 100.0]


# ---------------------------------------------------------------- runs


def test_a_quick_look_replaces_nothing_and_both_numbers_are_read(params, toy):
    whole = evaluate.evaluate([toy.drawn], params)
    quick = evaluate.evaluate([toy.drawn], params.model_copy(update={"eval_limit": 3}))
    assert names(params) == [f"evaluate-{CHEAP}-drawn-n3.json", f"evaluate-{CHEAP}-drawn.json"]
    assert quick["images"].tolist() == [3] and whole["images"].tolist() == [6]  # what was made, not what lies there
    assert records.load(records.run_folder(params))["images"].tolist() == [3, 6]
    evaluate.evaluate([toy.drawn], params.model_copy(update={"eval_limit": 6}))
    assert len(names(params)) == 2  # a limit that cuts nothing off is no limit


def test_a_record_says_its_run_and_when_and_another_run_is_another_folder(params, toy):
    other = params.model_copy(update={"run": "Try-2", "eval_limit": 1})
    evaluate.evaluate([toy.drawn], other)
    assert not records.run_folder(params).exists()
    record = files.read_json(records.run_folder(other) / f"evaluate-{CHEAP}-drawn-n1.json")
    assert record["run"] == "Try-2" and record["limit"] == 1
    told = datetime.datetime.fromisoformat(record["time"])
    assert told.utcoffset() == datetime.timedelta(0) and abs(datetime.datetime.now(datetime.UTC) - told) < datetime.timedelta(minutes=5)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", "é"])
def test_a_runs_name_is_of_letters_digits_and_signs(name, smoke):
    with pytest.raises(ParameterError, match="run = "):
        smoke(EvaluateRun, run=name)


def test_records_of_another_run_or_of_none_are_refused(params, tmp_path):
    folder = tmp_path / "records" / "main"
    Record("evaluate", "dense", {}, "drawn").write(folder)
    assert len(records.load(folder)) == 1
    path = Record("evaluate", "dense", {}, "other", run="second").write(folder)
    with pytest.raises(DataError, match="other.json: belongs to second, and the folder to main; delete it or move it"):
        records.load(folder)
    files.write_json(path, {"kind": "evaluate", "method": "dense"})
    with pytest.raises(DataError, match="other.json: belongs to no run"):
        records.load(folder)
    path.rename(folder.parent / "old.json")
    with pytest.raises(DataError, match="holds no record; .* such as old.json, of an older format, belong to no run and are not read"):
        records.load(folder.parent / "second")


# ---------------------------------------------------------------- what was done


def test_a_training_says_how_many_took_part_and_with_which_encoder(toy, smoke, monkeypatch, tmp_path):
    monkeypatch.setenv("FMBSEG_HOME", str(toy.home))
    params = toy.params.model_copy(update={"profile": "records", "results_dir": str(tmp_path), "epochs": 1})
    lost = dataclasses.replace(toy.samples[0], name="never labelled")
    monkeypatch.setitem(collections._left_out, ("drawn", "", ()), 3)
    train.train([*toy.samples, lost], toy.store, params)
    (name,) = names(params)
    record = files.read_json(records.run_folder(params) / name)
    assert name == f"train-{params.module}-drawn-seed0.json"
    assert (record["images"], record["failed"], record["left_out"]) == (6, 1, 3)
    assert record["weights"]["encoder"].startswith(params.encoder) and len(record["weights"]["module"]) == 64
    assert set(record["deviations"]) == every_deviation()


def test_a_pre_aligned_module_names_the_weights_that_it_used_alone(smoke, own_home):
    described = modules.load(train.prealign(smoke(TrainRun, profile="records", prealign=True, prealign_limit=2, module="linear")))[1]
    assert set(described["weights"]) == {"clip", "encoder"}  # SAM need not be here


def every_deviation():
    return set(records.deviations(TextParams(), label_spaces.label_space("voc20"), {"sam": "x"}, "dinov2_vitl14"))


def test_deviations_are_those_of_the_parts_that_were_used():
    space = label_spaces.label_space("voc21")
    plain = records.deviations(TextParams(), space, {"clip": "x"})
    assert set(plain) == {"resize_filter", "renamed_prompts", "template"} and plain["template"] == "without a full stop"
    renamed = sum(prompts != (name,) for name, prompts in zip(space.names[1:], space.prompts[1:]))
    assert renamed and plain["renamed_prompts"].startswith(f"{renamed} of 21 ")
    verbatim = records.deviations(TextParams(words="verbatim", templates="one_stop"), space.worded("verbatim"), {})
    assert verbatim["renamed_prompts"].startswith("0 of 21 ") and verbatim["template"] == "with a full stop"
    both = records.deviations(TextParams(), space, {}, "random:dinov3_vits16+efficientnet_lite2")
    assert both["position_interpolation"] == "none: rotary; none: convolutional" and "sam_embedding" not in both
    assert {kind.family for kind in encoders.VITS.values()} == set(records.POSITIONS)


def test_docs_list_every_deviation():
    page = (ROOT / "docs/profiles.md").read_text()
    assert all(f"`{name}`" in page for name in every_deviation())


@pytest.mark.parametrize("place", ["file", "file/below", "n" * 300])
def test_a_results_dir_that_cannot_be_made_is_one_sentence(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ParameterError, match="results_dir .*: cannot be made"):
        records.results_folder(make(EvaluateRun, {"results_dir": str(tmp_path / place)}))
