"""Run a profile's notebooks headlessly with papermill, and make one HTML page of its results."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmbseg import files, params, profiles
from fmbseg.errors import DataError
from fmbseg.runs import records
from fmbseg.schemas import NOTEBOOKS, STEPS


def reproduce(profile: str, notebooks: Sequence[str] = (), overrides: Mapping[str, Any] | None = None) -> Path:
    """Execute a profile's notebooks in order; executed copies go to ``results/<profile>/notebooks/``.

    notebooks: their names; empty: all. overrides: parameters, injected into every notebook that has them; a parameter that no
    notebook has is an error. All parameters are checked before anything runs. Raises DataError for a notebook that fails.
    """
    names = list(notebooks) or list(NOTEBOOKS)
    overrides = dict(overrides or {})
    schemas = {name: STEPS[profiles.step_of(name)].schema for name in names}
    for key in overrides.keys() - {field for schema in schemas.values() for field in schema.model_fields}:
        params.make(schemas[names[-1]], {key: overrides[key]}, "override")  # no notebook has it: says so
    plans = {name: {k: v for k, v in overrides.items() if k in schema.model_fields} for name, schema in schemas.items()}
    checked = [profiles.load(profiles.step_of(name), profile, plan) for name, plan in plans.items()]
    files.project_root()  # raises outside a clone
    folder = records.results_folder(checked[-1])
    for i, (name, injected) in enumerate(plans.items(), 1):
        started = time.perf_counter()
        print(f"[{i}/{len(plans)}] {name}", flush=True)
        _execute(name, {"profile": profile, **injected}, folder / "notebooks" / f"{name}.ipynb")
        print(f"[{i}/{len(plans)}] {name}: {time.perf_counter() - started:.0f} s", flush=True)
    return folder


def _execute(name: str, values: Mapping[str, Any], out: Path) -> None:
    import yaml

    folder = files.project_root() / "notebooks"
    out.parent.mkdir(parents=True, exist_ok=True)  # papermill does not make it
    options = ["--cwd", folder, "--kernel", "python3", "--no-progress-bar", "--log-output", "--log-level", "WARNING"]
    values = ["-y", yaml.safe_dump(dict(values))]
    run = subprocess.run([sys.executable, "-m", "fmbseg.runs.headless", folder / f"{name}.ipynb", out, *options, *values])
    if run.returncode != 0:
        raise DataError(f"{name} stopped with an error, told above; its executed copy is {out}. What was computed is kept: run again")


def report(folder: str | Path, out: str | Path | None = None, run: str = "main") -> Path:
    """One HTML page of a run's results: notebook 08, executed on them, without its code.

    folder: such as results/embedded; out: the page; None: report.html in that folder; run: the run whose records are shown.
    Raises DataError where the folder holds no record of an evaluation in that run.
    """
    folder = Path(folder).absolute()
    found = records.load(folder / "records" / run)
    if "evaluate" not in set(found["kind"]):
        kinds = ", ".join(sorted(set(found["kind"])))
        raise DataError(f"{folder / 'records' / run}: holds records of {kinds} alone; run notebook 05 or fmbseg evaluate first")
    out = Path(out) if out else folder / "report.html"
    from nbconvert import HTMLExporter

    with tempfile.TemporaryDirectory() as place:
        executed = Path(place) / "08_tables.ipynb"
        _execute("08_tables", {"profile": folder.name, "results_dir": str(folder.parent), "run": run}, executed)
        page, _ = HTMLExporter(exclude_input=True, embed_images=True).from_filename(str(executed))
    with files.atomic_path(out) as part:
        part.write_text(page, encoding="utf-8")
    return out
