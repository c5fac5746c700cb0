import hashlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fmbseg import files
from fmbseg.errors import DataError, ParameterError, StorageError


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_atomic_path_writes_whole_files(tmp_path):
    path = tmp_path / "a" / "b" / "x.json"
    with files.atomic_path(path) as part:
        part.write_text("half")
        assert not path.exists() and part.parent == path.parent and part.suffix == ".part"
        part.write_text("whole")
    assert path.read_text() == "whole" and names(path.parent) == ["x.json"]


@pytest.mark.parametrize("letter", ["a", "\u00e9", "\u732b", "\U0001f408", "\udcff"])
def test_a_name_is_bounded_in_bytes_and_stays_unique(letter, tmp_path):
    def size(name):
        return len(name.encode(errors="surrogateescape"))

    whole = letter * (100 // size(letter))
    assert files.short_name(whole, size(whole)) == whole
    for limit in (50, size(whole) - 1):
        short = {files.short_name(whole + end, limit) for end in ("", "x", "y")}
        assert len(short) == 3 and all(size(name) <= limit for name in short)
        assert letter == "\udcff" or all(size(name) > limit - 4 for name in short)  # bytes that are no text are not kept
    longest = letter * (250 // size(letter))
    files.write_json(tmp_path / f"{longest}.json", 1)  # also under its temporary name
    assert names(tmp_path) == [f"{longest}.json"]


def test_error_while_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.json"
    for before in ([], ["x.json"]):
        with pytest.raises(RuntimeError, match="midway"), files.atomic_path(path) as part:
            part.write_text("half")
            raise RuntimeError("midway")
        assert names(tmp_path) == before
        path.write_text("old")
    assert path.read_text() == "old"


def test_written_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    written = files.write_json(tmp_path / "x.json", {})
    assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode


KILLED = """
import os, sys, torch
from fmbseg import files
write, path = sys.argv[1:]
if write == "tensors":
    import safetensors.torch
    safetensors.torch.save_file = lambda tensors, part, metadata: (open(part, "wb").write(b"half"), os._exit(9))
    files.write_tensors(path, {"a": torch.ones(3)})
with files.atomic_path(path) as part:
    part.write_text("half")
    os._exit(9)
"""


@pytest.mark.parametrize("write", ["text", "tensors"])
def test_killed_run_leaves_no_half_file(tmp_path, write):
    path = tmp_path / "x.safetensors"
    assert subprocess.run([sys.executable, "-c", KILLED, write, str(path)], timeout=120).returncode == 9
    assert not path.exists()
    files.write_tensors(path, {"a": torch.ones(3)})
    assert files.read_tensors(path)[0]["a"].tolist() == [1, 1, 1]


def test_what_a_killed_run_leaves_is_not_taken_for_a_product(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, "text", str(tmp_path / "x.json")], timeout=120)
    assert list(tmp_path.rglob("*.json")) == []


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(b"bytes of an image")
    return path


def test_hash_is_of_the_bytes_and_is_taken_again_when_they_change(tmp_path, image):
    before = files.sha256_of(image)
    assert before == files.file_sha256(image) == files.sha256_of(str(image)) == hashlib.sha256(b"bytes of an image").hexdigest()
    other = tmp_path / "elsewhere" / image.name
    other.parent.mkdir()
    other.write_bytes(image.read_bytes())
    assert files.sha256_of(other) == before
    image.write_bytes(b"BYTES OF AN IMAGE")  # of the same length
    os.utime(image, ns=(2, 2))
    assert files.sha256_of(image) == hashlib.sha256(b"BYTES OF AN IMAGE").hexdigest()


@pytest.fixture
def hashed(own_home, monkeypatch):
    """Names of the files that were read to be hashed; every file counts as at rest."""
    own_home.mkdir()
    monkeypatch.setattr(files, "SETTLED_NS", -1)
    read, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda stream, kind: read.append(os.path.basename(stream.name)) or digest(stream, kind))
    return read


def in_another_process(path):
    files._kept_hashes.cache_clear()  # all that a process knows
    return files.sha256_of(path)


def test_a_hash_is_kept_between_processes(image, hashed, tmp_path, monkeypatch):
    before = files.sha256_of(image)
    monkeypatch.chdir(tmp_path)
    assert [files.sha256_of(image), in_another_process(image.name), in_another_process(image)] == 3 * [before]
    assert hashed == ["image.jpg"]
    (tmp_path / "home/hashes.txt").unlink()
    assert in_another_process(image) == before and len(hashed) == 2


def test_what_other_processes_add_is_read(image, hashed, own_home):
    command = "import sys; from fmbseg import files; files.SETTLED_NS = -1; [files.sha256_of(path) for path in sys.argv[1:]]"
    many = [image.with_name(f"{i}.jpg") for i in range(50)]
    for i, path in enumerate(many):
        path.write_bytes(b"%d" % i)

    def hash_elsewhere(*parts):
        running = [subprocess.Popen([sys.executable, "-c", command, *map(str, part)]) for part in parts]
        assert [one.wait(timeout=60) for one in running] == [0] * len(parts)

    files.sha256_of(image)
    hash_elsewhere(*([*many[k:40:4], many[0]] for k in range(4)))  # at once
    assert [files.sha256_of(path) for path in many[:40]] == [hashlib.sha256(b"%d" % i).hexdigest() for i in range(40)]
    (own_home / "hashes.txt").unlink()
    hash_elsewhere(many[40:])
    assert all(map(files.sha256_of, many)) and hashed == ["image.jpg"]


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_a_changed_file_of_the_same_size_and_time_is_hashed_again(how, image, hashed):
    before, status = files.sha256_of(image), image.stat()
    other = image if how == "written" else image.with_name("other")
    other.write_bytes(b"BYTES OF AN IMAGE")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, image)
    assert (image.stat().st_size, image.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    for found in (files.sha256_of(image), in_another_process(image)):
        assert found == hashlib.sha256(b"BYTES OF AN IMAGE").hexdigest() != before


def test_the_hash_of_a_file_that_has_just_changed_is_not_kept(image, own_home, monkeypatch):
    own_home.mkdir()
    stat = image.stat()
    monkeypatch.setattr(type(image), "stat", lambda path, **_: stat)  # a clock that has not ticked since
    monkeypatch.setattr(os, "fstat", lambda _: stat)
    before = files.sha256_of(image)
    image.write_bytes(b"BYTES OF AN IMAGE")
    assert files.sha256_of(image) == hashlib.sha256(b"BYTES OF AN IMAGE").hexdigest() != before
    assert not os.path.exists(own_home / "hashes.txt")


def test_a_file_system_without_fractions_of_seconds_is_not_trusted_later(image, hashed, own_home, monkeypatch):
    status = image.stat()
    kept = ("st_ino", "st_size", "st_mtime_ns", "st_mode")
    coarse = SimpleNamespace(st_ctime_ns=status.st_ctime_ns // 10**9 * 10**9, **{name: getattr(status, name) for name in kept})
    monkeypatch.setattr(type(image), "stat", lambda path, **_: coarse)
    monkeypatch.setattr(os, "fstat", lambda _: coarse)
    assert files.sha256_of(image) == files.sha256_of(image) and len(hashed) == 1
    assert in_another_process(image) and len(hashed) == 2 and not os.path.exists(own_home / "hashes.txt")


@pytest.mark.parametrize("damage", [lambda line: line[:50], lambda line: line[:40] + b"z" + line[41:], lambda line: line[:-1]])
def test_a_damaged_line_of_the_kept_hashes_is_not_taken(damage, image, hashed, own_home):
    before, kept = files.sha256_of(image), own_home / "hashes.txt"
    kept.write_bytes(damage(kept.read_bytes()))
    assert in_another_process(image) == before and len(hashed) == 2
    other = image.with_name("other")
    other.write_bytes(b"other")
    assert in_another_process(other) == in_another_process(other) and hashed.count("other") <= 2


def test_a_home_that_cannot_be_written_keeps_no_hash(image, own_home, monkeypatch):
    monkeypatch.setattr(files, "SETTLED_NS", -1)
    assert files.sha256_of(image) == files.file_sha256(image) and not own_home.exists()


def test_hash_of_a_file_that_is_gone_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="none.jpg: cannot be read .*put it back or leave it out"):
        files.sha256_of(tmp_path / "none.jpg")


def test_digest_is_the_same_on_any_machine():
    assert files.digest("a", {"b": 1, "a": [2.5, None]}) == files.digest("a", {"a": [2.5, None], "b": 1})
    assert files.digest("a", 1) == "2657442bb4a48d62"
    assert len({files.digest("a"), files.digest("b"), files.digest(["a"]), files.digest("a", None)}) == 4


def test_tensors_come_back(tmp_path):
    tensors = {"map": torch.arange(6.0).reshape(2, 3).half().T, "parameter": torch.ones(2, requires_grad=True)}
    path = files.write_tensors(tmp_path / "x.safetensors", tensors, {"made": "here"})
    back, metadata = files.read_tensors(path)
    assert metadata == {"made": "here"} and back.keys() == tensors.keys()
    assert torch.equal(back["map"], tensors["map"]) and back["map"].dtype == torch.float16
    assert files.read_tensors(files.write_tensors(tmp_path / "y.safetensors", tensors))[1] == {}


@pytest.mark.parametrize("size", [0, 4, 50, -1])
def test_truncated_tensors_are_refused(tmp_path, size):
    path = files.write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match="x.safetensors: damaged .*delete it"):
        files.read_tensors(path)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="none.safetensors: no such file"):
        files.read_tensors(tmp_path / "none.safetensors")
    with pytest.raises(DataError, match="none.json: no such file"):
        files.read_json(tmp_path / "none.json")


def test_json_comes_back(tmp_path):
    value = {"b": [1, 2.5, None], "a": "Straße"}
    path = files.write_json(tmp_path / "x.json", value)
    assert files.read_json(path) == value and "Straße" in path.read_text(encoding="utf-8")
    assert list(json.loads(path.read_text(encoding="utf-8"))) == ["b", "a"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_of_a_number_that_is_not_finite_is_not_written(tmp_path, number):
    path = files.write_json(tmp_path / "x.json", {"a": 1.0})
    with pytest.raises(DataError, match="x.json: a number to be written there is not finite"):
        files.write_json(path, {"a": [number]})
    assert files.read_json(path) == {"a": 1.0} and names(tmp_path) == ["x.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00", b"text"])
def test_damaged_json_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match="x.json: not readable as JSON .*delete it"):
        files.read_json(tmp_path / "x.json")


def test_a_clone_is_the_nearest_folder_above_that_holds_both(tmp_path, monkeypatch):
    for folder in ("clone/notebooks/deep", "clone/params", "other/params"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "clone" / "notebooks" / "deep")
    assert files.checkout() == files.project_root() == files.working_root() == tmp_path / "clone"
    monkeypatch.chdir(tmp_path / "other")
    assert files.checkout() is None and files.working_root() == tmp_path / "other"
    with pytest.raises(DataError, match="run this command inside a clone"):
        files.project_root()


def test_home_is_the_variable_or_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FMBSEG_HOME", str(tmp_path))
    assert files.home() == tmp_path
    monkeypatch.setenv("FMBSEG_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert files.home() == tmp_path / "me" / ".cache" / "fmbseg"


# ---------------------------------------------------------------- places that cannot be written; root may write anywhere, so: what no user may


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").touch()
    return tmp_path / "file"


def test_a_place_of_the_wrong_kind_is_refused_and_nothing_is_left(tmp_path, file):
    for path, folder, part in (
        (file, True, "--out .*file: is a file, and a folder is to be written there"),
        (tmp_path, False, "is a folder, and a file is to be written there"),
        (file / "below", True, "cannot be written .Not a directory"),
        (file / "a/b.json", False, "cannot be written .Not a directory"),
        ("/proc/none/x", True, "cannot be written"),
    ):
        with pytest.raises(ParameterError, match=part):
            files.check_place(path, folder, "--out")
    for path, folder in ((tmp_path, True), (file, False), (tmp_path / "new/deep", True), (tmp_path / "new/deep.json", False)):
        files.check_place(path, folder, "--out")
    assert names(tmp_path) == ["file"]


def test_writing_where_nobody_may_is_one_sentence(file):
    for write in (lambda path: files.write_json(path, {}), lambda path: files.write_tensors(path, {"a": torch.ones(2)})):
        with pytest.raises(StorageError, match="x: cannot be written .*give a place that can be written.*what was written is kept"):
            write(file / "x")
        with pytest.raises(StorageError, match="/proc/none/x: cannot be written"):
            write("/proc/none/x")


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path):
    path = files.write_json(tmp_path / "x.json", "old")
    told = pytest.raises(StorageError, match="x.json: cannot be written .No space left on device.; free some space")
    with told, files.atomic_path(path), open("/dev/full", "w") as full:
        full.write("a")
    assert names(tmp_path) == ["x.json"] and files.read_json(path) == "old"


def test_an_error_of_reading_while_writing_is_not_the_places(tmp_path):
    with pytest.raises(IsADirectoryError), files.atomic_path(tmp_path / "x.json"):
        open(tmp_path)  # noqa: SIM115


def test_no_home_is_one_sentence(monkeypatch):
    import pwd

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("FMBSEG_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ParameterError, match="this user has no home folder; set FMBSEG_HOME"):
        files.home()


def test_names_that_are_no_text_come_back(tmp_path):
    name = os.fsdecode(b"\xff.jpg")
    assert files.read_json(files.write_json(tmp_path / "x.json", {"image": name})) == {"image": name}
