"""Stage 1 over a collection: the same labels as in memory, whole files only, resumable, failures that stop nothing else."""

import dataclasses
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fmbseg
from fmbseg import files
from fmbseg.data import benchmarks, collections, images, label_spaces
from fmbseg.data.images import IGNORED
from fmbseg.data.samples import Sample
from fmbseg.errors import DataError
from fmbseg.models.texts import class_texts
from fmbseg.params import LabelParams
from fmbseg.runs import cache, label
from fmbseg.runs.cache import Models
from fmbseg.runs.label import LabelStore
from fmbseg.schemas import LabelRun
from fmbseg.stage1 import detection
from fmbseg.stage1.pseudo_labels import PseudoLabel


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_image_in_memory_gets_the_labels_of_its_file(label_params, real_image, sample, own_home_with_weights):
    """``fmbseg.label_image`` on an array and ``label_cached`` on the file: the embedded models, both stages."""
    changed = {
        "vocabulary": "coco_stuff171",
        "points_per_side": 2,
        "min_votes": 0,
        "predicted_iou": 0.5,
        "stability": 0.5,
    }
    params = label_params.model_copy(update=changed)
    models, space = Models.of(params), label_spaces.vocabulary(params.vocabulary)
    kept = label.label_cached(sample.image, space, models, params)
    again = label.label_cached(sample.image, space, models, params)
    made = fmbseg.label_image(real_image, models.clip, models.sam, class_texts(models.clip, space), params)
    assert made.query_masks and made.automatic_masks and len(np.unique(made.labels)) > 2
    assert made.detected == kept.detected and [q.points.tolist() for q in made.queries] == [q.points.tolist() for q in kept.queries]
    np.testing.assert_array_equal(made.labels, kept.labels)
    np.testing.assert_array_equal(kept.labels, again.labels)


def test_sams_encoder_sees_each_image_once_for_both_stages(smoke, own_home, tmp_path):
    """In memory, in one labelling of the collection, and in notebook 02 followed by 03; no embedding is kept on disk."""
    params = smoke(LabelRun, stages="both", min_votes=0, reference_images=0, keep_embeddings=False, workers=1)
    samples, models = collections.load_collection("drawn")[:2], Models.of(params)
    space, passes = label_spaces.vocabulary(params.vocabulary), []
    hook = models.sam.model.image_encoder.register_forward_hook(lambda module, given, out: passes.append(len(out)))

    def passes_of(work):
        models.sam.set_image(np.zeros((9, 9, 3), np.uint8))  # it may hold an image of these
        passes.clear()
        return work(), list(passes)

    image = images.read_image(samples[0].image)
    made, count = passes_of(lambda: fmbseg.label_image(image, models.clip, models.sam, models.texts(space), params))
    assert made.queries and count == [1]
    assert passes_of(lambda: label.label(samples, params, tmp_path / "labels"))[1] == [1, 1]
    other = params.model_copy(update={"points": 1, "min_area": 0.002})
    assert passes_of(lambda: label.make_queries(samples, other))[1] == [1, 1]
    assert passes_of(lambda: label.label(samples, other, tmp_path / "other"))[1] == []
    hook.remove()


# ---------------------------------------------------------------- the store


@pytest.fixture
def one(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.full((9, 12, 3), 90, np.uint8)).save(path)
    return Sample("one__image", path)


def test_store_writes_a_palette_png_and_its_record(tmp_path, one, smoke, own_home):
    space = label_spaces.own_words(["cat", "dog"])
    store = LabelStore(tmp_path / "labels", space, smoke(LabelParams, reference_images=0))
    labels = np.full((9, 12), IGNORED, np.int16)
    labels[:3], labels[3:6, :4] = 0, 1
    assert not store.has(one)
    with pytest.raises(DataError, match="one__image: has no pseudo label"):
        store.read(one)
    store.write(one, PseudoLabel(labels, [], [], []))
    assert store.has(one)
    np.testing.assert_array_equal(store.read(one), labels)
    png = Image.open(store.path(one))
    assert png.mode == "P" and set(np.unique(np.array(png))) == {0, 1, 255}
    colours = np.array(png.convert("RGB"))
    assert colours[0, 0].tolist() == space.palette[0].tolist() and colours[8, 11].tolist() == [255, 255, 255]
    record = files.read_json(tmp_path / "labels" / "one__image.json")
    assert record["classes"] == ["cat", "dog"] and record["coverage"] == pytest.approx(48 / 108)
    Image.fromarray(np.full((9, 12, 3), 91, np.uint8)).save(one.image)
    assert not store.has(one)  # another image of the same name
    store.write(one, PseudoLabel(labels, [], [], []))
    (tmp_path / "labels" / "one__image.json").unlink()
    assert not store.has(one)  # a map without its record is half written


def test_store_refuses_other_words_parameters_and_weights(tmp_path, smoke, own_home, monkeypatch):
    space, folder = label_spaces.own_words(["cat", "dog"]), tmp_path / "labels"
    plain = {"reference_images": 0}
    LabelStore(folder, space, smoke(LabelParams, **plain))
    LabelStore(folder, space, smoke(LabelParams, points_per_batch=7, limit=3, **plain))
    for words, values in ((["cat", "cow"], {}), (["cat"], {}), (["cat", "dog"], {"min_votes": 1}), (["cat", "dog"], {"overlap": "agree"})):
        with pytest.raises(DataError, match="made with other words or parameters"):
            LabelStore(folder, label_spaces.own_words(words), smoke(LabelParams, **plain | values))
    prompted = dataclasses.replace(space, prompts=(("cat", "kitten"), ("dog",)))
    with pytest.raises(DataError, match="other words"):
        LabelStore(folder, prompted, smoke(LabelParams, **plain))
    for model in (label.clip, label.sam):  # the same names, other weights
        with monkeypatch.context() as patch:
            before = label.label_folder(smoke(LabelParams, **plain))
            patch.setattr(model, "weights_key", lambda name: f"{name}@other")
            assert label.label_folder(smoke(LabelParams, **plain)) != before
            with pytest.raises(DataError, match="made with other"):
                LabelStore(folder, space, smoke(LabelParams, **plain))


def test_a_word_file_that_was_edited_is_another_vocabulary(tmp_path, smoke, own_home):
    words = tmp_path / "words.txt"
    words.write_text("cat\ndog\n")
    params = smoke(LabelParams, vocabulary=str(words), reference_images=0)
    before = label.label_folder(params)
    words.write_text("cat\ncow\n")
    assert label.label_folder(params) != before


# ---------------------------------------------------------------- collections


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A folder of the drawn images, and the samples in it."""
    folder = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMBSEG_HOME", str(folder / ".home"))
        for sample in benchmarks.load_benchmark("drawn").samples[:5]:
            (folder / sample.image.name).write_bytes(sample.image.read_bytes())
    return [Sample(path.stem, path) for path in sorted(folder.glob("*.png"))]


@pytest.fixture(scope="module")
def params(smoke):
    return smoke(LabelRun, profile="smoke", vocabulary="voc20", reference_images=0)


@pytest.fixture(scope="module")
def uninterrupted(pool, params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMBSEG_HOME", str(folder / "home"))
        store, failures = label.label(pool, params, folder / "labels")
    assert not failures and all(store.has(s) for s in pool)
    assert any(len(np.unique(store.read(s))) > 1 for s in pool)
    return contents(folder / "labels")


def test_a_broken_image_stops_no_other_and_is_forgotten_when_it_is_whole(pool, params, own_home, tmp_path, uninterrupted):
    broken = tmp_path / "broken.png"
    broken.write_bytes(pool[0].image.read_bytes()[:100])
    mixed = [pool[0], Sample("broken", broken), Sample("gone", tmp_path / "gone.png"), pool[1]]
    store, failures = label.label(mixed, params, tmp_path / "labels")
    assert len(failures) == 2 and "broken.png: cannot be read as an image" in failures[0].reason and "gone.png" in failures[1].reason
    assert [store.has(s) for s in mixed if s.name != "gone"] == [True, False, True]
    made = contents(tmp_path / "labels")
    assert made["drawn_1.png"] == uninterrupted["drawn_1.png"]
    assert files.read_json(store.failed / "broken.json") == {"image": str(broken), "reason": failures[0].reason}
    broken.write_bytes(pool[2].image.read_bytes())
    store, failures = label.label(mixed[:2], params, tmp_path / "labels")
    assert not failures and store.has(mixed[1]) and not (store.failed / "broken.json").exists()


def test_memory_that_ran_out_is_one_images_failure(pool, params, own_home, tmp_path, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("out of\nmemory")

    monkeypatch.setattr(label, "label_cached", exhausted)
    store, failures = label.label(pool[:2], params, tmp_path / "labels")
    assert [f.reason for f in failures] == ["OutOfMemoryError: out of memory"] * 2 and len(list(store.failed.iterdir())) == 2


KILLED = """
import os, signal, sys, json
from pathlib import Path
import torch
torch.set_num_threads(1)
from fmbseg import files
from fmbseg.data.samples import Sample
from fmbseg.params import make
from fmbseg.runs import cache, label
from fmbseg.schemas import LabelRun
folder, values, paths = sys.argv[1], json.loads(sys.argv[2]), [Path(p) for p in sys.argv[3:]]
write = files.write_json
def killing(path, value):
    if Path(path).name == "drawn_2.json":
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, value)
files.write_json = killing
label.label([Sample(p.stem, p) for p in paths], make(LabelRun, values), Path(folder))
"""


def test_a_killed_run_goes_on_to_the_same_files_also_in_two_workers(pool, params, own_home, tmp_path, uninterrupted):
    folder = tmp_path / "labels"
    command = [sys.executable, "-c", KILLED, str(folder), json.dumps(params.model_dump()), *(str(s.image) for s in pool)]
    done = subprocess.run(command, capture_output=True, timeout=400)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    half = contents(folder)
    assert "drawn_1.json" in half and "drawn_2.png" in half and "drawn_2.json" not in half and "drawn_3.png" not in half
    _, failures = label.label(pool, params.model_copy(update={"workers": 2}), folder)
    assert not failures and contents(folder) == uninterrupted


def test_what_is_labelled_is_not_labelled_again(pool, params, own_home, tmp_path, monkeypatch):
    label.label(pool[:1], params, tmp_path / "labels")
    monkeypatch.setattr(label, "label_cached", lambda *_: pytest.fail("labelled again"))
    label.label(pool[:1], params, tmp_path / "labels")


def test_the_tables_count_masks_and_labels(pool, params, own_home):
    store, _ = label.label(pool[:2], params)
    table = label.label_table(pool[:2], store).set_index("class")
    maps = [store.read(s).ravel() for s in pool[:2]]
    for name, row in table.iterrows():
        k = store.space.names.index(name)
        assert row["images"] == sum((m == k).any() for m in maps)
        assert row["share"] == pytest.approx((np.concatenate(maps) == k).mean())
    queries = label.query_table(pool[:2], params)
    assert set(queries["image"]) <= {"drawn_0", "drawn_1"} and queries["share"].between(0, 1).all()


def test_image_level_names_take_the_place_of_detection(pool, smoke, own_home, tmp_path):
    file = tmp_path / "names.json"
    file.write_text(json.dumps({s.image.stem: ["Cat", "dragon"] for s in pool}))
    space = label_spaces.vocabulary("voc21")
    params = smoke(LabelParams, image_level_names=str(file), reference_images=0)
    assert label.given_labels(pool[0], space, params) == (space.names.index("cat"),)
    made = label.label_cached(pool[0].image, space, Models.of(params), params, label.given_labels(pool[0], space, params))
    assert [d.name for d in made.detected] == ["cat"]
    with_names = LabelStore(tmp_path / "a", space, params).key
    assert with_names != LabelStore(tmp_path / "b", space, smoke(LabelParams, reference_images=0)).key
    file.write_text("{}")
    assert LabelStore(tmp_path / "c", space, params).key != with_names
    with pytest.raises(DataError, match="has no entry in .*names.json"):
        label.given_labels(pool[0], space, params)


# ---------------------------------------------------------------- votes standardised over a collection (ours)


def test_votes_are_on_the_scale_of_the_collection(smoke, own_home, tmp_path):
    """Whichever of the images are labelled, and by their bytes; one that cannot be read counts for nothing."""
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.RandomState(0)
    for name in "abc":
        Image.fromarray(images.resize(random.randint(0, 255, (4, 5, 3), dtype=np.uint8), (128, 160))).save(folder / f"{name}.png")
    params = smoke(LabelRun, collection=str(folder), reference_images=2, limit=1)
    models, space = Models.of(params), label_spaces.vocabulary(params.vocabulary)
    texts = models.texts(space)

    def tokens(*names):
        return torch.cat([cache.clip_features(folder / f"{name}.png", models, params).tokens for name in names])

    scale = cache.vote_scale(texts, params)
    expected = detection.Scale.of(tokens("a", "b"), texts)
    torch.testing.assert_close((scale.mean, scale.spread), (expected.mean, expected.spread))
    found = [q.detected for q in cache.queries(folder / "c.png", space, models, params)]
    assert found == detection.detect(cache.clip_features(folder / "c.png", models, params), texts, params, scale)
    few = params.model_copy(update={"reference_images": 4})
    assert cache.vote_scale(texts, few) is None and cache.vote_content(few) == []

    before = label.content(params)
    (folder / "b.png").write_bytes(b"damaged")
    assert label.content(params) == before  # one step, one scale ...
    cache.prepare_votes(params)  # ... and the next looks anew
    assert label.content(params) != before
    torch.testing.assert_close(cache.vote_scale(texts, params).mean, detection.Scale.of(tokens("a"), texts).mean)
    (folder / "a.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match="reference_images: none of 2 can be read"):
        cache.prepare_votes(params)


def test_given_labels_do_not_vote(smoke, pool, own_home):
    params = smoke(LabelParams, collection="no such folder", reference_images=2)
    space = label_spaces.vocabulary(params.vocabulary)
    (query,) = cache.queries(pool[0].image, space, Models.of(params), params, given=(3,))
    assert (query.detected.index, query.detected.votes) == (3, 0)


def test_a_collection_is_limited_evenly(smoke, own_home):
    everything = collections.load_collection("drawn")
    assert [s.name for s in label.collection(smoke(LabelRun, limit=2))] == [everything[0].name, everything[3].name]
