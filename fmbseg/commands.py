"""What each command does: a few lines over the steps. Modules are imported in the functions, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmbseg.errors import FmbsegError, ParameterError

if TYPE_CHECKING:
    from fmbseg.data.label_spaces import LabelSpace


def _value(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ParameterError(f"--set {text}: the value is not readable as YAML; quote it") from None


def _settings(pairs: Sequence[str] | None) -> dict[str, Any]:
    settings = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise ParameterError(f"--set {pair}: give it as NAME=VALUE, such as --set epochs=5")
        settings[name.strip()] = _value(value)
    return settings


def _params(options: argparse.Namespace, notebook: str, **given: Any):
    """A notebook's parameters with the command line's on top; options left out change nothing."""
    from fmbseg import profiles

    return profiles.load(notebook, options.profile, {k: v for k, v in given.items() if v is not None} | _settings(options.set))


def _collection_params(options: argparse.Namespace, notebook: str):
    """Parameters of a command that takes a collection: what ``label`` and ``train`` have in common."""
    given = {"collection": options.images, "vocabulary": options.classes_file, "limit": options.limit, "workers": options.workers}
    return _params(options, notebook, **given)


def fetch(options: argparse.Namespace) -> None:
    from fmbseg.data import fetch

    if options.list:
        print(fetch.table().to_string(index=False))
        return
    if options.names:
        wanted = [fetch.find(name) for name in options.names]
    else:
        wanted = [w for w in fetch.TABLE if options.profile in w.profiles]
        if not wanted:
            known = sorted({profile for w in fetch.TABLE for profile in w.profiles})
            raise ParameterError(f"profile {options.profile!r}: no weights belong to it; known are {', '.join(known)}")
    for i, weight in enumerate(wanted, 1):
        print(f"[{i}/{len(wanted)}] {weight.name} ({weight.megabytes:.0f} MB, {weight.licence})", flush=True)
        folder = fetch.fetch(weight, options.again)
        print(f"      {folder or 'in the cache of its hub'}", flush=True)


def label(options: argparse.Namespace) -> None:
    from fmbseg.runs import parallel, steps
    from fmbseg.tools import export

    p = _collection_params(options, "03_stage_1_2_label_masks")
    samples = parallel.shard(steps.collection(p), options.shard, options.num_shards)
    store, failures = steps.label(samples, p, options.out, options.engine, options.gpus_per_worker)
    print(f"{len(samples) - len(failures)} of {len(samples)} images labelled in {store.folder}")
    if options.coco:
        count = export.write_coco(samples, store, options.coco)
        print(f"{count} of them written to {options.coco} as COCO annotations (one a class and image, run-length encoded)")
    if failures:
        print(f"{len(failures)} failed; the reasons are in {store.failed}, and the same command tries them again")


def train(options: argparse.Namespace) -> None:
    from fmbseg.runs import steps
    from fmbseg.stage2 import distributed

    p = _collection_params(options, "04_train_alignment")
    with distributed.group(p.device) as device:
        p = p.model_copy(update={"device": device})
        samples = steps.collection(p)
        store = steps.make_labels(distributed.share(samples), p)
        distributed.wait()
        path = options.out or steps.module_path(p)
        result = steps.train(samples, store, p, path)
        if distributed.rank() == 0:
            print(f"{len(result.classes)} classes, {len(result.steps)} steps, {result.seconds:.0f} s; the module is {path}")


def evaluate(options: argparse.Namespace) -> None:
    from fmbseg.runs import steps

    p = _params(
        options,
        "05_evaluate",
        data_root=options.data_root,
        benchmarks=options.benchmarks,
        methods=options.methods,
        eval_limit=options.limit,
        workers=options.workers,
        shard=options.shard,
        num_shards=options.num_shards,
    )
    frame = steps.evaluate(steps.benchmarks(p), p, options.module) if options.merge is None else steps.merge(p, options.merge)
    if p.num_shards > 1 and options.merge is None:
        print(f"counts of shard {p.shard} of {p.num_shards} written to {steps.shard_folder(p)}; add all up with: fmbseg evaluate --merge")
    columns = ["dataset", "method", "images", "miou", "precision", "coverage", "notes"]
    print(frame[[column for column in columns if column in frame]].to_string(index=False))


def _images(given: Sequence[str]) -> list[Path]:
    """The images that the command line names: files, folders, and patterns such as "photos/*.jpg"."""
    from glob import glob

    from fmbseg.data import images

    found: list[Path] = []
    for name in given:
        if Path(name).is_dir():
            found += images.find_images(name)
        elif Path(name).exists() or not any(c in name for c in "*?["):
            found.append(Path(name))
        else:
            matches = sorted(Path(match) for match in glob(name, recursive=True) if Path(match).suffix.lower() in images.SUFFIXES)
            if not matches:
                raise ParameterError(f"{name}: no image matches it; give files, folders, or a pattern such as 'photos/*.jpg'")
            found += matches
    return list(dict.fromkeys(found))


def _own_module(options: argparse.Namespace, space: LabelSpace) -> Path:
    """A module trained for the words of ``space``, on pseudo labels of its own unlabelled images."""
    from fmbseg import files
    from fmbseg.runs import steps

    words = [word for prompts in space.prompts for word in prompts]
    file = files.home() / "words" / f"{files.digest(words)}.txt"
    with files.atomic_path(file) as part:
        part.write_text("\n".join(words) + "\n", encoding="utf-8")
    p = _params(options, "04_train_alignment", collection=str(options.train_on), vocabulary=str(file), limit=options.limit)
    samples = steps.collection(p)
    path = steps.module_path(p, f"own-{files.digest(words, str(options.train_on.absolute()))}")
    result = steps.fit(samples, steps.make_labels(samples, p), p, path)
    print(f"trained on {len(samples)} images of {options.train_on} for {len(result.classes)} of {len(words)} words: {path}")
    return path


def segment(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from fmbseg import files
    from fmbseg.data import images
    from fmbseg.runs import steps
    from fmbseg.stage1 import pseudo_labels
    from fmbseg.stage2 import segmenter
    from fmbseg.viz import figures

    p = _params(options, "05_evaluate")
    space = segmenter.words_space(options.classes, options.background)
    paths = _images(options.images)
    module = _own_module(options, space) if options.train_on else options.module or steps.module_path(p)
    segmenter = segmenter.Segmenter.load(module, p.device, p)
    failed = 0
    for path in tqdm(paths, desc="segmenting", unit="image", disable=len(paths) == 1):
        try:
            image = images.read_image(path)
        except FmbsegError as error:
            tqdm.write(f"left out {error}")
            failed += 1
            continue
        result = segmenter.segment(image, space)
        stem = path.name if [p.stem for p in paths].count(path.stem) > 1 else path.stem
        out = options.out / stem
        pseudo_labels.write_label_map(out.with_name(f"{stem}.labels.png"), result.labels, space.palette)
        figures.save(figures.label_figure(image, {"segmentation": result.labels}, space), out.with_name(f"{stem}.overlay.png"))
        files.write_json(out.with_name(f"{stem}.json"), segmenter.describe(result))
        tqdm.write(f"{path} -> {out}.labels.png, .overlay.png, .json")
    if failed == len(paths):
        raise ParameterError("no image could be read")


def reproduce(options: argparse.Namespace) -> None:
    import pandas as pd

    from fmbseg.runs import reproduce

    folder = reproduce.reproduce(options.profile, options.notebooks or (), _settings(options.set))
    for number in (1, 2):
        table = folder / f"table{number}.csv"
        if table.is_file():
            print(f"\nTable {number}\n{pd.read_csv(table).to_string(index=False, na_rep='')}")
    print()
    for what, where in (
        ("tables", folder),
        ("figures", folder / "figures"),
        ("records", folder / "records"),
        ("executed notebooks", folder / "notebooks"),
    ):
        print(f"{what:20s}{where}")


def report(options: argparse.Namespace) -> None:
    from fmbseg.runs import report

    print(report.write(options.folder, options.out))


def doctor(options: argparse.Namespace) -> None:
    from fmbseg.runs import doctor

    print(doctor.report(options.data_root or ""))
