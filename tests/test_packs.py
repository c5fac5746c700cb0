"""Pseudo labels of a large collection in tar files: the same labels, resumed and split as before, in few files."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from fmbseg.errors import DataError
from fmbseg.params import LabelParams
from fmbseg.runs import label, packs, parallel, train
from fmbseg.schemas import TrainRun

QUICK = {"collection": "drawn", "stages": "1.1", "reference_images": 0}


@pytest.fixture
def of_two(monkeypatch):
    monkeypatch.setattr(packs, "PACK", 2)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".png", ".json") and path.name != "labels.json")


def test_every_so_many_labels_are_one_tar_and_are_read_as_before(smoke, own_home, tmp_path, of_two, monkeypatch):
    p = smoke(TrainRun, **QUICK, epochs=1, profile="smoke", module="linear")
    samples = label.collection(p)[:5]
    plain, _ = label.label(samples, p, tmp_path / "plain")  # --out: never packed
    packed, failures = label.label(samples, p)
    tars = sorted((packed.folder / "packed").iterdir())
    assert not failures and len(tars) == 2 and len(names(packed.folder)) == 2 and len(names(plain.folder)) == 10
    for sample in samples:
        assert packed.has(sample) and (packed.read(sample) == plain.read(sample)).all() and packed.sha256(sample) == plain.sha256(sample)
        assert packed._said(sample, "classes") == plain._said(sample, "classes")
    with tarfile.open(tars[0]) as tar:
        members = tar.getnames()  # WebDataset: the files of an image lie side by side under one key
        assert Image.open(io.BytesIO(tar.extractfile(members[1]).read())).mode == "P"
    assert len(members) == 4 and [name.split(".")[0] for name in members[::2]] == [name.split(".")[0] for name in members[1::2]]
    results = [train.fit(samples, s, p, tmp_path / f"{i}.safetensors") for i, s in enumerate((plain, packed))]
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes() and results[0].steps

    monkeypatch.setattr(label, "label_cached", lambda *_: pytest.fail("labelled again"))
    assert label.label(samples, p)[1] == [] and sorted((packed.folder / "packed").iterdir()) == tars


def test_shards_pack_their_own_and_a_damaged_tar_is_made_anew(smoke, own_home, of_two):
    p = smoke(LabelParams, **QUICK)
    p = smoke(TrainRun, **p.model_dump() | {"profile": "smoke"})
    samples = label.collection(p)
    for i in range(2):
        store, _ = label.label(parallel.shard(samples, i, 2), p)
    tars = sorted((store.folder / "packed").iterdir())
    assert len(tars) == 2 and len(names(store.folder)) == 4 and all(store.has(sample) for sample in samples)
    before = [store.read(sample) for sample in samples]
    tars[0].write_bytes(tars[0].read_bytes()[:700])
    gone = [sample for sample in samples if not store.has(sample)]
    assert len(gone) == 2
    with pytest.raises(DataError, match="no pseudo label"):
        store.read(gone[0])
    label.label(samples, p)
    assert all((store.read(s) == map).all() for s, map in zip(samples, before)) and len(names(store.folder)) == 0


def test_the_latest_tar_counts_and_the_same_files_give_the_same_bytes(tmp_path):
    here = packs.Packs(tmp_path / "packed")
    assert here.read("a.png") is None

    def add(*given):
        for name, content in given:
            (tmp_path / name).write_bytes(content)
        here.add([tmp_path / name for name, _ in given])

    add(("a.png", b"one"), ("b.png", b"two"))
    first = next((tmp_path / "packed").iterdir()).read_bytes()
    assert here.read("a.png").getvalue() == b"one" and not (tmp_path / "a.png").exists() and "a.png" in str(here.read("a.png"))
    add(("a.png", b"three"))
    assert here.read("a.png").getvalue() == b"three" and here.read("b.png").getvalue() == b"two" and here.read("c.png") is None
    packs.Packs(tmp_path / "other").add([_written(tmp_path / "a.png", b"one"), _written(tmp_path / "b.png", b"two")])
    assert next((tmp_path / "other").iterdir()).read_bytes() == first
    assert np.frombuffer(here.read("b.png").getbuffer(), np.uint8).tolist() == list(b"two")


def _written(path, content):
    path.write_bytes(content)
    return path


def test_a_tar_is_looked_into_once_however_many_images_have_no_label_yet(tmp_path, monkeypatch):
    looked, members = [], packs._members
    monkeypatch.setattr(packs, "_members", lambda path, changed: looked.append(path) or members(path, changed))
    here = packs.Packs(tmp_path / "packed")
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(b"%d" % i)
        here.add([tmp_path / f"{i}.png"])
        assert here.read(f"{i + 1}.png") is None and here.read("none") is None
    assert len(looked) == len(set(looked)) == 8
    (tmp_path / "3.png").write_bytes(b"again")
    here.add([tmp_path / "3.png"])  # over the older file of the same names
    assert [here.read(f"{i}.png").read() for i in range(8)] == [b"again" if i == 3 else b"%d" % i for i in range(8)]
