"""Parameters of a step: its schema's defaults, the files under ``params/<profile>/``, and what is typed or injected on top."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fmbseg import files
from fmbseg.errors import ParameterError
from fmbseg.params import RunParams, check_device, make, with_protocol
from fmbseg.schemas import NOTEBOOKS, STEPS


def params_folder() -> Path:
    """The folder of all profiles: ``params/`` of the clone around the working folder, else that of this installation."""
    return _folder("params", "profile_files")


def published_folder() -> Path:
    """The folder of the published numbers: ``results/published/`` of that clone, else that of this installation."""
    return _folder("results/published", "published")


def _folder(in_clone: str, in_package: str) -> Path:
    package = Path(__file__).resolve().parent
    clone = files.checkout()
    folders = [*([clone / in_clone] if clone else []), package / in_package, package.parent / in_clone]  # the last: editable install
    return next((folder for folder in folders if folder.is_dir()), folders[-1])


def read_yaml(path: Path) -> dict[str, Any]:
    """A parameter file as a dictionary. Raises ParameterError when it is missing or not a mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        values = {} if values is None else values
    except FileNotFoundError as error:
        raise ParameterError(f"{path}: no such parameter file") from error
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ParameterError(f"{path}: holds a {type(values).__name__}; a parameter file is lines of  name: value")
    return values


def step_of(notebook: str) -> str:
    """The step that a notebook does. Raises ParameterError naming the known notebooks."""
    if notebook not in NOTEBOOKS:
        raise ParameterError(f"notebook {notebook!r}: unknown; known are {', '.join(NOTEBOOKS)}")
    return NOTEBOOKS[notebook]


def load(step: str, profile: str, overrides: Mapping[str, Any] | None = None) -> RunParams:
    """A step's parameters: schema defaults, the profile's shared.yaml, its file for this step, then overrides.

    shared.yaml may hold keys of any step; a step takes those of its own schema. With ``extends: PROFILE`` in it, the files
    of another profile come first. Raises ParameterError for an unknown step, profile, file or key and for a value that the
    schema does not accept.
    """
    if step not in STEPS:
        raise ParameterError(f"step {step!r}: unknown; known are {', '.join(STEPS)}")
    schema, notebook, folder = STEPS[step].schema, STEPS[step].notebook, params_folder()
    known = sorted(p.name for p in folder.glob("*") if p.is_dir())
    if profile not in known:
        raise ParameterError(f"profile {profile!r}: no such folder of {folder}; known are {', '.join(known)}")
    folder = folder / profile
    for path in folder.glob("*.yaml"):
        if path.stem not in {"shared", *(s.notebook for s in STEPS.values())}:
            names = ", ".join(s.notebook for s in STEPS.values() if s.notebook)
            raise ParameterError(f"{path}: no step reads it; a profile holds shared.yaml and files named {names}")
    everywhere = {name for one in STEPS.values() for name in one.schema.model_fields}
    shared = read_yaml(folder / "shared.yaml") if (folder / "shared.yaml").is_file() else {}
    if parent := shared.pop("extends", None):
        if parent not in known or parent == profile:
            raise ParameterError(f"{folder / 'shared.yaml'}: extends = {parent!r}: no such other profile; known are {', '.join(known)}")
        shared = read_yaml(folder.parent / parent / "shared.yaml") | with_protocol(shared, everywhere)
    for key in shared.keys() - everywhere:
        raise ParameterError(f"{folder / 'shared.yaml'}: unknown parameter {key!r}; no step has it")
    own_file = folder / f"{notebook}.yaml"
    if parent and not own_file.is_file():
        own_file = folder.parent / parent / f"{notebook}.yaml"
    own = read_yaml(own_file) if own_file.is_file() else {}
    make(schema, own, str(own_file))
    values: dict[str, Any] = {}
    for layer in ({k: v for k, v in shared.items() if k in schema.model_fields}, own, {"profile": profile}, overrides or {}):
        values |= with_protocol(layer, schema.model_fields)  # a protocol overrides earlier layers, not the values of its own
    return make(schema, values, f"{step} ({profile})")


# ---------------------------------------------------------------- what is typed in a notebook


def of_notebook(notebook: str, namespace: Mapping[str, Any]) -> RunParams:
    """The parameters of the notebook that calls this with its ``globals()``.

    Every assignment counts from the parameters cell (the last cell run that assigns ``profile``) up to the first cell that
    calls this, whether it was typed or injected by papermill (a cell that begins with "# Parameters"). Names that begin
    with "_" are ignored, and so are the variables of later cells, however often and in whatever order cells are run.
    Raises ParameterError for an unknown name, a value that the schema does not accept, and a device that is not here.
    """
    step = step_of(notebook)
    fields = STEPS[step].schema.model_fields
    if "In" in namespace:
        typed = _typed(namespace["In"], namespace, fields)
    else:  # run as a plain script, with no history of cells
        typed = {name: namespace[name] for name in fields if name in namespace}
    params = load(step, typed.pop("profile", "embedded"), typed)
    check_device(params.device)
    return params


@dataclass(frozen=True)
class _Cell:
    """A cell that was run.

    assigned: names assigned at its top level before it calls ``of_notebook``, with the expression where it is a plain
    name = expression; calls: whether it calls ``of_notebook``.
    """

    source: str
    assigned: Mapping[str, ast.expr | None]
    calls: bool

    @property
    def injected(self) -> bool:
        return self.source.startswith("# Parameters")

    @property
    def parameters(self) -> bool:
        return self.injected or "profile" in self.assigned


def _read_cell(source: str) -> _Cell:
    try:
        body = ast.parse(source).body
    except SyntaxError:  # it was not run
        body = []
    assigned: dict[str, ast.expr | None] = {}
    for statement in body:
        if any(isinstance(node, ast.Call) and ast.unparse(node.func).endswith("of_notebook") for node in ast.walk(statement)):
            return _Cell(source, assigned, True)
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                for node in ast.walk(target):
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                        plain = node is target and not isinstance(statement, ast.AugAssign)
                        assigned[node.id] = statement.value if plain else None
    return _Cell(source, assigned, False)


def _parameter_cells(sources: Iterable[str]) -> list[_Cell]:
    """The parameters cell, and the cells run after it up to the first that calls ``of_notebook``.

    An injected cell replaces an earlier injected one. A cell that was also run after such a call is an ordinary cell.
    """
    found: list[_Cell] = []
    ordinary, counting = set(), False
    for cell in map(_read_cell, sources):
        if cell.injected:
            found, counting = [*(c for c in found if not c.injected), cell], True
        elif "profile" in cell.assigned:
            found, counting = [cell], True
        elif counting and not cell.calls:
            found.append(cell)
        elif found and not cell.calls:
            ordinary.add(cell.source)
        counting = counting and not cell.calls
    return [cell for cell in found if cell.parameters or cell.source not in ordinary]


def _typed(sources: Iterable[str], namespace: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> value of every assignment that counts. A literal is read from its cell: a later cell may reuse the name."""
    values = {}
    for cell in _parameter_cells(sources):
        for name, expression in cell.assigned.items():
            if name.startswith("_") or name not in namespace:  # private, or never reached
                continue
            try:
                values[name] = ast.literal_eval(expression)
            except (ValueError, TypeError):
                if cell.parameters or name in fields:
                    values[name] = namespace[name]
    return values
