"""Modules in the hub's conventions: the folder is written and read for real; only the upload's and download's edge is replaced."""

import json
import re
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml

from fmbseg import Segmenter, cli, files
from fmbseg.errors import DataError, ParameterError
from fmbseg.runs import modules

pytestmark = pytest.mark.embedded

WORDS = "bird, sand, sea"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The module of the repository, as such a folder."""
    return Segmenter.load(modules.SHIPPED).save_pretrained(tmp_path_factory.mktemp("hub") / "shipped")


def test_what_is_read_is_what_was_written(folder, sample):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    first, again = Segmenter.load(modules.SHIPPED), Segmenter.from_pretrained(folder)
    np.testing.assert_array_equal(again.segment(sample.image, WORDS).labels, first.segment(sample.image, WORDS).labels)
    kept, written = (files.read_tensors(path)[0] for path in (modules.SHIPPED, folder / "model.safetensors"))
    assert kept.keys() == written.keys() and all(torch.equal(kept[k], written[k]) and kept[k].dtype == written[k].dtype for k in kept)
    assert files.read_json(folder / "config.json") == json.loads(json.dumps(again.described)) == json.loads(json.dumps(first.described))


def test_the_card_says_what_it_is(folder):
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "fmbseg", "pipeline_tag": "image-segmentation", "license": "apache-2.0"}
    assert "n = 2098 images, 171 classes" in text and "not annotation-free" in text
    assert "fmbseg fetch efficientnet_lite2 all_minilm_l6_v2`" in text and "- efficientnet_lite2: Apache-2.0" in text
    assert "**34.0**" in text  # the numbers of the card beside the module


def test_the_lines_of_the_card_run(folder, sample, tmp_path):
    lines = re.search(r"((?:    .*\n|\n)+)", (folder / "README.md").read_text().split("# shipped\n", 1)[1].split("model.\n", 1)[1]).group(1)
    code = "\n".join(line[4:] for line in lines.splitlines()).replace('"photo.jpg"', repr(str(sample.image)))
    run = subprocess.run([sys.executable, "-c", f"{code}\nprint(labels.shape)"], cwd=folder.parent, capture_output=True, text=True)
    assert run.stdout.strip() == str(sample.truth().shape), run.stderr


def test_the_command_takes_the_folder(folder, sample, tmp_path):
    assert cli.main(["segment", str(sample.image), "--classes", WORDS, "--module", str(folder), "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*.labels.png"))) == 1


def test_no_path_of_the_machine_is_written(folder, tmp_path):
    made = Segmenter.load(modules.SHIPPED)
    parameters = made.described["parameters"] | {"data_root": "/data/of/mine", "vocabulary": str(tmp_path)}
    made.described = made.described | {"collection": "/home/me/photos/", "parameters": parameters}
    written = made.save_pretrained(tmp_path / "out")
    _, described = modules.load(written / "model.safetensors")
    assert described["collection"] == "photos" and described["parameters"]["data_root"] == "mine"
    assert not any(text in path.read_bytes() for path in written.iterdir() for text in (b"/home/me", str(tmp_path).encode()))
    with pytest.raises(ParameterError, match="give another folder"):
        Segmenter.from_pretrained(written).save_pretrained(written)


@pytest.mark.parametrize("name", ["README.md", "config.json"])
def test_a_file_of_the_users_is_not_replaced(tmp_path, name):
    made = Segmenter.load(modules.SHIPPED)
    (tmp_path / name).write_text("of mine")
    with pytest.raises(ParameterError, match=f"{name}: is there without a module, .*; give another folder"):
        made.save_pretrained(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of mine"]
    (tmp_path / name).unlink()
    for _ in range(2):  # those of a module are replaced by another's
        made.save_pretrained(tmp_path)


def test_push_uploads_that_folder(folder, monkeypatch):
    made, uploaded = [], {}

    def upload(self, *, repo_id, folder_path, commit_message):
        uploaded.update({path.name: path.read_bytes() for path in folder_path.iterdir()}, repository=repo_id)
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, private, exist_ok: made.append((name, private, exist_ok)))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert Segmenter.from_pretrained(folder).push_to_hub("me/birds", private=True) == "https://hub/me/birds"
    assert made == [("me/birds", True, True)] and uploaded.pop("repository") == "me/birds"
    assert uploaded.keys() == {"README.md", "config.json", "model.safetensors"}
    assert b'from_pretrained("me/birds")' in uploaded["README.md"]
    assert uploaded["config.json"] == (folder / "config.json").read_bytes()


def test_a_repository_is_asked_for_its_revision(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda name, file, revision: asked.append((name, file, revision)) or str(folder / file),
    )
    assert Segmenter.from_pretrained("me/birds", revision="v1").path == folder / "model.safetensors"
    assert asked == [("me/birds", "model.safetensors", "v1")]


def test_what_is_not_there_says_so(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    for name, sentence in (("me/birds", "me/birds: no file or folder here"), (tmp_path, "no trained module there")):
        with pytest.raises(DataError, match=sentence):
            Segmenter.from_pretrained(name)
    with pytest.raises(DataError, match="hf auth login"):
        Segmenter.load(modules.SHIPPED).push_to_hub("me/birds")
