import pytest
import yaml
from pydantic import ValidationError

from fmbseg import params, profiles, schemas
from fmbseg.errors import ParameterError
from fmbseg.params import FeatureParams, LossParams, OptimiserParams, QueryParams
from fmbseg.schemas import EvaluateRun, TrainRun

NOTEBOOK = "04_train_alignment"


def refusal(schema, **values):
    with pytest.raises(ParameterError) as caught:
        params.make(schema, values, "here")
    message = str(caught.value)
    assert message.startswith("here: ") and "\n" not in message
    return message


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Writes parameter files of a project that is the working folder: project(profile, shared={}, ...)."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "params").mkdir()
    monkeypatch.chdir(tmp_path)

    def write(profile, **files):
        folder = tmp_path / "params" / profile
        folder.mkdir()
        for name, values in files.items():
            text = values if isinstance(values, str) else yaml.safe_dump(values)
            (folder / f"{NOTEBOOK if name == 'own' else name}.yaml").write_text(text)
        return folder

    return write


def test_defaults_are_valid_and_literal():
    for schema in schemas.NOTEBOOKS.values():
        schema()
    assert (LossParams().temperature, LossParams().text_weight, LossParams().image_weight) == (1.0, None, None)
    assert (OptimiserParams().images_per_batch, OptimiserParams().epochs, QueryParams().points) == (5, 10, 5)


def test_every_parameter_is_described():
    for schema in schemas.NOTEBOOKS.values():
        assert all(f.description for f in schema.model_fields.values())


def test_unknown_key_is_refused_with_a_hint():
    assert "unknown parameter 'temprature'; did you mean temperature?" in refusal(LossParams, temprature=1.0)
    assert "unknown parameter 'zzz'; known are loss, temperature" in refusal(LossParams, zzz=1.0)


@pytest.mark.parametrize(
    "schema, key, value",
    [
        (OptimiserParams, "epochs", "2"),
        (OptimiserParams, "epochs", 2.0),
        (OptimiserParams, "epochs", True),
        (OptimiserParams, "learning_rate", True),
        (OptimiserParams, "learning_rate", "fast"),
        (OptimiserParams, "learning_rate", None),
        (FeatureParams, "residual", 1),
        (FeatureParams, "clip", 7),
        (LossParams, "text_weight", False),
        (EvaluateRun, "benchmarks", "voc20"),
        (EvaluateRun, "benchmarks", [20]),
    ],
)
def test_wrong_type_is_refused(schema, key, value):
    assert f"{key} = {value!r}: input should be a valid" in refusal(schema, **{key: value})


@pytest.mark.parametrize(
    "schema, key, value",
    [
        (OptimiserParams, "epochs", 0),
        (OptimiserParams, "momentum", 1.5),
        (OptimiserParams, "learning_rate", 0),
        (OptimiserParams, "learning_rate", "nan"),
        (LossParams, "temperature", -1.0),
        (LossParams, "text_weight", -0.1),
        (LossParams, "loss", "infonce"),
        (FeatureParams, "path", "query"),
        (FeatureParams, "crop_input", 16),
    ],
)
def test_value_out_of_range_is_refused(schema, key, value):
    assert f"{key} = {value!r}: input should be " in refusal(schema, **{key: value})


def test_number_without_a_dot_is_read_as_a_number():
    assert yaml.safe_load("1e-4") == "1e-4"
    for value in ("1e-4", 1e-4):
        made = params.make(OptimiserParams, {"learning_rate": value, "weight_decay": value})
        assert (made.learning_rate, made.weight_decay) == (1e-4, 1e-4)
    assert params.make(LossParams, {"text_weight": "1e-2"}).text_weight == 0.01
    assert isinstance(params.make(OptimiserParams, {"learning_rate": 1}).learning_rate, float)


def test_parameters_are_read_only():
    with pytest.raises(ValidationError):
        LossParams().temperature = 0.1


def test_part_holds_only_the_fields_of_its_step():
    made = TrainRun(temperature=0.5, seed=3)
    assert made.part(LossParams) == {
        "loss": "tsupcon",
        "temperature": 0.5,
        "text_weight": None,
        "image_weight": None,
        "patch_share": 1.0,
    }


def test_table_shows_value_default_and_meaning():
    row = LossParams(temperature=0.5).table().loc["temperature"]
    assert (row["value"], row["default"]) == (0.5, 1.0) and "dot products" in row["meaning"]


def test_layers_of_load(project):
    project("small", shared={"seed": 1, "epochs": 1, "clip": "shared", "examples": 1}, own={"epochs": 2, "examples": 2})
    made = profiles.load(NOTEBOOK, "small", {"examples": 4})
    assert (made.sam, made.seed, made.clip, made.epochs, made.examples) == ("sam_vith", 1, "shared", 2, 4)
    assert made.profile == "small" and isinstance(made, TrainRun)
    assert profiles.load(NOTEBOOK, "small").examples == 2


def test_profile_without_files_has_the_defaults(project, tmp_path, monkeypatch):
    project("paper")
    (tmp_path / "notebooks" / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks" / "deeper")
    assert profiles.load(NOTEBOOK, "paper") == TrainRun(profile="paper")


def test_shared_keys_of_other_notebooks_are_left_out(project):
    project("small", shared={"benchmarks": ["voc20"], "epochs": 3})
    assert profiles.load(NOTEBOOK, "small").epochs == 3
    assert list(profiles.load("05_evaluate", "small").benchmarks) == ["voc20"]
    assert profiles.load("08_tables", "small").seed == 0


@pytest.mark.parametrize(
    "files, overrides, words",
    [
        ({"shared": {"epoch": 1}}, {}, "shared.yaml: unknown parameter 'epoch'"),
        ({"shared": {"epochs": "many"}}, {}, "epochs = 'many'"),
        ({"own": {"epoch": 1}}, {}, "04_train_alignment.yaml: unknown parameter 'epoch'; did you mean epochs?"),
        ({"own": {"benchmarks": ["voc20"]}}, {}, "unknown parameter 'benchmarks'"),
        ({"own": {"epochs": 0}}, {"epochs": 1}, "04_train_alignment.yaml: epochs = 0"),
        ({}, {"epoch": 1}, "unknown parameter 'epoch'"),
        ({"own": "epochs: [1\n"}, {}, "not readable as YAML"),
        ({"own": "- epochs\n"}, {}, "holds a list"),
    ],
)
def test_bad_file_or_override_is_refused(project, files, overrides, words):
    project("small", **files)
    with pytest.raises(ParameterError) as caught:
        profiles.load(NOTEBOOK, "small", overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_key_that_is_not_text_is_refused(project):
    project("small", own="1: 2\n")
    with pytest.raises(ParameterError):
        profiles.load(NOTEBOOK, "small")


def test_unknown_profile_and_notebook_are_refused(project):
    project("small")
    with pytest.raises(ParameterError, match="profile 'large': no such folder of params/; known are small"):
        profiles.load(NOTEBOOK, "large")
    with pytest.raises(ParameterError, match="notebook '99_none': unknown; known are 01_feature_extraction"):
        profiles.load("99_none", "small")


def namespace(*cells):
    """What ``globals()`` holds in a notebook that ran these cells."""
    names = {}
    for cell in cells:
        exec(cell, names)
    return names | {"In": ["", *cells]}


def test_notebook_takes_injected_names_only(project):
    project("small", own={"epochs": 2})
    project("other", own={"epochs": 7})
    plain = namespace('profile = "small"\nepochs = 5')
    assert profiles.of_notebook(NOTEBOOK, plain).epochs == 2
    injected = namespace('profile = "small"', '# Parameters\nprofile = "other"\nlearning_rate = "1e-3"\n', "seed = 9")
    made = profiles.of_notebook(NOTEBOOK, injected)
    assert (made.profile, made.epochs, made.learning_rate, made.seed) == ("other", 7, 1e-3, 0)


def test_notebook_without_a_profile_is_embedded(project):
    project("embedded", own={"epochs": 3})
    assert profiles.of_notebook(NOTEBOOK, {"In": []}) == profiles.of_notebook(NOTEBOOK, {}) == TrainRun(profile="embedded", epochs=3)


def test_unknown_injected_name_is_refused(project):
    project("small")
    with pytest.raises(ParameterError, match="unknown parameter 'epoch'; did you mean epochs?"):
        profiles.of_notebook(NOTEBOOK, namespace('profile = "small"', "# Parameters\nepoch = 1"))
