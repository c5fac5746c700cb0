"""Profiles: the parameter files under ``params/<profile>/``, and what papermill injects, checked against the schemas."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fmbseg import files
from fmbseg.errors import ParameterError
from fmbseg.params import RunParams, make
from fmbseg.schemas import NOTEBOOKS


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


def schema_of(notebook: str) -> type[RunParams]:
    """A notebook's schema. Raises ParameterError naming the known notebooks."""
    if notebook not in NOTEBOOKS:
        raise ParameterError(f"notebook {notebook!r}: unknown; known are {', '.join(NOTEBOOKS)}")
    return NOTEBOOKS[notebook]


def load(notebook: str, profile: str, overrides: Mapping[str, Any] | None = None) -> RunParams:
    """A notebook's parameters: schema defaults, the profile's shared.yaml, its file for this notebook, then overrides.

    shared.yaml may hold keys of any step; a notebook takes those of its own schema.
    """
    schema, folder = schema_of(notebook), files.project_root() / "params" / profile
    if not profile.isidentifier() or not folder.is_dir():
        known = sorted(p.name for p in folder.parent.iterdir() if p.is_dir())
        raise ParameterError(f"profile {profile!r}: no such folder of params/; known are {', '.join(known)}")
    shared = read_yaml(folder / "shared.yaml") if (folder / "shared.yaml").is_file() else {}
    everywhere = {name for known in NOTEBOOKS.values() for name in known.model_fields}
    for key in shared.keys() - everywhere:
        raise ParameterError(f"{folder / 'shared.yaml'}: unknown parameter {key!r}; no notebook has it")
    own = read_yaml(folder / f"{notebook}.yaml") if (folder / f"{notebook}.yaml").is_file() else {}
    make(schema, own, str(folder / f"{notebook}.yaml"))
    values = {k: v for k, v in shared.items() if k in schema.model_fields} | own | {"profile": profile} | dict(overrides or {})
    return make(schema, values, f"{notebook} ({profile})")


def of_notebook(notebook: str, namespace: Mapping[str, Any]) -> RunParams:
    """The parameters of the notebook that calls this with its ``globals()``.

    Its own ``parameters`` cell names the profile. Whatever papermill injected (its cell starts with
    "# Parameters") overrides the profile's files; unknown names are refused here, where papermill only warns.
    """
    injected: dict[str, Any] = {}
    for source in namespace.get("In", []):
        if source.startswith("# Parameters"):
            for node in ast.parse(source).body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    injected[node.targets[0].id] = namespace[node.targets[0].id]
    return load(notebook, injected.pop("profile", namespace.get("profile", "embedded")), injected)
