"""The fmbseg command: options, help and what each command prints; the work is in the wings below.

Modules are imported in the functions that need them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmbseg.errors import FmbsegError, ParameterError

if TYPE_CHECKING:
    from fmbseg.data.label_spaces import LabelSpace

EXAMPLES = """examples:
  fmbseg fetch                                  bring the embedded weights and images, verified
  fmbseg reproduce embedded                     run all notebooks, write the tables
  fmbseg segment cat.jpg --classes "cat, sofa"  segment an image into your words
  fmbseg doctor                                 what is here, what is missing, what brings it
"""


def _value(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ParameterError(f"--set {text}: the value is not readable as YAML; quote it") from None


def settings(pairs: Sequence[str] | None) -> dict[str, Any]:
    found = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise ParameterError(f"--set {pair}: give it as NAME=VALUE, such as --set epochs=5")
        found[name.strip()] = _value(value)
    return found


def _params(options: argparse.Namespace, step: str, beside: str = "", **given: Any):
    """A step's parameters with the command line's on top; options left out change nothing.

    beside: another step of the same command; a ``--set`` that only it has is left to it.
    """
    from fmbseg import profiles
    from fmbseg.schemas import STEPS

    chosen = settings(options.set)
    if beside:
        own, other = STEPS[step].schema.model_fields, STEPS[beside].schema.model_fields
        chosen = {name: value for name, value in chosen.items() if name in own or name not in other}
    return profiles.load(step, options.profile, {k: v for k, v in given.items() if v is not None} | chosen)


def _collection_params(options: argparse.Namespace, step: str):
    """Parameters of a command that takes a collection: what ``label`` and ``train`` have in common."""
    given = {"collection": options.images, "vocabulary": options.classes_file, "limit": options.limit, "workers": options.workers}
    return _params(options, step, **given)


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
    from fmbseg.runs import label, parallel
    from fmbseg.tools import export

    p = _collection_params(options, "label")
    samples = parallel.shard(label.collection(p), options.shard, options.num_shards)
    store, failures = label.label(samples, p, options.out, options.engine, options.gpus_per_worker)
    print(f"{len(samples) - len(failures)} of {len(samples)} images labelled in {store.folder}")
    if options.coco:
        count = export.write_coco(samples, store, options.coco)
        print(f"{count} of them written to {options.coco} as COCO annotations (one a class and image, run-length encoded)")
    if failures:
        print(f"{len(failures)} failed; the reasons are in {store.failed}, and the same command tries them again")


def train(options: argparse.Namespace) -> None:
    from fmbseg.runs import label, parallel, train
    from fmbseg.stage2.distributed import rank

    p = _collection_params(options, "train")
    if p.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before anything uses CUDA
    with parallel.group(p.device) as device:
        p = p.model_copy(update={"device": device})
        samples = label.collection(p)
        store, _ = label.label(parallel.split_by_rank(samples), p)
        parallel.wait()
        path = options.out or train.module_path(p)
        result = train.train(samples, store, p, path)
        if rank() == 0:
            print(f"{len(result.classes)} classes, {result.steps[-1]['step'] + 1} steps, {result.seconds:.0f} s; the module is {path}")


def evaluate(options: argparse.Namespace) -> None:
    from fmbseg.runs import evaluate

    p = _params(
        options,
        "evaluate",
        data_root=options.data_root,
        benchmarks=options.benchmarks,
        methods=options.methods,
        eval_limit=options.limit,
        workers=options.workers,
        shard=options.shard,
        num_shards=options.num_shards,
    )
    frame = evaluate.evaluate(evaluate.find_benchmarks(p.benchmarks, p.data_root), p, options.module, options.engine)
    if p.num_shards > 1:
        print(f"shard {p.shard} of {p.num_shards} is counted and kept; when all are, run the same without --shard for the whole")
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
    """A module trained for the words of ``space``, on pseudo labels of the user's own unlabelled images."""
    from fmbseg import files
    from fmbseg.runs import label, train

    words = [word for prompts in space.prompts for word in prompts]
    file = files.home() / "words" / f"{files.digest(words)}.txt"
    with files.atomic_path(file) as part:
        part.write_text("\n".join(words) + "\n", encoding="utf-8")
    p = _params(options, "train", "segment", collection=str(options.train_on), vocabulary=str(file), limit=options.limit)
    samples = label.collection(p)
    path = train.module_path(p, f"own-{files.digest(words, str(options.train_on.absolute()))}")
    result = train.fit(samples, label.label(samples, p)[0], p, path)
    print(f"trained on {len(samples)} images of {options.train_on} for {len(result.classes)} of {len(words)} words: {path}")
    return path


def segment(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from fmbseg import files
    from fmbseg.data import images
    from fmbseg.runs import modules
    from fmbseg.stage2 import segmenter
    from fmbseg.viz import figures

    p = _params(options, "segment", "train" if options.train_on else "")
    space = segmenter.words_space(options.classes, options.background)
    paths = _images(options.images)
    module = _own_module(options, space) if options.train_on else options.module or modules.default(p.profile)
    loaded = modules.Segmenter.load(module, p.device, p)
    failed = 0
    for path in tqdm(paths, desc="segmenting", unit="image", disable=len(paths) == 1):
        try:
            image = images.read_image(path)
        except FmbsegError as error:
            tqdm.write(f"left out {error}")
            failed += 1
            continue
        result = loaded.segment(image, space)
        stem = path.name if [p.stem for p in paths].count(path.stem) > 1 else path.stem
        out = options.out / stem
        images.write_label_map(out.with_name(f"{stem}.labels.png"), result.labels, space.palette)
        figures.save(figures.label_figure(image, {"segmentation": result.labels}, space), out.with_name(f"{stem}.overlay.png"))
        files.write_json(out.with_name(f"{stem}.json"), segmenter.describe(result))
        tqdm.write(f"{path} -> {out}.labels.png, .overlay.png, .json")
    if failed == len(paths):
        raise ParameterError("no image could be read")


def reproduce(options: argparse.Namespace) -> None:
    import pandas as pd

    from fmbseg.runs import reproduce

    folder = reproduce.reproduce(options.profile, options.notebooks or (), settings(options.set))
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
    from fmbseg.runs import reproduce

    print(reproduce.report(options.folder, options.out))


def doctor(options: argparse.Namespace) -> None:
    from fmbseg.runs import doctor

    print(doctor.report(options.data_root or ""))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fmbseg",
        description="Annotation-free semantic segmentation with vision foundation models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, function, help: str, epilog: str = "") -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(function=function)
        return sub

    def common(sub: argparse.ArgumentParser, collection: bool = False) -> None:
        sub.add_argument("--profile", default="embedded", help="folder of params/ to start from (default embedded)")
        sub.add_argument("--set", action="append", metavar="NAME=VALUE", help="any parameter of the step; may be given again")
        if collection:
            sub.add_argument("images", nargs="?", help="folder of unlabelled images (default: the profile's)")
            sub.add_argument("--classes-file", metavar="FILE.txt", help="words to look for, one a line (default: the profile's vocabulary)")
            sub.add_argument("--limit", type=int, help="how many images, evenly spread")
            sub.add_argument("--workers", type=int, help="processes of one thread each")

    sub = command("fetch", fetch, "Bring weights and images here, verified by hash.", "Without names: all that a profile needs.")
    sub.add_argument("names", nargs="*", help="names of weights; see --list")
    sub.add_argument("--profile", default="embedded", help="whose weights to bring (default embedded)")
    sub.add_argument("--list", action="store_true", help="print the table of all weights: source, licence, size, hash")
    sub.add_argument("--again", action="store_true", help="fetch anew what is here already")

    sub = command("label", label, "Stage 1: pseudo labels of unlabelled images.", "A stopped run goes on where it was.")
    common(sub, collection=True)
    sub.add_argument("--out", type=Path, help="folder for the label maps (default: in the cache)")
    sub.add_argument("--coco", type=Path, metavar="FILE.json", help="also write the labels as COCO annotations (run-length encoded)")
    sub.add_argument("--shard", type=int, default=0, help="this part of the images ...")
    sub.add_argument("--num-shards", type=int, default=1, help="... of so many")
    sub.add_argument("--engine", choices=("processes", "ray"), default="processes", help="who works: this machine, or a Ray cluster")
    sub.add_argument("--gpus-per-worker", type=float, metavar="N", help="ray only: GPUs of each worker (default: 1 on cuda, else 0)")

    sub = command(
        "train",
        train,
        "Label images (Stage 1) and train the alignment module on them.",
        "On several GPUs: torchrun --nproc-per-node 8 -m fmbseg.cli train --profile paper",
    )
    common(sub, collection=True)
    sub.add_argument(
        "--out",
        type=Path,
        metavar="FILE.safetensors",
        help="where the module is written, its record beside it (default: the profile's place in the cache)",
    )

    sub = command(
        "evaluate",
        evaluate,
        "Every method on every benchmark that is here; one record each.",
        "A stopped run goes on where it was. Several machines that share FMBSEG_HOME: give each its --shard, then run once without.",
    )
    common(sub)
    sub.add_argument("--data-root", "--data", help="folder of the benchmarks in their official layouts")
    sub.add_argument("--benchmarks", nargs="+", help="such as voc20 voc21 folder:NAME")
    sub.add_argument("--methods", nargs="+", help="dense, dense_high_resolution, stage1.1, stage1.2, stage1, fmbseg")
    sub.add_argument("--module", type=Path, help="trained module (default: the profile's)")
    sub.add_argument("--limit", type=int, help="how many images a benchmark, evenly spread")
    sub.add_argument("--workers", type=int, help="processes of one thread each")
    sub.add_argument("--shard", type=int, help="count this part of the images only, from 0 ...")
    sub.add_argument("--num-shards", type=int, help="... of so many")
    sub.add_argument("--engine", choices=("processes", "ray"), default="processes", help="who works: this machine, or a Ray cluster")

    sub = command(
        "segment",
        segment,
        "Segment images into any words.",
        'fmbseg segment photo.jpg --classes "cat, sofa, rug" --background "wall, floor" --out cut/',
    )
    common(sub)
    sub.add_argument("images", nargs="+", help="images, folders of images, or patterns such as 'photos/*.jpg'")
    sub.add_argument("--classes", required=True, help="words, separated by commas")
    sub.add_argument("--background", help="words that together are class 0, background")
    sub.add_argument("--out", type=Path, default=Path("cut"), help="folder for label maps, overlays and JSON (default cut/)")
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--module", type=Path, help="trained module (default: the profile's)")
    which.add_argument("--train-on", type=Path, metavar="FOLDER", help="first train a module for these words on your unlabelled images")
    sub.add_argument("--limit", type=int, help="with --train-on: how many of them, evenly spread")

    sub = command(
        "reproduce",
        reproduce,
        "Run a profile's notebooks headlessly and write its tables.",
        "fmbseg reproduce embedded --set limit=20",
    )
    sub.add_argument("profile", help="folder of params/: embedded, smoke, paper")
    sub.add_argument("--notebooks", nargs="+", help="only these, such as 05_evaluate 08_tables")
    sub.add_argument("--set", action="append", metavar="NAME=VALUE", help="a parameter for every notebook that has it; may be given again")

    sub = command(
        "report",
        report,
        "One HTML page of a profile's results: tables, figures, records, versions.",
        "Figures that show images show other people's: the page is for you, not for publishing.",
    )
    sub.add_argument("folder", type=Path, help="folder of results, such as results/embedded")
    sub.add_argument("--out", type=Path, metavar="FILE.html", help="the page (default: report.html in that folder)")

    sub = command("doctor", doctor, "What is installed, which weights and data are here, and what brings what is missing.")
    sub.add_argument("--data-root", "--data", help="folder of the benchmarks in their official layouts")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. A user's error is one sentence on standard error and status 2."""
    options = _parser().parse_args(arguments)
    try:
        options.function(options)
    except FmbsegError as error:
        print(f"fmbseg: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fmbseg: stopped; what was computed is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
