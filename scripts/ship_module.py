"""Write a trained module as the one that comes with the repository: weights in fp16, without its loss curve.

    fmbseg train FOLDER --out module.safetensors --set limit=1049 ...     # as fmbseg/assets/fmbseg-embedded.md says
    python scripts/ship_module.py module.safetensors
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fmbseg import files
from fmbseg.runs import modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("module", type=Path)
    parser.add_argument("--collection", default="", help="what the images were, in place of the folder's path")
    parser.add_argument("--out", type=Path, default=modules.SHIPPED)
    options = parser.parse_args()
    alignment, described = modules.load(options.module)
    described = described | {"key": "", "curve": {}, "collection": options.collection or described["collection"]}
    described["parameters"] = described["parameters"] | {"collection": described["collection"], "data_root": ""}
    tensors = {name: value if name in ("mean", "std") else value.half() for name, value in alignment.state_dict().items()}
    files.write_tensors(options.out, tensors, {"fmbseg": json.dumps(described)})
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, {described['images']} images labelled, {described['prealigned']} pre-aligned")


if __name__ == "__main__":
    main()
