from typing import get_args

import nbformat
import papermill
import pytest
import yaml
from conftest import ROOT
from pydantic import ValidationError

from fmbseg import params, profiles
from fmbseg.errors import ParameterError
from fmbseg.params import FeatureParams, LossParams, OptimiserParams, QueryParams, RunParams, check_device, make
from fmbseg.schemas import NOTEBOOKS, STEPS, EvaluateRun, TrainRun

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
    for step in STEPS.values():
        step.schema()
    assert (LossParams().temperature, LossParams().text_weight, LossParams().image_weight) == (1.0, None, None)
    assert (OptimiserParams().images_per_batch, OptimiserParams().epochs, QueryParams().points) == (5, 10, 5)


def test_every_parameter_is_described():
    for step in STEPS.values():
        assert all(f.description for f in step.schema.model_fields.values())


def test_every_notebook_does_a_step_and_every_file_belongs_to_one():
    assert set(NOTEBOOKS.values()) == set(STEPS) - {"segment"}
    for name, step in STEPS.items():
        assert not step.notebook or NOTEBOOKS[step.notebook] == name


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


@pytest.mark.parametrize("name", ["tcl", "sclip", "paper"])
def test_a_protocol_sets_its_parameters_and_what_is_typed_beside_it_counts(name):
    made, sets = params.make(EvaluateRun, {"protocol": name, "window": 96}), params.protocols()[name]
    assert set(params.protocols()) | {""} == set(get_args(params.SegmentParams.model_fields["protocol"].annotation))
    assert made.window == 96 and made.protocol == name and "interpolation" in sets
    assert {key: getattr(made, key) for key in sets if key != "window"} == {k: v for k, v in sets.items() if k != "window"}
    assert params.make(params.SegmentParams, {"protocol": name}).resize == "cv2_bilinear"  # what the schema has of it
    assert "protocol = 'tlc': input should be '', 'tcl'" in refusal(EvaluateRun, protocol="tlc")


def test_a_protocol_counts_over_the_files_beneath_it_and_not_over_what_is_beside_it(project):
    project("mine", **{"shared": {"templates": "plain", "window": 64}, "05_evaluate": {"protocol": "tcl", "window_stride": 32}})
    made = profiles.load("evaluate", "mine")
    assert (made.templates, made.window, made.window_stride) == ("nine", 448, 32)
    made = profiles.load("evaluate", "mine", {"protocol": "sclip", "templates": "one"})
    assert (made.templates, made.window, made.window_stride, made.words) == ("one", 224, 112, "sclip")
    assert profiles.load("train", "mine").templates == "plain"


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
    }


def test_table_shows_value_default_and_meaning():
    row = LossParams(temperature=0.5).table().loc["temperature"]
    assert (row["value"], row["default"]) == (0.5, 1.0) and "dot products" in row["meaning"]


def test_layers_of_load(project):
    project("small", shared={"seed": 1, "epochs": 1, "clip": "shared", "examples": 1}, own={"epochs": 2, "examples": 2})
    made = profiles.load("train", "small", {"examples": 4})
    assert (made.sam, made.seed, made.clip, made.epochs, made.examples) == ("sam_vith", 1, "shared", 2, 4)
    assert made.profile == "small" and isinstance(made, TrainRun)
    assert profiles.load("train", "small").examples == 2


def test_profile_without_files_has_the_defaults(project, tmp_path, monkeypatch):
    project("paper")
    (tmp_path / "notebooks" / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks" / "deeper")
    assert profiles.load("train", "paper") == TrainRun(profile="paper")


def test_shared_keys_of_other_steps_are_left_out(project):
    project("small", shared={"benchmarks": ["voc20"], "epochs": 3})
    assert profiles.load("train", "small").epochs == 3
    assert list(profiles.load("evaluate", "small").benchmarks) == ["voc20"]
    assert profiles.load("tables", "small").seed == 0


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
        profiles.load("train", "small", overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_profile_may_extend_another(project):
    project("large", shared={"epochs": 7, "seed": 3}, own={"learning_rate": 0.5})
    project("small", shared={"extends": "large", "epochs": 2})
    made = profiles.load("train", "small")
    assert (made.profile, made.epochs, made.seed, made.learning_rate) == ("small", 2, 3, 0.5)
    project("other", shared={"extends": "large"}, own={"momentum": 0.5})
    made = profiles.load("train", "other")
    assert (made.epochs, made.momentum, made.learning_rate) == (7, 0.5, TrainRun().learning_rate)  # its own file in the other's place


@pytest.mark.parametrize("parent", ["huge", "small"])
def test_a_profile_that_extends_none_is_refused(project, parent):
    project("small", shared={"extends": parent})
    with pytest.raises(ParameterError, match=f"extends = '{parent}': no such other profile; known are small"):
        profiles.load("train", "small")


def test_key_that_is_not_text_is_refused(project):
    project("small", own="1: 2\n")
    with pytest.raises(ParameterError):
        profiles.load("train", "small")


def test_unknown_profile_step_and_notebook_are_refused(project):
    project("small")
    with pytest.raises(ParameterError, match="profile 'large': no such folder of .*params; known are small"):
        profiles.load("train", "large")
    with pytest.raises(ParameterError, match="step '04_train_alignment': unknown; known are features, label, train"):
        profiles.load("04_train_alignment", "small")
    with pytest.raises(ParameterError, match="notebook '99_none': unknown; known are 01_feature_extraction"):
        profiles.of_notebook("99_none", {})


def test_file_that_no_step_reads_is_refused(project):
    """Notebooks 02 and 03 are one step, whose file is 03's."""
    project("small", **{"02_stage_1_1_query_sam": {"points": 3}})
    with pytest.raises(ParameterError, match="02_stage_1_1_query_sam.yaml: no step reads it"):
        profiles.load("label", "small")


def test_segmenting_has_the_few_parameters_it_needs(project):
    project("small", shared={"window": 64, "epochs": 3, "device": "cuda"}, **{"05_evaluate": {"methods": ["dense"]}})
    made = profiles.load("segment", "small", {"precision": "bf16"})
    assert (made.window, made.device, made.precision) == (64, "cuda", "bf16") and not hasattr(made, "epochs")
    with pytest.raises(ParameterError, match="unknown parameter 'epochs'"):
        profiles.load("segment", "small", {"epochs": 3})


# ---------------------------------------------------------------- what is typed in a notebook


CALL = f'p = profiles.of_notebook("{NOTEBOOK}", globals())'


class Kernel:
    """Runs cells as a kernel does: every cell is in ``In``, also one that fails."""

    def __init__(self):
        self.names = {"In": [""], "profiles": profiles}

    def run(self, *cells):
        for cell in cells:
            self.names["In"].append(cell)
            exec(cell, self.names)
        return self

    @property
    def p(self):
        return self.names["p"]


@pytest.fixture
def kernel(project):
    project("small", shared={"limit": 8}, own={"epochs": 2})
    project("other", own={"epochs": 7})
    project("embedded", own={"epochs": 3})
    return Kernel()


def test_what_is_typed_in_the_parameters_cell_counts(kernel):
    p = kernel.run('# Which profile.\nprofile = "small"\nepochs = 5\nlearning_rate: float = 1e-3\nlimit = None', CALL).p
    assert (p.profile, p.epochs, p.learning_rate, p.limit) == ("small", 5, 1e-3, None)


def test_nothing_typed_is_the_profile(kernel):
    assert kernel.run('profile = "small"', CALL).p == profiles.load("train", "small")


def test_computed_values_count(kernel):
    p = kernel.run('profile = "small"\n_half = 4\nepochs = _half * 2\nseed, limit = 3, 4\nlimit += 1', CALL).p
    assert (p.epochs, p.seed, p.limit) == (8, 3, 5)


def test_injected_values_stand_above_typed_ones(kernel):
    p = kernel.run('profile = "small"\nepochs = 5\nseed = 1', '# Parameters\nprofile = "other"\nseed = 9\nlearning_rate = "1e-3"\n', CALL).p
    assert (p.profile, p.epochs, p.seed, p.learning_rate) == ("other", 5, 9, 1e-3)


def test_injected_values_count_without_a_profile_among_them(kernel):
    assert kernel.run('profile = "small"', "# Parameters\nepochs = 9\n", CALL).p.epochs == 9


def test_a_cell_of_ones_own_before_the_call_counts(kernel):
    assert kernel.run('profile = "small"', "epochs = 9\nprint(epochs)", CALL).p.epochs == 9


@pytest.mark.parametrize(
    "cells",
    [
        ['profile = "small"\nepoch = 1'],
        ['profile = "small"\nepoch = int("1")'],
        ['profile = "small"', "# Parameters\nepoch = 1"],
        ['profile = "small"', "epoch = 1"],
    ],
)
def test_unknown_name_is_refused(kernel, cells):
    with pytest.raises(ParameterError, match="unknown parameter 'epoch'; did you mean epochs?") as caught:
        kernel.run(*cells, CALL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ['"many"', "2.5", "[1]", "print"])
def test_wrong_type_of_what_is_typed_is_refused(kernel, value):
    with pytest.raises(ParameterError, match="epochs = .*input should be a valid integer"):
        kernel.run(f'profile = "small"\nepochs = {value}', CALL)


@pytest.mark.parametrize("value", ["3", "None", '["small"]', '"none"'])
def test_profile_that_is_none_is_refused(kernel, value):
    with pytest.raises(ParameterError, match="no such folder of .*params; known are embedded, other, small"):
        kernel.run(f"profile = {value}", CALL)


def test_later_variables_are_left_alone_when_the_call_is_run_again(kernel):
    kernel.run('profile = "small"\nlimit = 5', CALL, 'samples = [1]\nlimit = 100\nseed = "x"\nepochs = 4', CALL)
    assert (kernel.p.limit, kernel.p.seed, kernel.p.epochs) == (5, 0, 2)


def test_later_variables_are_left_alone_in_any_order(kernel):
    later = 'frame = 3\nseed = "x"'
    kernel.run('profile = "small"\nepochs = 5', CALL, later, 'profile = "small"\nepochs = 6', later, CALL)
    assert (kernel.p.epochs, kernel.p.seed) == (6, 0)
    kernel.run("table = profiles.read_yaml", CALL)
    assert kernel.p.epochs == 6


def test_a_later_cell_run_before_the_call_is_left_alone(kernel):
    assert kernel.run('profile = "small"', "frame = dict(a=1)\nfor seed in [3]: pass", CALL).p == profiles.load("train", "small")


def test_the_parameters_cell_that_was_run_last_counts(kernel):
    first = 'profile = "small"\nepochs = 5\nseed = 1'
    assert kernel.run(first, CALL, 'profile = "other"\nseed = 2', CALL).p == profiles.load("train", "other", {"seed": 2})
    assert kernel.run(first, CALL).p.epochs == 5


def test_a_cell_of_ones_own_counts_again_when_all_is_run_again(kernel):
    cells = ['profile = "small"', "epochs = 9", CALL, "seed = 4"]
    assert kernel.run(*cells, *cells).p == profiles.load("train", "small", {"epochs": 9})


def test_an_injected_cell_that_is_edited_replaces_itself(kernel):
    kernel.run('profile = "small"\nseed = 1', "# Parameters\nepochs = 9\nlimit = 2\n", CALL, "# Parameters\nepochs = 8\n", CALL)
    assert (kernel.p.seed, kernel.p.epochs, kernel.p.limit) == (1, 8, 8)


def test_parameters_and_call_in_one_cell(kernel):
    kernel.run(f'profile = "small"\nepochs = 5\n{CALL}\nseed = 3', CALL)
    assert (kernel.p.epochs, kernel.p.seed) == (5, 0)


def test_cells_that_failed_change_nothing(kernel):
    kernel.run('profile = "small"')
    kernel.names["In"] += ["epochs = = 3", "%magic", "epochs = missing\nseed = 4"]
    assert kernel.run(CALL).p == profiles.load("train", "small")


def test_without_any_cell_the_profile_is_embedded(kernel):
    assert profiles.of_notebook(NOTEBOOK, {"In": []}) == profiles.of_notebook(NOTEBOOK, {}) == TrainRun(profile="embedded", epochs=3)


def test_a_notebook_run_as_a_script_counts_too(kernel):
    names = {"profiles": profiles}
    exec(f'profile = "small"\nepochs = 6\nimport os\n{CALL}', names)
    assert (names["p"].profile, names["p"].epochs) == ("small", 6)


def test_a_real_kernel_counts_what_is_typed_and_what_papermill_injects(tmp_path):
    """Twice the calling cell, with ordinary variables between, as papermill runs it."""
    cells = ['profile = "smoke"\nepochs = 5\nseed = 1', f"from fmbseg import profiles\n{CALL}", "limit = 99\nrows = [1]", CALL]
    cells = [nbformat.v4.new_code_cell(cell) for cell in [*cells, "print(p.profile, p.epochs, p.seed, p.limit, p.encoder)"]]
    cells[0].metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": ""}})
    nbformat.write(notebook, tmp_path / "in.ipynb")
    done = papermill.execute_notebook(tmp_path / "in.ipynb", None, {"seed": 7}, kernel_name="python3", progress_bar=False, cwd=str(ROOT))
    assert done.cells[-1].outputs[0]["text"] == "smoke 5 7 None random:efficientnet_lite2\n"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "CUDA", "cuda:x", "tpu", ""])
def test_an_unknown_device_is_refused_by_the_schema(name):
    with pytest.raises(ParameterError, match=r"device = "):
        make(RunParams, {"device": name})


def test_a_device_that_is_not_here_is_refused_with_those_that_are(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert check_device("cpu") == "cpu"
    for name in ("cuda", "cuda:9", "mps", "gpu"):
        with pytest.raises(ParameterError, match=rf"device = '{name}': not here; give one of cpu, such as --set device=cpu"):
            check_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [check_device(name) for name in ("cuda", "cuda:0", "cuda:1")] == ["cuda", "cuda:0", "cuda:1"]
    with pytest.raises(ParameterError, match="give one of cpu, cuda, cuda:0, cuda:1"):
        check_device("cuda:2")


def test_every_frozen_model_asks_for_the_device_first():
    from fmbseg.models import clip, encoders, sam

    for load in (clip.load_clip, encoders.load_encoder, sam.load_sam):
        with pytest.raises(ParameterError, match="device = 'cuda:99': not here"):
            load("random:any", "cuda:99")
