"""Reads stages.toml: what each stage declares to change in the stage before it."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = Path("m0_infra", "stages.toml")
"""Relative to the root of a checkout."""
_STAGE_FOLDER = re.compile(r"m[1-9][0-9]*_[a-z0-9_]+")
_NOT_COMPARED = ("README.md", "pyproject.toml", "tests", "build", "__pycache__")
_KEYS = {"previous", "changed", "added", "removed", "max_code_lines", "show"}
_SHOW_TYPES: dict[str, type[Any]] = {
    "workload": str,
    "metrics": list,
    "chart": str,
    "options": dict,
}


class StageError(Exception):
    """A stage or its declaration cannot be used; the message says why and what to change."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One declaration; files are paths relative to the stage's folder, with forward slashes."""

    name: str
    max_code_lines: int
    previous: str | None = None
    """None for the first stage, which has nothing to differ from."""
    changed: frozenset[str] = frozenset()
    added: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()
    has_show: bool = False
    """It says on which workload its idea shows; `compare show` runs that."""


def load_stages(root: Path) -> dict[str, Stage]:
    """Declarations by name, in the order of the ladder. StageError if the file is wrong."""
    path = root / MANIFEST
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path} is not there; run this in the root of a checkout") from None
    except tomllib.TOMLDecodeError as error:
        raise StageError(f"{path} is not TOML: {error}") from error
    stages: dict[str, Stage] = {}
    for name, table in tables.items():
        stage = _stage(path, name, table)
        if stage.previous is not None and stage.previous not in stages:
            raise StageError(
                f"{path}: {name} has previous = {stage.previous!r}, which is not declared above it"
            )
        stages[name] = stage
    return stages


def find_stage(stages: dict[str, Stage], name: str) -> Stage:
    """The stage called `name`, or by its short form: "m2" for "m2_batching"."""
    found = [stage for key, stage in stages.items() if name in (key, key.partition("_")[0])]
    if len(found) != 1:
        raise StageError(f"no stage is called {name!r}; the stages are: {', '.join(stages)}")
    return found[0]


def stage_folders(root: Path) -> list[str]:
    """Names of the folders that are stages, whether they are declared or not."""
    return sorted(path.name for path in root.glob("m*_*") if is_stage_name(path.name))


def is_stage_name(name: str) -> bool:
    return _STAGE_FOLDER.fullmatch(name) is not None


def stage_files(folder: Path) -> dict[str, Path]:
    """The files that readers compare, by path relative to the folder.

    README, tests and packaging are left out: they differ in every stage and teach nothing.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_left_out = any(
            part in _NOT_COMPARED or part.startswith(".") or part.endswith(".egg-info")
            for part in parts
        )
        if path.is_file() and not is_left_out:
            files["/".join(parts)] = path
    return files


def _stage(path: Path, name: str, table: Any) -> Stage:
    if not isinstance(table, dict) or not is_stage_name(name):
        raise StageError(f"{path}: {name!r} must be a table named like a stage: [m2_batching]")
    if unknown := sorted(table.keys() - _KEYS):
        raise StageError(f"{path}: {name} has unknown keys {unknown}; known are {sorted(_KEYS)}")
    budget = table.get("max_code_lines")
    if type(budget) is not int or budget < 1:
        raise StageError(f"{path}: {name} needs max_code_lines, a whole number, got {budget!r}")
    lists = {key: table.get(key, []) for key in ("changed", "added", "removed")}
    for key, value in lists.items():
        if not isinstance(value, list) or not all(isinstance(file, str) for file in value):
            raise StageError(f"{path}: {key} of {name} must be a list of files, got {value!r}")
    previous = table.get("previous")
    if previous is None and any(lists.values()):
        raise StageError(f"{path}: {name} lists changes but names no previous stage")
    _check_show(path, name, table)
    sets = {key: frozenset(value) for key, value in lists.items()}
    return Stage(
        name=name, max_code_lines=budget, previous=previous, has_show="show" in table, **sets
    )


def _check_show(path: Path, name: str, table: dict[str, Any]) -> None:
    """The form of `show`; which metrics and charts there are is for compare to know."""
    if "show" not in table:
        return
    show = table["show"]
    if table.get("previous") is None:
        raise StageError(f"{path}: {name} has a show but names no previous stage to show it on")
    if not isinstance(show, dict) or not show.keys() <= _SHOW_TYPES.keys():
        raise StageError(
            f"{path}: show of {name} must be a table with {', '.join(_SHOW_TYPES)}, got {show!r}"
        )
    for key, kind in _SHOW_TYPES.items():
        value: Any = show.get(key, {} if key == "options" else None)
        if not isinstance(value, kind) or not (value or key == "options"):
            raise StageError(
                f"{path}: {key} in show of {name} must be a {kind.__name__} that is not empty, "
                f"got {value!r}"
            )
        texts = list(value.values()) if isinstance(value, dict) else list(value)
        if not all(isinstance(text, str) for text in texts):
            raise StageError(f"{path}: {key} in show of {name} must hold strings, got {value!r}")
