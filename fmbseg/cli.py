"""The fmbseg command: a thin layer over the steps."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmbseg.errors import FmbsegError, ParameterError

EXAMPLES = """examples:
  fmbseg fetch                                  bring the embedded weights and photographs, verified
  fmbseg reproduce embedded                     run all notebooks, write the tables
  fmbseg segment cat.jpg --classes "cat, sofa"  segment a picture into your words
  fmbseg doctor                                 what is here, what is missing, what brings it
"""


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
    from fmbseg import params

    return params.load(notebook, options.profile, {k: v for k, v in given.items() if v is not None} | _settings(options.set))


def _collection_params(options: argparse.Namespace, notebook: str):
    """Parameters of a command that takes a collection: what ``label`` and ``train`` have in common."""
    given = {"photographs": options.photographs, "vocabulary": options.classes_file, "limit": options.limit, "workers": options.workers}
    return _params(options, notebook, **given)


def _fetch(options: argparse.Namespace) -> None:
    from fmbseg import weights

    if options.list:
        print(weights.table().to_string(index=False))
        return
    if options.names:
        wanted = [weights.find(name) for name in options.names]
    else:
        wanted = [w for w in weights.TABLE if options.profile in w.profiles]
        if not wanted:
            known = sorted({profile for w in weights.TABLE for profile in w.profiles})
            raise ParameterError(f"profile {options.profile!r}: no weights belong to it; known are {', '.join(known)}")
    for i, weight in enumerate(wanted, 1):
        print(f"[{i}/{len(wanted)}] {weight.name} ({weight.megabytes:.0f} MB, {weight.licence})", flush=True)
        folder = weights.fetch(weight, options.again)
        print(f"      {folder or 'in the cache of its hub'}", flush=True)


def _label(options: argparse.Namespace) -> None:
    from fmbseg import jobs, steps

    p = _collection_params(options, "03_stage_1_2_label_masks")
    samples = jobs.shard(steps.photographs(p), options.shard, options.num_shards)
    store = steps.make_labels(samples, p, options.out)
    done = sum(store.has(sample) for sample in samples)
    print(f"{done} of {len(samples)} photographs labelled in {store.folder}")


def _train(options: argparse.Namespace) -> None:
    from fmbseg import steps

    p = _collection_params(options, "04_train_alignment")
    samples = steps.photographs(p)
    store = steps.make_labels(samples, p)
    path = options.out or steps.module_path(p)
    result = steps.train(samples, store, p, path)
    print(f"{len(result.classes)} classes, {len(result.steps)} steps, {result.seconds:.0f} s; the module is {path}")


def _evaluate(options: argparse.Namespace) -> None:
    from fmbseg import steps

    p = _params(
        options,
        "05_evaluate",
        data_root=options.data_root,
        benchmarks=options.benchmarks,
        methods=options.methods,
        eval_limit=options.limit,
        workers=options.workers,
    )
    frame = steps.evaluate(steps.benchmarks(p), p, options.module)
    print(frame[["dataset", "method", "images", "miou", "precision", "coverage", "notes"]].to_string(index=False))


def _segment(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from fmbseg import images, plots, pseudo_labels, segment, steps, storage

    p = _params(options, "05_evaluate")
    module = options.module or steps.module_path(p)
    if not Path(module).is_file():
        raise ParameterError(f"{module}: no trained module there; run: fmbseg train, or: fmbseg reproduce embedded, or give --module")
    space = segment.words_space(options.classes, options.background)
    paths = [found for given in options.photographs for found in (images.find_images(given) if Path(given).is_dir() else [Path(given)])]
    segmenter = segment.Segmenter.load(module, p.device, p)
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
        plots.save(plots.label_figure(image, {"segmentation": result.labels}, space), out.with_name(f"{stem}.overlay.png"))
        storage.write_json(out.with_name(f"{stem}.json"), segment.describe(result))
        tqdm.write(f"{path} -> {out}.labels.png, .overlay.png, .json")
    if failed == len(paths):
        raise ParameterError("no picture could be read")


def _reproduce(options: argparse.Namespace) -> None:
    from fmbseg import reproduce

    folder = reproduce.reproduce(options.profile, options.notebooks or (), _settings(options.set))
    table = folder / "table1.csv"
    if table.is_file():
        import pandas as pd

        print(pd.read_csv(table).to_string(index=False, na_rep=""))
    for what, where in (
        ("tables", folder),
        ("figures", folder / "figures"),
        ("records", folder / "records"),
        ("executed notebooks", folder / "notebooks"),
    ):
        print(f"{what:20s}{where}")


def _doctor(options: argparse.Namespace) -> None:
    from fmbseg import doctor

    print(doctor.report(options.data_root or ""))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fmbseg",
        description="Annotation-free semantic segmentation with vision foundation models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, function, help: str, epilog: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(function=function)
        return sub

    def common(sub: argparse.ArgumentParser, collection: bool = False) -> None:
        sub.add_argument("--profile", default="embedded", help="folder of params/ to start from (default embedded)")
        sub.add_argument("--set", action="append", metavar="NAME=VALUE", help="any parameter of the step; may be given again")
        if collection:
            sub.add_argument("photographs", nargs="?", help="folder of unlabelled photographs (default: the profile's)")
            sub.add_argument("--classes-file", metavar="FILE.txt", help="words to look for, one a line (default: the profile's vocabulary)")
            sub.add_argument("--limit", type=int, help="how many photographs, evenly spread")
            sub.add_argument("--workers", type=int, help="processes of one thread each")

    sub = command("fetch", _fetch, "Bring weights and photographs here, verified by hash.", "Without names: all that a profile needs.")
    sub.add_argument("names", nargs="*", help="names of weights; see --list")
    sub.add_argument("--profile", default="embedded", help="whose weights to bring (default embedded)")
    sub.add_argument("--list", action="store_true", help="print the table of all weights: source, licence, size, hash")
    sub.add_argument("--again", action="store_true", help="fetch anew what is here already")

    sub = command("label", _label, "Stage 1: pseudo labels of unlabelled photographs.", "A stopped run goes on where it was.")
    common(sub, collection=True)
    sub.add_argument("--out", type=Path, help="folder for the label maps (default: in the cache)")
    sub.add_argument("--shard", type=int, default=0, help="this part of the photographs ...")
    sub.add_argument("--num-shards", type=int, default=1, help="... of so many")

    sub = command("train", _train, "Label photographs (Stage 1) and train the alignment module on them.")
    common(sub, collection=True)
    sub.add_argument(
        "--out", type=Path, metavar="FILE.safetensors", help="where the module is written (default: the profile's place in the cache)"
    )

    sub = command("evaluate", _evaluate, "Every method on every benchmark that is here; one record each.")
    common(sub)
    sub.add_argument("--data-root", help="folder of the benchmarks in their official layouts")
    sub.add_argument("--benchmarks", nargs="+", help="such as voc20 voc21 folder:NAME")
    sub.add_argument("--methods", nargs="+", help="dense, dense_high_resolution, stage1.1, stage1.2, stage1, fmbseg")
    sub.add_argument("--module", type=Path, help="trained module (default: the profile's)")
    sub.add_argument("--limit", type=int, help="how many images a benchmark, evenly spread")
    sub.add_argument("--workers", type=int, help="processes of one thread each")

    sub = command(
        "segment",
        _segment,
        "Segment pictures into any words.",
        'fmbseg segment photo.jpg --classes "cat, sofa, rug" --background "wall, floor" --out cut/',
    )
    common(sub)
    sub.add_argument("photographs", nargs="+", help="pictures or folders of pictures")
    sub.add_argument("--classes", required=True, help="words, separated by commas")
    sub.add_argument("--background", help="words that together are class 0, background")
    sub.add_argument("--out", type=Path, default=Path("cut"), help="folder for label maps, overlays and JSON (default cut/)")
    sub.add_argument("--module", type=Path, help="trained module (default: the profile's)")

    sub = command(
        "reproduce", _reproduce, "Run a profile's notebooks headlessly and write its tables.", "fmbseg reproduce embedded --set limit=20"
    )
    sub.add_argument("profile", help="folder of params/: embedded, smoke, paper")
    sub.add_argument("--notebooks", nargs="+", help="only these, such as 05_evaluate 08_tables")
    sub.add_argument("--set", action="append", metavar="NAME=VALUE", help="a parameter for every notebook that has it; may be given again")

    sub = command("doctor", _doctor, "What is installed, which weights and data are here, and what brings what is missing.")
    sub.add_argument("--data-root", help="folder of the benchmarks in their official layouts")
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
