"""Where result files lie, and how they are read and written."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from folovllm.workloads.options import WorkloadOptions

from .stages import ladder_order

Result = dict[str, Any]
"""One benchmark JSON: a run of a stage, or several runs merged."""


def workload_slug(spec: str) -> str:
    """A folder name for a workload: `fixed:batch=8,input=512` -> `fixed-batch-8-input-512`.

    Of a trace workload (`azure:some/where/trace.csv`) only the file name is kept.
    """
    options = WorkloadOptions.parse(spec)
    rest = spec.partition(":")[2].removeprefix(options.positional)
    file_name = options.positional.rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._]+", "-", f"{options.kind}-{file_name}{rest}").strip("-")


def lookup(result: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path (`ttft_s.p50`), or None where any part is missing."""
    value: Any = result
    for key in path.split("."):
        if not isinstance(value, Mapping) or value.get(key) is None:
            return None
        value = value[key]
    return value


def model_label(name: str) -> str:
    """The last part of a path or Hub id: `models/SmolLM2-135M-Instruct` is known by its end."""
    return name.rstrip("/").rsplit("/", 1)[-1]


def read_json(file: Path) -> Result:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not a readable benchmark JSON: {error}") from error
    if not isinstance(value, dict) or "stage" not in value:
        raise ValueError(f"{file} holds no benchmark result (an object with a key 'stage')")
    return value


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    write_text(file, json.dumps(value, separators=(",", ":")) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write beside the target and rename, so that a reader never sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def load_folder(folder: Path) -> list[Result]:
    """Every published stage of one device and workload, in ladder order."""
    results = [read_json(file) for file in sorted(folder.glob("*.json"))]
    return sorted(results, key=lambda result: ladder_order(result["stage"]))


def result_folders(results: Path, only: Iterable[str] | None = None) -> list[Path]:
    """Folders `<results>/<device>/<workload>` that hold results; `only` names `device/workload`.

    Raises ValueError if a folder asked for holds none.
    """
    folders = sorted({file.parent for file in results.glob("[!.]*/[!.]*/*.json")})
    if only is None:
        return folders
    by_key = {folder_key(folder): folder for folder in folders}
    missing = [key for key in only if key not in by_key]
    if missing:
        there = ", ".join(by_key) or "none"
        raise ValueError(f"no results for {', '.join(missing)} under {results}; there are: {there}")
    return [by_key[key] for key in only]


def folder_key(folder: Path) -> str:
    """`device/workload`, as markers in documents name it."""
    return f"{folder.parent.name}/{folder.name}"
