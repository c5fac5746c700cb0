"""The profiles that need a GPU: what they set, and that everything they name exists. Nothing of them is run here."""

import pytest
from conftest import ROOT

from fmbseg import profiles
from fmbseg.data import benchmarks, fetch, label_spaces
from fmbseg.runs import records, tables
from fmbseg.schemas import STEPS

BIG = ("paper", "base", "paper+", "base+")


@pytest.mark.parametrize("profile", BIG)
@pytest.mark.parametrize("step", STEPS)
def test_every_step_has_its_parameters(step, profile):
    made = profiles.load(step, profile)
    assert made.profile == profile and made.device == "cuda" and made.data_root == "data"


@pytest.mark.parametrize("profile", sorted(p.name for p in (ROOT / "params").iterdir()))
def test_fine_tuning_has_a_target(profile):
    """Or a profile's run would stop before its tables are written."""
    made = profiles.load("fine_tune", profile)
    assert made.target_collection and label_spaces.vocabulary(made.target_vocabulary)


def test_profiles_are_found_from_any_folder(tmp_path, monkeypatch):
    """Outside a clone those of the installation; results lie under the working folder then."""
    monkeypatch.chdir(tmp_path)
    assert profiles.params_folder() == ROOT / "params" and profiles.published_folder() == ROOT / "results" / "published"
    made = profiles.load("segment", "embedded")
    assert records.results_folder(made) == tmp_path / "results" / "embedded"
    (tmp_path / "clone" / "notebooks" / "deep").mkdir(parents=True)
    (tmp_path / "clone" / "params" / "embedded").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "clone" / "notebooks" / "deep")
    assert profiles.params_folder() == tmp_path / "clone" / "params" and profiles.published_folder() == ROOT / "results" / "published"
    assert records.results_folder(made) == tmp_path / "clone" / "results" / "embedded"


def test_paper_is_the_papers():
    p = profiles.load("evaluate", "paper")
    assert (p.clip, p.sam, p.encoder, p.precision) == ("clip_vitl14", "sam_vith", "dinov2_vitl14", "bf16")
    assert (p.collection, p.limit, p.vocabulary, p.templates) == ("coco_stuff_train", None, "coco_stuff171", "one")
    assert set(p.benchmarks) == set(benchmarks.LAYOUTS) - {"camvid11", "ade847", "context459"} and p.eval_limit is None
    assert (p.segment_short_side, p.segment_long_limit, p.window, p.window_stride) == (448, 2048, 448, 224)
    t = profiles.load("train", "paper")
    assert (t.optimiser, t.epochs, t.images_per_batch, t.loss, t.module) == ("sgd", 10, 5, "tsupcon", "transformer")
    assert (p.min_votes, p.reference_images) == (1, 0)
    assert (t.prealign, t.dense_weight, t.min_margin) == (False, 0.0, None)  # nothing of ours but the loss's weights
    assert (t.temperature, t.text_weight, t.image_weight) == (0.2, 1.0, 1.0)


def test_paper_literal_is_the_paper_with_eq_1_as_written():
    for step in STEPS:
        paper, literal = (profiles.load(step, profile).model_dump() for profile in ("paper", "paper_literal"))
        changed = {name for name in paper if paper[name] != literal[name]}
        assert changed <= {"profile", "temperature", "text_weight", "image_weight", "learning_rate"}, step
    t = profiles.load("train", "paper_literal")
    assert (t.temperature, t.text_weight, t.image_weight) == (1.0, None, None)


@pytest.mark.parametrize("profile", ["base", "paper"])
def test_plus_changes_the_teacher_the_encoder_the_start_and_the_words_alone(profile):
    for step in STEPS:
        plain, plus = (profiles.load(step, name).model_dump() for name in (profile, f"{profile}+"))
        changed = {name for name in plain if plain[name] != plus[name]}
        assert changed <= {"profile", "path", "encoder", "prealign", "vocabulary"}, step
    t = profiles.load("train", f"{profile}+")
    assert (t.path, t.prealign, t.encoder) == ("selfcal", True, f"dinov2_vit{profile[0].replace('p', 'l')}14_reg")
    assert len(label_spaces.vocabulary(t.vocabulary)) > 250
    text = (ROOT / "params" / f"{profile}+" / "shared.yaml").read_text()
    assert "ours" in text and "Not run by us." in text


@pytest.mark.parametrize("profile", BIG)
def test_training_and_evaluation_agree_on_everything_they_share(profile):
    """Or the pseudo labels and the module of one step would not be found by the next."""
    sets = [profiles.load(step, profile).model_dump() for step in ("label", "train", "evaluate")]
    for name in sets[0].keys() & sets[1].keys() - {"examples"}:
        assert sets[0][name] == sets[1][name], name
    for name in sets[1].keys() & sets[2].keys() - {"examples"}:
        assert sets[1][name] == sets[2][name], name


@pytest.mark.parametrize("profile", BIG)
def test_fetch_brings_every_model_that_is_named(profile):
    p = profiles.load("evaluate", profile)
    assert {w.name for w in fetch.TABLE if profile in w.profiles} == {p.clip, p.sam, p.encoder}
    total = sum(fetch.find(name).megabytes for name in (p.clip, p.sam, p.encoder)) / 1000
    text = (ROOT / "params" / profile / "shared.yaml").read_text()
    assert f"(fmbseg fetch --profile {profile}, {total:.1f} GB)" in text
    assert label_spaces.vocabulary(p.vocabulary)


@pytest.mark.parametrize(
    "path", sorted(p for profile in BIG for p in (ROOT / "params" / profile).iterdir()), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_every_file_says_what_it_costs_and_what_to_expect(path):
    comment = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "Costs (computed" in comment and "not measured" in comment and "Expect" in comment and "Not run by us" in comment
    assert ("published" in comment) and (path.stem == "shared" or "Makes: " in comment)


def test_numbers_to_expect_are_the_published_ones():
    table = {row["method"]: row for row in tables.published(1).to_dict("records")}["FMbSeg (paper)"]
    for name in ("shared", "05_evaluate"):
        comment = (ROOT / "params" / "paper" / f"{name}.yaml").read_text()
        for column in ("PV-21", "PV-20", "PC-59", "CO-80", "CS-171", "City", "ADE"):
            assert f"{column} {table[column]:.2f}" in comment, column
