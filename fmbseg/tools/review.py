"""``fmbseg review``: a page on which a person accepts or rejects the results of ``segment`` and ``label``, the least certain first."""

from __future__ import annotations

import json
import os
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from fmbseg import files
from fmbseg.errors import DataError

PAGE, VERDICTS = "fmbseg-review.html", "fmbseg-review.csv"
SHOWN = {"image and segmentation": ".overlay.png", "margin": ".margin.png"}


def results(folder: Path) -> dict[str, dict]:
    """The JSON that ``segment`` wrote for each image, by the name of the result relative to ``folder``, the least mean margin first.

    Raises DataError where the folder holds no result.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder; give the one that fmbseg segment or label --results wrote to")
    found = {}
    for path in sorted(Path(folder).rglob("*.json")):
        if (said := files.result(path)).get("key") and "frames" not in said:  # not a video
            found[path.relative_to(folder).as_posix().removesuffix(".json")] = said
    if not found:
        raise DataError(f"{folder}: holds no result; give the folder that fmbseg segment (--out) or label (--results) wrote to")
    return dict(sorted(found.items(), key=lambda pair: pair[1]["mean_margin"]))


def write(folder: Path) -> Path:
    """Write the page of a folder of results, with the verdicts so far; returns its path.

    It is one file and needs no server: verdicts stay in the browser, and a button saves them as ``VERDICTS``, to be put into the folder.
    """
    known, items = verdicts(folder), []
    for name, said in results(folder).items():
        items.append(
            {
                "result": _shown(name),
                "image": said["image"],
                "link": _link(os.path.relpath(said["image"], folder)),
                "images": [[title, _link(f"{name}{suffix}")] for title, suffix in SHOWN.items()],
                "margin": said["mean_margin"],
                "classes": [[one["name"], one["mean_margin"]] for one in said["classes"]],
                "verdict": known.get(name, ""),
                "key": said["key"],
            }
        )
    data = json.dumps({"folder": str(Path(folder).absolute()), "items": items}).replace("<", "\\u003c")
    page = (files.ASSETS / "review.html").read_text(encoding="utf-8")
    with files.atomic_path(Path(folder) / PAGE) as part:
        part.write_text(page.replace("$data", data), encoding="utf-8")
    return Path(folder) / PAGE


def _link(path: str) -> str:
    return quote(os.fsencode(path.replace(os.sep, "/")))


def _shown(name: str) -> str:
    """A name as a browser can save it: bytes that are not UTF-8 are replaced."""
    return os.fsencode(name).decode(errors="replace")


def verdicts(folder: Path) -> dict[str, str]:
    """The verdict, "accept" or "reject", of each reviewed result; empty where there is no ``VERDICTS``.

    A verdict on a result that was made again since, in another way, does not count; a file without keys, from before, is
    believed. Raises DataError for a file that the page did not write.
    """
    path = Path(folder) / VERDICTS
    if not path.is_file():
        return {}
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        found = dict(zip(frame["result"], frame["verdict"]))
    except (KeyError, ValueError, OSError) as error:
        raise DataError(f"{path}: no file of the review page ({error}); save it there again") from error
    if unknown := set(found.values()) - {"accept", "reject", ""}:
        raise DataError(f"{path}: holds the verdict {sorted(unknown)[0]!r}; it is accept or reject")
    keys = dict(zip(frame["result"], frame.get("key", ())))
    names = {name: _shown(name) for name, said in results(folder).items() if keys.get(_shown(name), said["key"]) == said["key"]}
    return {name: found[shown] for name, shown in names.items() if found.get(shown)}
