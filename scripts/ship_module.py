"""Make the module that comes with the repository: pre-aligned on a folder of unlabelled images, weights in fp16.

    python scripts/ship_module.py FOLDER --name "what the images are" --set precision=bf16 --set prealign_limit=1400

The choice of pre-alignment alone, and its numbers, are in fmbseg/assets/fmbseg-embedded.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fmbseg import cli, files, profiles
from fmbseg.runs import modules, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="unlabelled images")
    parser.add_argument("--name", required=True, help="what the images are, for the module's description")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="any parameter; may be given again")
    parser.add_argument("--out", type=Path, default=modules.SHIPPED)
    options = parser.parse_args()
    p = profiles.load("train", "embedded", {"collection": str(options.folder)} | cli.settings(options.set))
    alignment, described = modules.load(train.prealign(p))
    described["collection"] = options.name
    described["parameters"] |= {"collection": options.name, "data_root": "", "limit": None}
    tensors = {name: value if name in ("mean", "std") else value.half() for name, value in alignment.state_dict().items()}
    files.write_tensors(options.out, tensors, {"fmbseg": json.dumps(described)})
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, pre-aligned on {described['prealigned']} images")


if __name__ == "__main__":
    main()
