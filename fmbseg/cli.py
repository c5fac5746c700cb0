"""The fmbseg command: its options and help; what each command does is in ``commands.py``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fmbseg import commands
from fmbseg.errors import FmbsegError

EXAMPLES = """examples:
  fmbseg fetch                                  bring the embedded weights and images, verified
  fmbseg reproduce embedded                     run all notebooks, write the tables
  fmbseg segment cat.jpg --classes "cat, sofa"  segment an image into your words
  fmbseg doctor                                 what is here, what is missing, what brings it
"""


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

    sub = command("fetch", commands.fetch, "Bring weights and images here, verified by hash.", "Without names: all that a profile needs.")
    sub.add_argument("names", nargs="*", help="names of weights; see --list")
    sub.add_argument("--profile", default="embedded", help="whose weights to bring (default embedded)")
    sub.add_argument("--list", action="store_true", help="print the table of all weights: source, licence, size, hash")
    sub.add_argument("--again", action="store_true", help="fetch anew what is here already")

    sub = command("label", commands.label, "Stage 1: pseudo labels of unlabelled images.", "A stopped run goes on where it was.")
    common(sub, collection=True)
    sub.add_argument("--out", type=Path, help="folder for the label maps (default: in the cache)")
    sub.add_argument("--coco", type=Path, metavar="FILE.json", help="also write the labels as COCO annotations (run-length encoded)")
    sub.add_argument("--shard", type=int, default=0, help="this part of the images ...")
    sub.add_argument("--num-shards", type=int, default=1, help="... of so many")
    sub.add_argument("--engine", choices=("processes", "ray"), default="processes", help="who works: this machine, or a Ray cluster")
    sub.add_argument("--gpus-per-worker", type=float, metavar="N", help="ray only: GPUs of each worker (default: 1 on cuda, else 0)")

    sub = command(
        "train",
        commands.train,
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
        commands.evaluate,
        "Every method on every benchmark that is here; one record each.",
        "A stopped run goes on where it was. Several machines: give each its --shard, bring the shard files together, then --merge.",
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
    sub.add_argument("--merge", nargs="*", metavar="FOLDER", help="add up the shards under these folders (default: the profile's) instead")

    sub = command(
        "segment",
        commands.segment,
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
        commands.reproduce,
        "Run a profile's notebooks headlessly and write its tables.",
        "fmbseg reproduce embedded --set limit=20",
    )
    sub.add_argument("profile", help="folder of params/: embedded, smoke, paper")
    sub.add_argument("--notebooks", nargs="+", help="only these, such as 05_evaluate 08_tables")
    sub.add_argument("--set", action="append", metavar="NAME=VALUE", help="a parameter for every notebook that has it; may be given again")

    sub = command(
        "report",
        commands.report,
        "One HTML page of a profile's results: tables, figures, records, versions.",
        "Figures that show images show other people's: the page is for you, not for publishing.",
    )
    sub.add_argument("folder", type=Path, help="folder of results, such as results/embedded")
    sub.add_argument("--out", type=Path, metavar="FILE.html", help="the page (default: report.html in that folder)")

    sub = command("doctor", commands.doctor, "What is installed, which weights and data are here, and what brings what is missing.")
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
