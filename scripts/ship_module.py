"""Make the module that comes with the repository, from a folder of unlabelled images, weights in fp16.

    python scripts/ship_module.py FOLDER --name "what the images are" --set limit=null --set start_share=0.5 ...

All parameters of the one that is there, and its numbers, are in fmbseg/assets/fmbseg-embedded.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fmbseg import cli, files, profiles
from fmbseg.runs import label, modules, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="unlabelled images")
    parser.add_argument("--name", required=True, help="what the images are, for the module's description")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="any parameter; may be given again")
    parser.add_argument("--out", type=Path, default=modules.SHIPPED)
    options = parser.parse_args()
    p = profiles.load("train", "embedded", {"collection": str(options.folder)} | cli.settings(options.set))
    samples, path = label.collection(p), train.module_path(p, "shipped")
    train.fit(samples, label.label(samples, p)[0], p, path)
    alignment, described = modules.load(path)
    described |= {"collection": options.name, "curve": {}}
    described["parameters"] |= {"collection": options.name, "data_root": ""}
    tensors = {name: value if name in ("mean", "std") else value.half() for name, value in alignment.state_dict().items()}
    files.write_tensors(options.out, tensors, {"fmbseg": json.dumps(described)})
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, trained on {described['images']} images")


if __name__ == "__main__":
    main()
