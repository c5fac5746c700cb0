import errno
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image
from pycocotools.coco import COCO

from fmbseg import cli, files, profiles
from fmbseg.data import benchmarks, fetch, images, label_spaces
from fmbseg.runs import modules
from fmbseg.runs.cache import Models
from fmbseg.stage1 import features, query_sam
from fmbseg.tools import corrected, instances, review

UNKNOWN_FORMAT = "--format png: unknown; known are coco, coco-polygons, yolo, voc, label-studio, geojson"
COMMANDS = ("fetch", "label", "train", "evaluate", "segment", "review", "reproduce", "report", "doctor")


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A project of its own: params/ linked, results beside it, and an FMBSEG_HOME that is kept for the whole file."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("params", "notebooks"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    return folder


def run(*arguments):
    """The command as a process of its own: what is installed as ``fmbseg``."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-m", "fmbseg.cli", *arguments], capture_output=True, text=True, timeout=200, env=environment)


def told(capsys, *arguments):
    """(exit status, standard output, standard error) of the command in this process."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as leaving:  # argparse
        status = leaving.code
    return status, *capsys.readouterr()


def test_the_command_as_a_process():
    made = run("--help")
    assert made.returncode == 0 and all(re.search(rf"^    {command}\s", made.stdout, re.M) for command in COMMANDS)
    made = run("evaluate", "--set", "epochs", "--profile", "smoke")
    assert made.returncode == 2 and made.stdout == "" and made.stderr.startswith("fmbseg: --set epochs: give it as NAME=VALUE")
    assert made.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["evaluate", "--profile", "smoke", "--set", "temprature=1"], "unknown parameter 'temprature'; did you mean temperature?"),
        (["evaluate", "--profile", "smoke", "--set", "temperature=hot"], "temperature = 'hot'"),
        (["evaluate", "--profile", "smoke", "--set", "temperature"], "give it as NAME=VALUE"),
        (["evaluate", "--profile", "none"], "profile 'none': no such folder"),
        (["evaluate", "--profile", "smoke", "--set", "clip=[a"], "not readable as YAML"),
        (["evaluate", "--profile", "smoke", "--shard", "2", "--num-shards", "2"], "shard = 2, num_shards = 2"),
        (["evaluate", "--profile", "smoke", "--benchmarks", "voc20"], "none of voc20 is here"),
        (["evaluate", "--profile", "smoke", "--benchmarks", "nothing"], "benchmark 'nothing': unknown"),
        (["evaluate", "--profile", "smoke", "--methods", "magic"], "method 'magic': unknown"),
        (
            ["evaluate", "--profile", "smoke", "--methods", "fmbseg", "--module", "none.safetensors"],
            "none.safetensors: no trained module there",
        ),
        (["label", "--profile", "smoke", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["label", "--profile", "smoke", "--classes-file", "none.txt"], "none.txt: no such file"),
        (["train", "--profile", "smoke", "--limit", "0"], "limit = 0"),
        (
            ["segment", "a.jpg", "--classes", "cat", "--profile", "smoke", "--module", "none.safetensors"],
            "none.safetensors: no trained module there",
        ),
        (["segment", "a.jpg", "--classes", " , ", "--profile", "smoke", "--module", "{module}"], "classes: no word given"),
        (["segment", "a.jpg", "--classes", "cat,cat", "--profile", "smoke", "--module", "{module}"], "classes: given more than once: cat"),
        (["fetch", "mobilesam"], "'mobilesam': no such weights; known are mobile_sam"),
        (["fetch", "--profile", "none"], "profile 'none': no weights belong to it"),
        (["report", "params"], "holds no record"),
        (["reproduce", "none"], "profile 'none': no such folder"),
        (["reproduce", "smoke", "--set", "temprature=1"], "unknown parameter 'temprature'"),
        (["reproduce", "smoke", "--notebooks", "99_none"], "notebook '99_none': unknown"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(arguments, part, capfd, own_home, tmp_path):
    (tmp_path / "module.safetensors").touch()
    arguments = [a.format(module=tmp_path / "module.safetensors") for a in arguments]
    status, _, error = told(capfd, *arguments)
    assert status == 2 and error.startswith("fmbseg: ") and error.count("\n") == 1 and part in error


def test_reproduce_outside_a_clone_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, error = told(capsys, "reproduce", "smoke", "--set", f"results_dir={tmp_path}")
    assert status == 2 and "inside a clone" in error.splitlines()[-1]


def test_fetch_lists_every_weight(capsys):
    status, out, _ = told(capsys, "fetch", "--list")
    assert status == 0 and len(out.splitlines()) == 1 + len(fetch.TABLE)
    for weight in fetch.TABLE:
        (line,) = [line for line in out.splitlines() if line.split()[0] == weight.name]
        assert weight.licence in line and (weight.archive.sha256 if weight.archive else weight.sha256 or weight.repository) in line


def test_doctor_says_what_is_here_and_what_brings_the_rest(capsys, own_home, tmp_path):
    status, out, _ = told(capsys, "doctor")
    assert status == 0 and "fmbseg fetch mobile_sam" in out and str(own_home) in out and "torchvision 0." in out
    assert all(weight.name in out for weight in fetch.TABLE) and all(name in out for name in benchmarks.BENCHMARKS)
    assert [line.split()[0] for line in out.splitlines() if " drawn " in line] == ["ok"]
    folder = fetch.find("mobile_sam").folder
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"good")
    files.write_json(folder / "manifest.json", {"files": {"model.safetensors": files.file_sha256(folder / "model.safetensors")}})
    line = lambda: next(x for x in told(capsys, "doctor")[1].splitlines() if " mobile_sam " in x)  # noqa: E731
    assert line().split()[0] == "ok"
    (folder / "model.safetensors").write_bytes(b"bad")
    assert line().split()[0] == "damaged" and "fmbseg fetch mobile_sam --again" in line()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """fmbseg train with smoke's parameters: the home it was trained in and the module."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMBSEG_HOME", str(home))
        patch.chdir(ROOT)
        out = home / "toy.safetensors"
        assert cli.main(["train", "--profile", "smoke", "--limit", "4", "--set", f"results_dir={home / 'results'}", "--out", str(out)]) == 0
        assert not (home / "results").exists()  # those of a profile are for its own module
        record = files.read_json(home / "toy.json")
        assert (
            record["images"] == 4 and record["parameters"]["profile"] == "smoke" and record["weights"]["module"] == files.file_sha256(out)
        )
        image = benchmarks.load_benchmark("drawn").samples[1].image
    return home, out, image


def test_segment_writes_labels_overlay_and_json(trained, capsys, monkeypatch, tmp_path):
    home, module, image = trained
    monkeypatch.setenv("FMBSEG_HOME", str(home))
    out, broken = tmp_path / "cut", tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    arguments = ["--classes", "sun, house, tree", "--background", "sky", "--profile", "smoke", "--module", str(module), "--out", str(out)]
    status, told_out, error = told(capsys, "segment", str(image), str(broken), *arguments)
    assert status == 3 and told_out.splitlines()[-3:-1] == [f"1 of 2 images segmented in {out}", "1 left out:"]
    assert told_out.splitlines()[-1].startswith(f"  {broken}: cannot be read as an image")
    assert {p.name for p in out.iterdir()} == {f"{image.stem}{suffix}" for suffix in files.RESULT_SUFFIXES} | {
        "fmbseg-summary.csv",
        "fmbseg-classes.txt",
    }
    rows = pd.read_csv(out / "fmbseg-summary.csv").fillna({"class": "", "failed": ""})
    assert list(rows["image"]) == [str(image)] * (len(rows) - 1) + [str(broken)] and list(rows["class"])[0] == list(rows["class"])[-1] == ""
    assert rows["failed"].iloc[-1].startswith("cannot be read as an image")
    original, labels = Image.open(image), Image.open(out / f"{image.stem}.labels.png")
    values = np.array(labels)
    assert labels.mode == "P" and labels.size == original.size and values.max() < 4
    assert labels.getpalette()[:3] == [0, 0, 0] and labels.getpalette()[765:] == [255, 255, 255]
    described = json.loads((out / f"{image.stem}.json").read_text())
    assert (described["width"], described["height"]) == original.size
    names = ("background", "sun", "house", "tree")
    assert {c["name"]: c["pixels"] for c in described["classes"]} == {names[k]: int((values == k).sum()) for k in np.unique(values)}
    assert Image.open(out / f"{image.stem}.overlay.png").format == "PNG"
    assert [(c["name"], c["mean_margin"]) for c in described["classes"]] == list(zip(rows["class"], rows["mean_margin"]))[1:-1]
    margin = np.array(Image.open(out / f"{image.stem}.margin.png"))
    assert rows["mean_margin"][0] == described["mean_margin"] == pytest.approx(margin.mean() / 1000, abs=6e-4)
    written = {path: path.stat().st_mtime_ns for path in out.glob(f"{image.stem}.*")}
    assert told(capsys, "segment", str(image), *arguments)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written  # what is there is not made again
    assert told(capsys, "segment", str(image), *arguments, "--least-margin", "9")[0] == 0
    assert (np.array(Image.open(out / f"{image.stem}.labels.png")) == 255).all()
    assert json.loads((out / f"{image.stem}.json").read_text())["unlabelled"] == 1
    status, _, error = told(capsys, "segment", str(broken), *arguments)
    assert status == 2 and error.splitlines()[-1] == "fmbseg: no image could be segmented; the reasons are told above"


def test_segment_of_names_with_dots_and_of_folders(trained, capsys, monkeypatch, tmp_path):
    home, module, image = trained
    monkeypatch.setenv("FMBSEG_HOME", str(home))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.b.png").write_bytes(image.read_bytes())
    status, _, _ = told(
        capsys,
        "segment",
        str(tmp_path / "in"),
        "--classes",
        "sun, house",
        "--profile",
        "smoke",
        "--module",
        str(module),
        "--out",
        str(tmp_path / "cut"),
    )
    there = sorted(p.name for p in (tmp_path / "cut").iterdir())
    arguments = ["segment", str(tmp_path / "in"), "--classes", "sun, house", "--profile", "smoke", "--module", str(module)]
    status, out, _ = told(capsys, *arguments, "--out", str(tmp_path / "in"), "--format", "voc,label-studio", "--instances", "sam")
    assert status == 0 and f"voc, label-studio in {tmp_path / 'in/fmbseg-export'}" in out
    (task,) = files.read_json(tmp_path / "in/fmbseg-export/label-studio/tasks.json")
    assert task["predictions"][0]["score"] == min(one["score"] for one in task["predictions"][0]["result"])
    shown = Image.open(tmp_path / "in/fmbseg-export/voc/SegmentationClass/a.b.png")
    assert (np.array(shown) == np.array(Image.open(tmp_path / "in/a.b.labels.png")) + 1).all()
    ids = np.array(Image.open(tmp_path / "in/fmbseg-export/voc/SegmentationObject/a.b.png"))
    assert ids.min() > 0 and ids.max() == len(task["predictions"][0]["result"]) > 1
    status, out, _ = told(capsys, *arguments, "--out", str(tmp_path / "in"))
    assert status == 0 and "1 of 1 images segmented" in out  # what was written for other tools is no image of the user's
    assert status == 0 and there == [
        "a.b.json",
        "a.b.labels.png",
        "a.b.margin.png",
        "a.b.overlay.png",
        "fmbseg-classes.txt",
        "fmbseg-summary.csv",
    ]


def test_label_and_evaluate_also_in_shards(trained, capsys, monkeypatch, tmp_path):
    home, module, _ = trained
    monkeypatch.setenv("FMBSEG_HOME", str(home))
    for shard in ("0", "1"):
        status, out, _ = told(
            capsys, "label", "--profile", "smoke", "--out", str(tmp_path / "labels"), "--shard", shard, "--num-shards", "2"
        )
        assert status == 0 and "3 of 3 images labelled" in out
    assert len(list((tmp_path / "labels").glob("*.png"))) == 6
    status, out, _ = told(capsys, "evaluate", "--profile", "smoke", "--methods", "fmbseg", "dense", "--limit", "2", "--module", str(module))
    assert status == 0 and "random weights: the number means nothing" in out
    kept = tmp_path / "project/results/smoke/records/limit-2-toy"
    assert sorted(p.name for p in kept.iterdir()) == ["evaluate-dense-drawn-n2.json", "evaluate-fmbseg-drawn-n2.json"]
    status, out, _ = told(capsys, "evaluate", "--profile", "smoke", "--methods", "dense", "--shard", "1", "--num-shards", "3")
    assert status == 0 and "shard 1 of 3 is counted and kept" in out and "shard 1 of 3 alone" in out
    assert len(list(kept.iterdir())) == 2  # a shard writes no record
    folder = modules.Segmenter.load(module).save_pretrained(tmp_path / "shared")
    of_file = files.read_json(kept / "evaluate-fmbseg-drawn-n2.json")
    assert told(capsys, "evaluate", "--profile", "smoke", "--methods", "fmbseg", "--limit", "2", "--module", str(folder))[0] == 0
    assert files.read_json(kept.parent / "limit-2-shared/evaluate-fmbseg-drawn-n2.json")["iou"] == of_file["iou"]


def test_without_a_trained_module_evaluate_says_whose_module_it_is(capsys, own_home_with_weights, tmp_path):
    arguments = ["evaluate", "--methods", "fmbseg", "shipped", "--limit", "1", "--benchmarks", "embedded_coco_object80"]
    status, out, _ = told(capsys, *arguments, "--set", "workers=1")
    assert status == 0 and "in place of fmbseg stands shipped" in out and "records are those of the run limit-1" in out
    (record,) = (tmp_path / "project/results/embedded/records/limit-1").glob("*.json")
    assert record.name == "evaluate-shipped-embedded_coco_object80-n1.json"


def test_a_profiles_limit_is_not_that_of_a_folder(monkeypatch, tmp_path):
    parser = cli._parser()
    limit = lambda *words: cli._params(parser.parse_args(["label", *words]), "label").limit  # noqa: E731
    assert limit() == 128 and limit(str(tmp_path)) is None and limit(str(tmp_path), "--limit", "3") == limit("--set", "limit=3") == 3


def test_results_of_labels_have_the_margins_of_clips_features_and_are_reviewed(trained, capsys, monkeypatch, tmp_path):
    home, _, _ = trained
    monkeypatch.setenv("FMBSEG_HOME", str(home))
    looked, arguments = tmp_path / "looked", ["label", "--profile", "smoke", "--out", str(tmp_path / "labels"), "--limit", "3"]
    status, out, _ = told(capsys, *arguments, "--results", str(looked))
    assert status == 0 and f"3 of them with overlay and margin in {looked}; look at them with: fmbseg review {looked}" in out
    p = profiles.load("label", "smoke")
    space, models = label_spaces.vocabulary(p.vocabulary, p.words), Models.of(p)
    samples = benchmarks.load_benchmark("drawn").samples[::2]
    assert len(list(looked.glob("*.json"))) == len(samples) == 3
    for sample in samples:
        labels = np.array(Image.open(tmp_path / f"labels/{sample.image.stem}.png"))
        assert (np.array(Image.open(looked / f"{sample.image.stem}.labels.png")) == labels).all()
        maps = query_sam.class_similarity(features.extract(images.read_image(sample.image), models.clip, p), models.texts(space))
        maps = torch.nn.functional.interpolate(maps[None], labels.shape, mode="bilinear", align_corners=False)[0].numpy()
        classes = {one["name"]: one for one in files.read_json(looked / f"{sample.image.stem}.json")["classes"]}
        assert set(classes) == {space.names[k] for k in np.unique(labels[labels != 255])} and classes
        levels = np.array(Image.open(looked / f"{sample.image.stem}.margin.png"))
        for name, one in classes.items():
            k = space.names.index(name)
            margins = maps[k] - np.delete(maps, k, axis=0).max(axis=0)
            assert one["mean_margin"] == pytest.approx(margins[labels == k].mean(), abs=1e-4)
            assert abs(levels[labels == k] - (1000 * margins[labels == k]).clip(0, 255)).max() < 1
        assert (levels[labels == 255] == 0).all()
    assert told(capsys, "review", str(looked))[0] == 0 and (looked / review.PAGE).is_file()
    assert len(corrected.take(looked, samples, space)) == 3
    (image,) = looked.glob(f"{samples[0].image.stem}.overlay.png")
    before = image.stat().st_mtime_ns
    assert told(capsys, *arguments, "--results", str(looked))[0] == 0 and image.stat().st_mtime_ns == before
    (looked / f"{samples[0].image.stem}.margin.png").unlink()
    assert told(capsys, *arguments, "--results", str(looked))[0] == 0 and image.stat().st_mtime_ns > before
    status, _, error = told(capsys, *arguments, "--results", str(tmp_path / "labels"))
    assert status == 2 and "is the folder of --out" in error


def test_label_says_how_many_failed_and_where_the_reasons_are(trained, capsys, monkeypatch, tmp_path):
    home, _, image = trained
    monkeypatch.setenv("FMBSEG_HOME", str(home))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/broken.png").write_bytes(b"no image")
    (tmp_path / "in/whole.png").write_bytes(image.read_bytes() + b" ")
    arguments = ["label", str(tmp_path / "in"), "--profile", "smoke", "--out", str(tmp_path / "labels")]
    status, out, _ = told(capsys, *arguments)
    assert status == 3 and "1 of 2 images labelled" in out and out.splitlines()[-2] == "1 left out:"
    assert out.splitlines()[-1].startswith(f"  {tmp_path / 'in/broken.png'}: cannot be read as an image")
    assert f"1 failed; the reasons are in {tmp_path / 'labels/failed'}" in out
    assert "cannot be read" in files.read_json(tmp_path / "labels/failed/broken.json")["reason"]
    (tmp_path / "in/broken.png").unlink()
    status, out, _ = told(capsys, *arguments)
    assert status == 0 and "1 of 1 images labelled" in out and "failed;" not in out


def test_segment_takes_patterns_and_trains_on_own_images(trained, capsys, monkeypatch, tmp_path):
    home, _, image = trained
    monkeypatch.setenv("FMBSEG_HOME", str(home))
    for i in range(2):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/own{i}.png").write_bytes(image.read_bytes() + b" " * (i + 1))
    words = ["--classes", "sun, house", "--background", "sky", "--profile", "smoke", "--set", f"results_dir={tmp_path / 'results'}"]
    arguments = ["segment", str(tmp_path / "in/*.png"), *words, "--train-on", str(tmp_path / "in"), "--out", str(tmp_path / "cut")]
    status, out, _ = told(capsys, *arguments)
    assert status == 0 and "trained on 2 of 2 images" in out and "of 3 words" in out
    assert len(list((tmp_path / "cut").glob("own?.labels.png"))) == 2
    (made,) = [path for path in (home / "modules/smoke").glob("own-*.safetensors")]
    _, described = modules.load(made)
    assert described["images"] == 2 and set(described["classes"]) <= {"sun", "house", "sky"}
    status, out, _ = told(capsys, *arguments)
    assert status == 0 and "trained before" in out
    status, _, error = told(capsys, "segment", str(tmp_path / "in/*.jpg"), "--classes", "sun")
    assert status == 2 and "no image matches it; give files, folders, or a pattern" in error
    status, _, error = told(capsys, "segment", "a.jpg", "--classes", "sun", "--train-on", "x", "--module", "y")
    assert status == 2 and "not allowed with argument" in error


def test_labels_as_coco_annotations_read_by_pycocotools(trained, capsys, monkeypatch, tmp_path):
    home, _, _ = trained
    monkeypatch.setenv("FMBSEG_HOME", str(home))
    file = tmp_path / "coco.json"
    arguments = ["label", "--profile", "smoke", "--out", str(tmp_path / "labels"), "--coco", str(file)]
    status, out, _ = told(capsys, *arguments, "--format", "coco,yolo, voc,label-studio")
    assert status == 0 and f"6 of them written to {file} as COCO annotations" in out
    exported = tmp_path / "labels" / "fmbseg-export"
    assert {path.name for path in exported.iterdir()} == {"coco.json", "yolo", "voc", "label-studio"}
    assert (exported / "coco.json").read_bytes() == file.read_bytes() and len(list((exported / "yolo/labels").iterdir())) == 6
    assert told(capsys, "label", "--profile", "smoke", "--format", "png")[::2] == (2, f"fmbseg: {UNKNOWN_FORMAT}\n")
    error = told(capsys, "segment", "missing.jpg", "--profile", "smoke", "--classes", "a:b", "--format", "voc")[2]
    assert "names with a colon cannot be written to VOC's labelmap.txt" in error  # before anything is read
    coco = COCO(str(file))
    capsys.readouterr()
    classes = label_spaces.vocabulary("voc21").names
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(classes) and len(coco.getImgIds()) == 6
    pixels = 0
    for entry in coco.loadImgs(coco.getImgIds()):
        labels = np.array(Image.open(tmp_path / "labels" / f"{Path(entry['file_name']).stem}.png"))
        assert labels.shape == (entry["height"], entry["width"])
        back = np.full_like(labels, 255)
        for one in coco.loadAnns(coco.getAnnIds(entry["id"])):
            mask = coco.annToMask(one).astype(bool)
            rows, columns = np.nonzero(mask)
            assert one["area"] == mask.sum()
            assert one["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            back[mask] = one["category_id"] - 1
            pixels += mask.sum()
        assert (back == labels).all()
    assert pixels > 0 and len({a["id"] for a in coco.dataset["annotations"]}) == len(coco.dataset["annotations"])
    params, counts = profiles.load("label", "smoke"), {}
    drawn = [sample.image for sample in benchmarks.load_benchmark("drawn").samples]
    regions = instances.sam_regions(drawn, params)
    for way in ("parts", "sam"):
        assert told(capsys, *arguments, "--instances", *(["sam"] if way == "sam" else []))[0] == 0
        counts[way] = len(files.read_json(file)["annotations"])
        made = 0
        for path in drawn:
            labels = np.array(Image.open(tmp_path / "labels" / f"{path.stem}.png"))
            made += sum(len(list(instances.split(labels == k, way, regions[path]()))) for k in np.unique(labels[labels < 255]))
        assert counts[way] == made
    assert counts["sam"] != counts["parts"]


def test_train_takes_corrected_masks(trained, capsys, monkeypatch, tmp_path):
    home, _, image = trained
    monkeypatch.setenv("FMBSEG_HOME", str(home))
    size = Image.open(image).size[::-1]
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/classes.txt").write_text("cat\nperson\n")
    Image.fromarray(np.ones(size, np.uint8)).save(tmp_path / "labels" / f"{image.stem}.png")
    module = tmp_path / "own.safetensors"
    status, out, _ = told(capsys, "train", "--profile", "smoke", "--labels", str(tmp_path / "labels"), "--out", str(module))
    assert status == 0 and f"1 of 6 images have masks of {tmp_path / 'labels'}; pseudo labels are made of the others" in out
    described = modules.load(module)[1]
    assert "person" in described["classes"] and described["notes"][-1].endswith("that a person corrected: not annotation-free")


def test_a_read_only_home_with_everything_in_it_serves_label_evaluate_and_segment(trained, capsys, monkeypatch, tmp_path):
    """No file is opened for writing under FMBSEG_HOME: what is there is read, and results go where they were asked for."""
    home, module, image = trained
    monkeypatch.setenv("FMBSEG_HOME", str(home))

    def results(folder):
        label = ["label", "--profile", "smoke", "--out", str(folder / "labels")]
        evaluate = ["evaluate", "--profile", "smoke", "--set", f"results_dir={folder}", "--set", "methods=[dense, stage1.1, fmbseg]"]
        evaluate += ["--module", str(module)]
        segment = [
            "segment",
            str(image),
            "--module",
            str(module),
            "--profile",
            "smoke",
            "--classes",
            "sky, grass",
            "--out",
            str(folder / "cut"),
        ]
        for command in (label, evaluate, segment):
            status, _, err = told(capsys, *command)
            assert status == 0, err
        records = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "smoke" / "records").glob("*/*.json"))}
        written = {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.png"))}
        return {stem: (record["miou"], record["iou"]) for stem, record in records.items()}, written

    before = results(tmp_path / "before")
    kept, made = {path: path.stat().st_mtime_ns for path in home.rglob("*")}, tempfile.mkstemp

    def refused(*args, **kwargs):
        if Path(kwargs.get("dir") or args[2]).is_relative_to(home):
            raise OSError(errno.EROFS, "Read-only file system", str(home))
        return made(*args, **kwargs)

    monkeypatch.setattr(tempfile, "mkstemp", refused)
    assert results(tmp_path / "after") == before and len(before[0]) == 3 and len(before[1]) > 6
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == kept


def test_train_and_evaluate_end_with_status_3_and_name_what_they_left_out(trained, capsys, monkeypatch, tmp_path):
    home, module, _ = trained
    monkeypatch.setenv("FMBSEG_HOME", str(home))
    folder = tmp_path / "set"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("sky\ngrass\nsun\nhouse\n")
    for sample in benchmarks.load_benchmark("drawn").samples[:3]:
        (folder / "images" / sample.image.name).write_bytes(sample.image.read_bytes())
        Image.fromarray(sample.truth().astype(np.uint8)).save(folder / "masks" / sample.image.name)
    broken = folder / "images" / "broken.png"
    broken.write_bytes(b"no image")
    Image.new("L", (8, 8)).save(folder / "masks" / "broken.png")
    out = ["--set", f"results_dir={tmp_path / 'results'}"]
    status, printed, _ = told(
        capsys, "evaluate", "--profile", "smoke", "--methods", "dense", "--benchmarks", f"folder:{folder}", "--module", str(module), *out
    )
    assert status == 3 and "1 left out:" in printed and f"{broken}: cannot be read as an image" in printed
    status, printed, _ = told(
        capsys, "train", str(folder / "images"), "--profile", "smoke", "--limit", "9", "--out", str(tmp_path / "m.safetensors"), *out
    )
    assert status == 3 and "trained on 3 of 4 images" in printed and f"{broken}: cannot be read as an image" in printed


def test_ctrl_c_is_status_130(capsys, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "settings", stopped)
    status, _, err = told(capsys, "evaluate", "--profile", "smoke")
    assert status == 130 and err == "fmbseg: stopped; what was computed is kept\n"
