"""The fmbseg command: options, help and the output of each command; the work is in the wings below.

Modules are imported in the functions that need them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmbseg.errors import FmbsegError, ParameterError, StorageError, WorkerLost

if TYPE_CHECKING:
    from fmbseg.data.label_spaces import LabelSpace

EXAMPLES = """examples:
  fmbseg fetch                                  fetch the embedded weights and images, verified
  fmbseg reproduce embedded                     run all notebooks, write the tables
  fmbseg segment cat.jpg --classes "cat, sofa"  segment an image into your words
  fmbseg doctor                                 what is here, what is missing, and how to get it

exit status:
  0  all is done          1  ended early, as by a full disk; what was computed is kept
  2  wrong input, nothing was done          3  done, but some images or benchmarks were left out: the last lines name them
  130  stopped by Ctrl-C; what was computed is kept
"""

MODULE = "trained module: a file, a folder of save_pretrained, or owner/name of the hub (default: the profile's)"

LEFT_OUT = 3
MOST_TOLD = 20


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
    """A step's parameters, overridden by options that are named after a parameter, then ``given``, then ``--set``.

    beside: another step of the same command; a ``--set`` that only that step has is left to it. Raises ParameterError also for
    a device that is not here.
    """
    from fmbseg import params, profiles
    from fmbseg.schemas import STEPS

    chosen, own = settings(options.set), STEPS[step].schema.model_fields
    if beside:
        other = STEPS[beside].schema.model_fields
        chosen = {name: value for name, value in chosen.items() if name in own or name not in other}
    named = {name: value for name, value in vars(options).items() if name in own and value is not None}
    if "limit" in own and (named | given).get("collection"):
        named.setdefault("limit", None)  # a profile's limit is for its own images
    if "vocabulary" in own and getattr(options, "own_words", None):
        named["vocabulary"] = str(_word_file(options.own_words))
    loaded = profiles.load(step, options.profile, named | given | chosen)
    params.check_device(loaded.device)
    return loaded


def _word_file(classes: str | Sequence[str]) -> Path:
    """A file in FMBSEG_HOME with these classes, one a line, as ``--classes-file`` takes it; its name is a key of them."""
    from fmbseg import files
    from fmbseg.data import label_spaces

    space = label_spaces.own_words(classes, "classes")
    lines = [f"{name}: {', '.join(words)}\n" for name, words in zip(space.names, space.prompts)]
    path = files.home() / "words" / f"{files.digest(lines)}.txt"
    if not path.is_file():
        with files.atomic_path(path) as part:
            part.write_text("".join(lines), encoding="utf-8")
    return path


def _counting(function: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
    """The command, which then prints the items that it left out, with their reasons, and whose status says whether there were any."""

    @functools.wraps(function)
    def counted(options: argparse.Namespace) -> int:
        from fmbseg.runs import parallel

        with parallel.watch() as left_out:
            function(options)
        told, several = list(left_out.values()), int(os.environ.get("WORLD_SIZE", 1)) > 1
        if told:
            print(f"{len(told)} left out:")
            print("\n".join(f"  {one.item}: {one.why}" for one in told[:MOST_TOLD]))
            if len(told) > MOST_TOLD:
                print(f"  and {len(told) - MOST_TOLD} more, told above")
        return LEFT_OUT if told and not several else 0  # torchrun would end the other processes

    return counted


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


@_counting
def label(options: argparse.Namespace) -> None:
    from fmbseg import files
    from fmbseg.data import label_spaces
    from fmbseg.runs import label, parallel
    from fmbseg.tools import export, instances, segmenting
    from fmbseg.viz import figures

    p = _params(options, "label")
    options.format = export.formats(options.format, label_spaces.vocabulary(p.vocabulary, p.words))
    if options.results:
        if options.out and options.results.resolve() == options.out.resolve():
            raise ParameterError(f"--results {options.results}: is the folder of --out, whose records have the same names; give another")
        files.check_place(options.results, folder=True, name="--results")
    if options.coco:
        files.check_place(options.coco, folder=False, name="--coco")
    samples = parallel.shard(label.collection(p), options.shard, options.num_shards)
    store, failures = label.label(samples, p, options.out, options.engine, options.gpus_per_worker)
    print(f"{len(samples) - len(failures)} of {len(samples)} images labelled in {store.folder}")
    if empty := sum(store.coverage(sample) == 0 for sample in samples):
        print(
            f"{empty} of them have no labelled pixel: no word was found, or no mask is clearly nearer to its word than to others (min_margin)"
        )
    if options.results:
        made = segmenting.of_labels(samples, store, p, figures.save_overlay, options.results)
        print(f"{len(made)} of them with overlay and margin in {options.results}; look at them with: fmbseg review {options.results}")
    if options.coco or options.format:
        paths = [sample.image for sample in samples if store.has(sample)]
        items = export.of_store(samples, store, instances.sam_regions(paths, p) if options.instances == "sam" else None)
        if options.coco:
            count = len(export.coco(items, store.space, options.coco, way=options.instances)["images"])
            print(f"{count} of them written to {options.coco} as COCO annotations (run-length encoded)")
        if options.format:
            alone = options.num_shards == 1  # others may write there too
            export.export(items, store.space, options.format, store.folder / segmenting.EXPORT, options.instances, alone)
            print(f"{', '.join(options.format)} in {store.folder / segmenting.EXPORT}")
    if failures:
        print(f"{len(failures)} failed; the reasons are in {store.failed}, and the same command tries them again")


@_counting
def train(options: argparse.Namespace) -> None:
    from fmbseg import files
    from fmbseg.data import label_spaces
    from fmbseg.runs import label, parallel, records, train
    from fmbseg.stage2.distributed import rank
    from fmbseg.tools.corrected import MixedStore, take

    p = _params(options, "train")
    if p.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before anything uses CUDA
    path = options.out or train.module_path(p)
    files.check_place(path, folder=False, name="--out" if options.out else "FMBSEG_HOME")
    if not options.out:
        files.check_place(records.results_folder(p), folder=True, name="results_dir")
    with parallel.group(p.device) as device:
        p = p.model_copy(update={"device": device})
        samples, corrected = label.collection(p), {}
        if options.labels:
            corrected = take(options.labels, samples, label_spaces.vocabulary(p.vocabulary, p.words))
            print(f"{len(corrected)} of {len(samples)} images have masks of {options.labels}; pseudo labels are made of the others")
        store, _ = label.label(parallel.split_by_rank([sample for sample in samples if sample.name not in corrected]), p)
        store = MixedStore(store, corrected) if corrected else store
        parallel.wait()
        result = train.train(samples, store, p, path)
        if rank() == 0:
            many, steps = f"trained on {result.images} of {len(samples)} images", result.steps[-1]["step"] + 1
            none = p.epochs * -(-result.images // p.images_per_batch) - steps
            empty = f" ({none} batches had no label)" if none > 0 else ""
            print(f"{many}: {len(result.classes)} classes, {steps} steps{empty}, {result.seconds:.0f} s; the module is {path}")


@_counting
def evaluate(options: argparse.Namespace) -> None:
    from fmbseg import files
    from fmbseg.runs import evaluate, records

    p = _params(options, "evaluate")
    parts = ([f"limit-{p.eval_limit}"] if p.eval_limit else []) + ([options.module_file.stem] if options.module_file else [])
    if parts and "run" not in settings(options.set):
        p = p.model_copy(update={"run": re.sub(r"[^A-Za-z0-9_-]", "_", "-".join(parts))})
        print(f"another module or a part of the images: the records are those of the run {p.run}; --set run=main: those of the tables")
    files.check_place(records.results_folder(p), folder=True, name="results_dir")
    frame = evaluate.evaluate(evaluate.find_benchmarks(p.benchmarks, p.data_root), p, options.module_file, options.engine)
    if p.num_shards > 1:
        print(f"shard {p.shard} of {p.num_shards} is counted and kept; when all are, run the same without --shard for the whole")
    columns = ["dataset", "method", "images", "failed", "miou", "precision", "coverage", "notes"]
    print(frame[[column for column in columns if column in frame]].to_string(index=False))


def _own_module(options: argparse.Namespace, space: LabelSpace) -> Path:
    """A module trained for the words of ``space``, on pseudo labels of the user's own unlabelled images.

    The name of its file is a key of the words, the images and the parameters.
    """
    from fmbseg import files
    from fmbseg.params import AlignParams
    from fmbseg.runs import label, train

    words = [word for prompts in space.prompts for word in prompts]
    p = _params(options, "train", "segment", collection=str(options.train_on), vocabulary=str(_word_file(words)))
    samples = label.collection(p)
    store, _ = label.label(samples, p)
    seen = sorted(files.sha256_of(sample.image) for sample in samples if store.has(sample))
    path = train.module_path(p, f"own-{files.digest(words, seen, label.content(p), p.content(AlignParams), p.seed)}")
    result = train.fit(samples, store, p, path)
    many = f"trained on {result.images} of {len(samples)} images of {options.train_on}"
    print(f"{many} for {len(result.classes)} of {len(words)} words: {path}")
    return path


@_counting
def segment(options: argparse.Namespace) -> None:
    from fmbseg import files
    from fmbseg.runs import hub, modules
    from fmbseg.stage2 import segmenter
    from fmbseg.tools import export, instances, segmenting, video
    from fmbseg.viz import figures

    if options.limit is not None and not options.train_on:
        raise ParameterError(f"--limit {options.limit}: is the number of images to train on; give it with --train-on, or leave it out")
    p = _params(options, "segment", "train" if options.train_on else "", workers=options.workers or 1)
    space = segmenter.words_space(options.classes, options.background)
    options.format = export.formats(options.format, space)
    files.check_place(options.out, folder=True, name="--out")
    places = segmenting.find(options.images, options.out, options.video)
    module = _own_module(options, space) if options.train_on else hub.find(options.module_file or modules.default(p.profile))
    made = segmenting.run(places, space, module, p, figures.save_overlay, options.out, figures.overlay)
    if options.format and all(video.is_video(path) for path in places):
        print(f"--format {','.join(options.format)}: is of images alone, so nothing was written; give frames as a folder without --video")
    elif options.format:
        whole = [path for path in made if segmenting.beside(places[path], ".labels.png").is_file()]
        regions = instances.sam_regions(whole, p) if options.instances == "sam" else None
        items = segmenting.labelled(made, places, options.out, regions)
        export.export(items, space, options.format, options.out / segmenting.EXPORT, options.instances, fresh=True)
        print(f"{', '.join(options.format)} in {options.out / segmenting.EXPORT}")
    print(f"{len(made)} of {len(places)} images segmented in {options.out}")


def onnx(options: argparse.Namespace) -> None:
    from fmbseg import files
    from fmbseg.runs import modules
    from fmbseg.tools import deploy

    files.check_place(options.out, folder=False, name="--out")
    segmenter = modules.Segmenter.from_pretrained(options.module_file or modules.default(options.profile))
    path = deploy.to_onnx(segmenter, options.classes, options.out, options.background, options.size)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; onnxruntime gives what torch gives")


def review(options: argparse.Namespace) -> None:
    from fmbseg.tools import review

    print(f"{review.write(options.folder)}: open it in a browser; save {review.VERDICTS} beside it")


def reproduce(options: argparse.Namespace) -> None:
    import pandas as pd

    from fmbseg.runs import reproduce

    folder = reproduce.reproduce(options.profile, options.notebooks or (), settings(options.set))
    for number in (1, 2):
        table = folder / f"table{number}.csv"
        if table.is_file():
            print(f"\nTable {number}\n{pd.read_csv(table).to_string(index=False, na_rep='')}")
    print(f"\n{'tables':20s}{folder}")
    for what in ("figures", "records", "notebooks"):
        print(f"{what:20s}{folder / what}")


def report(options: argparse.Namespace) -> None:
    from fmbseg.runs import reproduce

    print(reproduce.report(options.folder, options.out, options.run))


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
        sub = subparsers.add_parser(
            name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        sub.set_defaults(function=function)
        return sub

    def common(sub: argparse.ArgumentParser, collection: bool = False) -> None:
        """Options are named after the parameter that they set."""
        sub.add_argument("--profile", default="embedded", help="folder of params/ to start from (default embedded)")
        sub.add_argument("--set", action="append", metavar="NAME=VALUE", help="any parameter of the step; may be given again")
        if collection:
            sub.add_argument("collection", metavar="images", nargs="?", help="folder of unlabelled images (default: the profile's)")
            words = sub.add_mutually_exclusive_group()
            words.add_argument("--classes", dest="own_words", metavar="WORDS", help="classes to look for: 'person=person|man|woman, cat'")
            words.add_argument(
                "--classes-file",
                dest="vocabulary",
                metavar="FILE.txt",
                help="classes to look for, one a line: a word, or 'name: word, word' (default: the profile's vocabulary)",
            )
            sub.add_argument("--limit", type=int, help="how many images, evenly spread")
            sub.add_argument("--workers", type=int, help="processes of one thread each")

    def exporting(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--format",
            default="",
            metavar="LIST",
            help="also write for other tools, to fmbseg-export/ in the results: coco (run-length encoded), coco-polygons, yolo, voc (CVAT), label-studio, geojson",
        )
        sub.add_argument(
            "--instances",
            nargs="?",
            const="parts",
            default="",
            choices=("parts", "sam"),
            help="objects in these formats: connected parts of a class (parts, the default of the option) or SAM's masks, not whole classes",
        )

    sub = command("fetch", fetch, "Fetch weights and images, verified by hash.", "Without names: all that a profile needs.")
    sub.add_argument("names", nargs="*", help="names of weights; see --list")
    sub.add_argument("--profile", default="embedded", help="the profile whose weights to fetch (default embedded)")
    sub.add_argument("--list", action="store_true", help="print the table of all weights: source, licence, size, hash")
    sub.add_argument("--again", action="store_true", help="fetch again what is here already")

    sub = command("label", label, "Stage 1: pseudo labels of unlabelled images.", "A stopped run goes on where it was.")
    common(sub, collection=True)
    sub.add_argument("--out", type=Path, help="folder for the label maps (default: in the cache)")
    sub.add_argument("--coco", type=Path, metavar="FILE.json", help="also write the labels as COCO annotations (run-length encoded)")
    sub.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="also write label map, overlay, margin and JSON of every image there, as segment does, for fmbseg review",
    )
    exporting(sub)
    sub.add_argument("--shard", type=int, default=0, help="label only this part of the images, from 0 ...")
    sub.add_argument("--num-shards", type=int, default=1, help="... to this number minus 1")
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
        "--labels",
        type=Path,
        metavar="FOLDER",
        help="masks that a person corrected, in place of the pseudo labels of their images: a .json of COCO or Label Studio, a folder of"
        " VOC (CVAT) or YOLO, PNGs with classes.txt, or results of segment (if reviewed, the accepted ones)",
    )
    sub.add_argument(
        "--out",
        type=Path,
        metavar="FILE.safetensors",
        help="file of the module; its record is written beside it (default: the profile's module in the cache)",
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
    sub.add_argument("--module", dest="module_file", type=Path, help=MODULE)
    sub.add_argument("--limit", dest="eval_limit", type=int, help="how many images a benchmark, evenly spread")
    sub.add_argument("--workers", type=int, help="processes of one thread each")
    sub.add_argument("--shard", type=int, help="count only this part of the images, from 0 ...")
    sub.add_argument("--num-shards", type=int, help="... to this number minus 1")
    sub.add_argument("--engine", choices=("processes", "ray"), default="processes", help="who works: this machine, or a Ray cluster")

    sub = command(
        "segment",
        segment,
        "Segment images into any words.",
        'fmbseg segment photo.jpg --classes "cat, sofa, rug" --background "wall, floor" --out cut/\nA stopped run goes on where it was.',
    )
    common(sub)
    sub.add_argument(
        "images",
        nargs="+",
        help="images, folders of images, videos, or patterns such as 'photos/*.jpg'; large images and GeoTIFFs are segmented in tiles",
    )
    sub.add_argument(
        "--classes",
        "--classes-file",
        dest="classes",
        required=True,
        help="words, separated by commas; a class of several words: 'person=person|man|woman, cat'; or FILE.txt as for label; or the"
        " name of a label space, such as lvis1203",
    )
    sub.add_argument("--background", help="words that together are class 0, background")
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("cut"),
        help="folder for label maps, overlays, margins and JSON (default cut/); sub-folders are kept in it",
    )
    exporting(sub)
    sub.add_argument("--least-similarity", type=float, metavar="X", help="pixels less similar to their class are unlabelled (255)")
    sub.add_argument(
        "--least-margin", type=float, metavar="X", help="pixels whose class is less than this above the next class are unlabelled"
    )
    sub.add_argument(
        "--detected-only", action="store_true", default=None, help="pixels of classes that Stage 1 does not detect are unlabelled"
    )
    sub.add_argument("--video", action="store_true", help="a folder is a video, its images the frames in the order of their names")
    sub.add_argument("--every", type=int, metavar="N", help="videos: segment every N-th frame")
    sub.add_argument("--average", type=int, metavar="A", help="videos: average similarities over A frames before and after each")
    sub.add_argument("--workers", type=int, help="processes of one thread each (default 1)")
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--module", dest="module_file", type=Path, help=MODULE)
    which.add_argument("--train-on", type=Path, metavar="FOLDER", help="first train a module for these words on your unlabelled images")
    sub.add_argument("--limit", type=int, help="with --train-on: how many of them, evenly spread")

    sub = command(
        "onnx",
        onnx,
        "Encoder, module and words as one ONNX file, which onnxruntime runs without torch.",
        'fmbseg onnx --classes "cat, dog" --background "wall, floor" --out model.onnx',
    )
    sub.add_argument("--profile", default="embedded", help="the profile whose module is taken without --module (default embedded)")
    sub.add_argument("--classes", "--classes-file", dest="classes", required=True, help="as for segment")
    sub.add_argument("--background", help="words that together are class 0, background")
    sub.add_argument("--module", dest="module_file", type=Path, help=MODULE)
    sub.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size of its input images, multiples of the encoder's patch (default 448 448)",
    )
    sub.add_argument("--out", type=Path, default=Path("model.onnx"), metavar="FILE.onnx", help="default model.onnx")

    sub = command(
        "review",
        review,
        "One page of the results of segment or label, the least certain first, to accept or reject each.",
        "Its button saves fmbseg-review.csv; put it into the folder, where train --labels and this command read it.",
    )
    sub.add_argument("folder", type=Path, help="folder of results (segment --out, label --results)")

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
    sub.add_argument("--run", default="main", help="the run whose records it shows (default main)")

    sub = command("doctor", doctor, "What is installed, which weights and data are here, and how to get the missing ones.")
    sub.add_argument("--data-root", "--data", help="folder of the benchmarks in their official layouts")
    return parser


def _check_here() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ParameterError("the working folder was deleted; change to one that is there") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, as ``fmbseg --help`` lists them. A user's error is one sentence on standard error."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files may hold what a terminal cannot write
    try:
        _check_here()
        status = options.function(options) or 0
        sys.stdout.flush()
        return status
    except FmbsegError as error:
        print(f"fmbseg: {error}", file=sys.stderr)
        return 1 if isinstance(error, (StorageError, WorkerLost)) else 2
    except KeyboardInterrupt:
        print("fmbseg: stopped; what was computed is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
