"""Store what is measured of the whole table: rows of one card and one commit, no others."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from .origin import one_origin, origin_of
from .publish import may_stay_beside
from .results import Result
from .run import EXIT_INCOMPLETE
from .session import publish_runs, read_runs
from .whole_table import Job


def publish_table(to: Path, results: Path, jobs: Sequence[Job], commit: str | None) -> int:
    """Gate, merge, store and draw what lies under `to`; say which rows of the jobs are missing.

    Rows that are stored already stay where they are of this card and commit too. ValueError, and
    nothing is stored, if the runs are of several. Returns the exit status.
    """
    runs = read_runs(to, commit)
    one_origin(
        (f"{engine} in {to / folder}", origin_of(run))
        for folder, by_engine in runs.items()
        for engine, engine_runs in by_engine.items()
        for run in engine_runs
    )
    status = publish_runs(runs, results, may_stay_in_table)
    missing = _missing_rows(runs, jobs)
    for folder, engines in missing.items():
        print(f"missing in {folder}: {', '.join(engines)}")
    return status or (EXIT_INCOMPLETE if missing else 0)


def may_stay_in_table(earlier: Result, new: Sequence[Result]) -> bool:
    """Whether an earlier result is of the same card and commit, and passes the gate."""
    try:
        one_origin((result["stage"], origin_of(result)) for result in (earlier, *new))
    except ValueError:
        return False
    return may_stay_beside(earlier, new)


def _missing_rows(
    runs: Mapping[str, Mapping[str, Sequence[Result]]], jobs: Sequence[Job]
) -> dict[str, list[str]]:
    """Engines by folder."""
    missing: dict[str, list[str]] = {}
    for job in jobs:
        for folder in job.workloads:
            if len(runs.get(folder, {}).get(job.engine, ())) < job.runs:
                missing.setdefault(folder, []).append(job.engine)
    return missing
