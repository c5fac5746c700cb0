"""Which images ``fmbseg segment`` takes and where their results go: no two in one place, nothing of the user's replaced."""

import os
from pathlib import Path

import pandas as pd
import pytest

from fmbseg import files
from fmbseg.data.samples import Sample
from fmbseg.errors import ImageError, ParameterError
from fmbseg.params import make
from fmbseg.schemas import SegmentRun
from fmbseg.stage2.segmenter import words_space
from fmbseg.tools import review, segmenting


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def touch(*names):
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()

    return touch


def found(*given, out="cut"):
    return {str(path): str(place) for path, place in segmenting.find(given, Path(out)).items()}


def test_a_folders_results_keep_its_subfolders(place):
    place("in/a/x.jpg", "in/b/x.jpg", "in/y.png", "in/.hidden.png", "in/notes.txt")
    assert found("in") == {"in/a/x.jpg": "cut/a/x", "in/b/x.jpg": "cut/b/x", "in/y.png": "cut/y"}
    assert found("in/y.png", "in/a/x.jpg") == {"in/y.png": "cut/y", "in/a/x.jpg": "cut/x"}
    assert found("in/a", "./in/a/x.jpg") == {"in/a/x.jpg": "cut/x"}  # named twice, taken once


def test_a_folder_that_is_a_video_has_its_own_name(place, monkeypatch):
    place("frames/inside/x.jpg")
    monkeypatch.chdir("frames/inside")
    for given, name in ((".", "inside"), ("..", "frames"), ("../inside", "inside")):
        assert segmenting.find([given], Path("cut"), as_video=True) == {Path(given): Path("cut") / name}


def test_one_name_in_several_folders_keeps_the_folders(place):
    place("site/monday/x.jpg", "site/tuesday/x.jpg", "site/tuesday/y.jpg")
    kept = {"site/monday/x.jpg": "cut/monday/x", "site/tuesday/x.jpg": "cut/tuesday/x", "site/tuesday/y.jpg": "cut/tuesday/y"}
    assert found("site/monday", "site/tuesday") == found("site/*/*.jpg") == found(*kept) == kept


def test_suffix_or_key_tell_apart_what_a_name_does_not(place):
    place("in/cat.jpg", "in/cat.png", "in/Dog.jpg", "in/dog.jpg", "in/e\u0301.jpg", "in/\u00e9.jpg")
    names = [Path(name).name for name in found("in").values()]
    assert {"cat.jpg", "cat.png"} < set(names)
    assert len({files.folded(name) for name in names}) == 6 and sum(name.startswith("dog.jpg-") for name in names) == 1


def test_a_file_of_the_users_is_never_replaced(place):
    place("cat.jpg", "cat.overlay.png", "cut/cat.json")
    with pytest.raises(ParameterError, match=r"^cut/cat.json: is no result of fmbseg segment, and that of cat.jpg would replace it"):
        found("cat.jpg")
    with pytest.raises(ParameterError, match="^cat.overlay.png: is no result"):
        found("cat.jpg", out=".")
    assert set(found(".", out="other")) == {"cat.jpg", "cat.overlay.png"}  # a name like ours is an image like any other


def result(place, image):
    files.write_json(f"{place}.json", {"image": os.path.abspath(image), "height": 1, "width": 1, "classes": []})
    for suffix in (".labels.png", ".overlay.png"):
        Path(f"{place}{suffix}").touch()


def test_results_are_replaced_by_those_of_the_same_image_alone_and_never_taken_for_images(place):
    place("a/x.jpg", "b/x.jpg")
    result("a/x", "a/x.jpg")
    assert found("a", out="a") == found("a/*", out="a") == {"a/x.jpg": "a/x"}
    assert found("a/x.jpg", "a/x.labels.png", out="a") == {"a/x.jpg": "a/x"}
    with pytest.raises(ParameterError, match=r"is the result of .*a/x.jpg, and that of b/x.jpg would replace it"):
        found("b", out="a")
    Path("a/x.jpg").unlink()
    with pytest.raises(ParameterError, match="only results"):
        found("a/x.labels.png")
    with pytest.raises(ImageError, match="holds no image"):
        found("a")


def test_what_is_no_file_is_said(place):
    with pytest.raises(ParameterError, match="address on the web; download it"):
        found("https://example.org/cat.jpg")
    with pytest.raises(ParameterError, match="no image matches it"):
        found("*.jpg")


@pytest.mark.parametrize("letter", ["x", "é", "猫"])
def test_names_that_are_too_long_are_cut_and_stay_apart(letter):
    paths = [Path("folder") / f"{letter * 300}{i}.jpg" for i in range(3)]
    for names in (files.distinct_names(paths), map(Path, files.flat_names(paths))):
        names = list(names)
        assert len(set(names)) == 3 and all(len(part.encode()) <= files.LONGEST_NAME for name in names for part in name.parts)


def test_flat_names_of_a_collection():
    paths = [Path(p) for p in ("a/b.jpg", "a__b.jpg", "A/c.jpg", "a/C.jpg", "labels.jpg", "d.png", "d.jpg", "d.png.png", "plain.jpg")]
    names = files.flat_names(paths, taken=("labels",))
    assert len({files.folded(name) for name in names}) == len(paths) and names[-1] == "plain" and names[4] == "labels.jpg"
    assert files.flat_names(paths, taken=("labels",)) == names and files.flat_names([Path("a/b.jpg")]) == ["a__b"]


def test_only_names_that_meet_are_spelled_again(monkeypatch):
    spelled, plain = [], files._spelled
    monkeypatch.setattr(files, "_spelled", lambda path, level: spelled.append((path.name, level)) or plain(path, level))
    assert files.flat_names([Path(name) for name in ("a.jpg", "b.jpg", "b.png", "c.jpg")]) == ["a", "b.jpg", "b.png", "c"]
    assert spelled == [("a.jpg", 0), ("b.jpg", 0), ("b.png", 0), ("c.jpg", 0), ("b.jpg", 1), ("b.png", 1)]


@pytest.fixture
def at_home(toy, monkeypatch):
    monkeypatch.setenv("FMBSEG_HOME", str(toy.home))
    return toy


def segment(toy, given, out, words="sun, house, tree"):
    """What ``segment`` makes of paths: the images that have a result, and the places of all."""
    places = segmenting.find([str(path) for path in given], out)
    params = make(SegmentRun, {"profile": "smoke"})
    return segmenting.run(places, words_space(words), toy.path, params, lambda path, *_: path.touch(), out), places


def look(toy, samples, out, **values):
    """What ``label --results`` makes of samples."""
    return segmenting.of_labels(samples, toy.store, toy.params.model_copy(update=values), lambda path, *_: path.touch(), out)


def test_a_result_says_its_words(at_home, tmp_path):
    (sample,) = at_home.samples[:1]
    (image,), places = segment(at_home, [sample.image], tmp_path / "cut")
    look(at_home, [sample], tmp_path / "looked")
    for file, space in (
        (segmenting.beside(places[image], ".json"), words_space("sun, house, tree")),
        (tmp_path / f"looked/{sample.image.stem}.json", at_home.store.space),
    ):
        assert files.read_json(file)["words_key"] == files.digest(space.names, space.prompts)


def test_a_label_map_that_a_person_changed_is_not_replaced(at_home, tmp_path):
    one, two = at_home.samples[:2]

    def changed(folder):
        (map_,) = (tmp_path / folder).glob(f"{one.image.stem}.labels.png")
        map_.write_bytes(map_.read_bytes() + b"painted over")
        return map_, map_.read_bytes()

    def told():
        table = pd.read_csv(tmp_path / folder / segmenting.SUMMARY)
        return table[table["image"] == str(one.image)]["failed"].iloc[0]

    for folder, again in (
        ("cut", lambda words: segment(at_home, [one.image, two.image], tmp_path / "cut", words)[0]),
        ("looked", lambda points: look(at_home, [one, two], tmp_path / "looked")),
    ):
        again("sun, house")
        map_, painted = changed(folder)
        assert again("sun, house") == [one.image, two.image] and map_.read_bytes() == painted  # of the same words: nothing to do
        margin = map_.with_name(f"{one.image.stem}.margin.png")
        margin.unlink()
        assert again("sun, house, tree") == [two.image] and map_.read_bytes() == painted
        assert told() == f"its label map {map_} was changed by hand; move it away, or give another folder for results"
        map_.rename(tmp_path / "mine.png")
        assert again("sun, house, tree") == [one.image, two.image] and margin.is_file()
        described = files.read_json(tmp_path / folder / f"{one.image.stem}.json")
        del described["labels_sha256"]  # of a result from before hashes were kept
        files.write_json(tmp_path / folder / f"{one.image.stem}.json", described | {"key": "another"})
        changed(folder)
        assert again("sun, house, tree") == [one.image, two.image]


def test_a_file_name_need_not_be_utf_8(at_home, tmp_path):
    sample = at_home.samples[0]
    image = tmp_path / os.fsdecode(b"caf\xe9.png")
    image.write_bytes(sample.image.read_bytes())
    for made, folder in (
        (lambda: segment(at_home, [image], tmp_path / "cut")[0], "cut"),
        (lambda: look(at_home, [Sample(sample.name, image)], tmp_path / "looked"), "looked"),
    ):
        assert made() == [image] and os.fsencode(image) in (tmp_path / folder / segmenting.SUMMARY).read_bytes()
        assert "caf%E9.overlay.png" in review.write(tmp_path / folder).read_text()


def test_results_of_labels_keep_the_collections_folders_and_say_what_failed(at_home, tmp_path):
    found = []
    for sample, name in zip(at_home.samples, ("monday/x.png", "tuesday/y.png", "wednesday/x.png")):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(sample.image.read_bytes())
        found.append(Sample(sample.name, path))
    broken, waiting = Sample("broken", tmp_path / "in/broken.png"), Sample("waiting", tmp_path / "in/waiting.png")
    for one in (broken, waiting):
        one.image.write_bytes(b"no image")
    at_home.store.fail(broken, f"{broken.image}: cannot be read as an image")
    for given in (found[:2], [*found, broken, waiting]):  # another image of the same name moves no result
        assert look(at_home, given, tmp_path / "looked", collection=str(tmp_path / "in")) == [one.image for one in given if one in found]
    assert sorted(review.results(tmp_path / "looked")) == ["monday/x", "tuesday/y", "wednesday/x"]
    table = pd.read_csv(tmp_path / "looked" / segmenting.SUMMARY).dropna(subset="failed")
    assert dict(zip(table["image"], table["failed"])) == {
        str(broken.image): "cannot be read as an image",
        str(waiting.image): "has no pseudo label yet",
    }
    at_home.store.succeed(broken)
