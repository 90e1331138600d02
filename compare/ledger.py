"""What is measured of a table so far: a list small enough to go wherever the next call is made.

The runs themselves may stay behind: a GPU machine starts empty, and needs to know only what is
done, and how much KV cache an engine needed for a workload (`--kv-cache-bytes fit`).
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .kv_need import kv_tokens_needed, waited_for_memory
from .origin import Origin, origin_of
from .results import Result, write_text

FILE_NAME = "measured.json"
FAILED = "failed.json"
Place = tuple[str, str]
"""(engine, folder)"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All runs of one engine on one workload."""

    engine: str
    folder: str
    spec: str
    num_runs: int
    max_model_len: int
    fit_kv_tokens: int | None
    """Tokens of KV cache with which all of it runs at once; None if these runs do not show it."""
    origin: Origin | None
    """None where the runs know no commit."""


def measured(folder: str, runs: Sequence[Result]) -> Measured:
    """What the runs of one engine in one folder come to."""
    needs = [None if waited_for_memory(run) else kv_tokens_needed(run) for run in runs]
    known = [need for need in needs if need is not None]
    first = runs[0]
    return Measured(
        engine=first["stage"],
        folder=folder,
        spec=str(first["workload"].get("spec") or first["workload"]["name"]),
        num_runs=len(runs),
        max_model_len=first["engine_config"]["max_model_len"],
        fit_kv_tokens=max(known) if len(known) == len(needs) else None,
        origin=_origin_or_none(first),
    )


def _origin_or_none(run: Result) -> Origin | None:
    try:
        return origin_of(run)
    except ValueError:  # a trial, which nobody will publish in one table with others
        return None


def read_ledger(to: Path) -> list[Measured]:
    """Empty if nothing was measured into `to`; ValueError if the list cannot be read."""
    file = to / FILE_NAME
    if not file.is_file():
        return []
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        return [
            Measured(**{**entry, "origin": entry["origin"] and Origin(**entry["origin"])})
            for entry in entries
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is no list of what was measured: {error!r}") from error


def record(to: Path, new: Measured) -> None:
    """Add to the list under `to`; what it said of that engine and folder is forgotten."""
    place = (new.engine, new.folder)
    entries = [entry for entry in read_ledger(to) if (entry.engine, entry.folder) != place]
    text = ",\n".join(json.dumps(asdict(entry)) for entry in (*entries, new))
    write_text(to / FILE_NAME, f"[\n{text}\n]\n")


def read_failed(to: Path) -> set[Place]:
    """What was tried last without success."""
    file = to / FAILED
    if not file.is_file():
        return set()
    return {(engine, folder) for engine, folder in json.loads(file.read_text(encoding="utf-8"))}


def write_failed(to: Path, places: Collection[Place]) -> None:
    write_text(to / FAILED, json.dumps(sorted(places)) + "\n")


def fit_tokens(to: Path, engine: str, specs: Sequence[str], max_model_len: int) -> int:
    """Tokens of KV cache with which this engine runs the largest of these workloads at once.

    Known from earlier runs under `to` with plenty of memory. ValueError if there is none.
    """
    found = [
        entry.fit_kv_tokens
        for entry in read_ledger(to)
        if entry.engine == engine
        and entry.spec in specs
        and entry.max_model_len == max_model_len
        and entry.fit_kv_tokens is not None
    ]
    if not found:
        raise ValueError(
            f"--kv-cache-bytes fit: how much {engine} needs for {' or '.join(specs)} with "
            f"--max-model-len {max_model_len} is known from a run in which nobody waited for "
            f"memory, and {to / FILE_NAME} lists none; measure that first, with plenty"
        )
    return max(*found, max_model_len)
