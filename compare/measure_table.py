"""Measure the whole table in as many calls as it takes: each does what is missing and fits.

    python -m compare.measure_table --plan
    python -m compare.measure_table --to build/table --limit 540
    python -m compare.measure_table --to build/table --publish

Every call goes through the jobs of `whole_table.py` in their order, leaves out what
TO/measured.json lists, and starts no process whose estimate is longer than what is left of
`--limit`. Files are those of `compare.session measure`, a folder per workload. A machine that
starts empty needs nothing of TO but measured.json, failed.json, and, if it has no stored results
either, durations.json, which `--plan` writes. Runs of another card or commit are refused.
Exit status 0 if nothing is missing any more, 4 otherwise: call it again.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .calls import Caller, in_turn, missing_jobs, places, places_of, without
from .estimate import StoredDurations, job_seconds, run_seconds, start_seconds
from .ledger import read_failed, read_ledger, write_failed
from .origin import one_origin, this_origin
from .processes import log_tail, run_process
from .publish import RESULTS_FOLDER
from .publish_table import publish_table
from .run import EXIT_INCOMPLETE
from .stages import Stage, discover_stages
from .whole_table import WHOLE_TABLE, Job, Table, select_jobs

EXIT_USAGE = 2
LATE = 1.5
"""A process may take this many times its estimate, and a minute, if the limit leaves as much."""
PACKAGES = {"vllm": "vllm", "hf": "transformers"}
"""What a peer imports."""

Clock = Callable[[], float]


def main(
    argv: Sequence[str] | None = None,
    *,
    table: Table = WHOLE_TABLE,
    clock: Clock = time.monotonic,
) -> int:
    begun = clock()
    options = _parser(table).parse_args(argv)
    try:
        return int(options.action(options, table, clock, begun))
    except (ValueError, OSError) as error:
        print(f"compare.measure_table: {error}", file=sys.stderr)
        return EXIT_USAGE


def _parser(table: Table) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m compare.measure_table", allow_abbrev=False)
    parser.set_defaults(action=measure_table)
    add = parser.add_argument
    add("--to", type=Path, default=Path("build/table"), metavar="FOLDER", help="where the runs are")
    add("--engines", help=f"comma-separated, of {','.join(table.engines)}; default: all")
    add("--folders", help="comma-separated; default: all of the table")
    add("--limit", type=float, default=540.0, help="seconds of a call (default: %(default)s)")
    add("--commit", help="what is measured, if this is a copy without its git history")
    add(
        "--results",
        type=Path,
        default=RESULTS_FOLDER,
        help="stored results: estimates are made of them, and runs published to them "
        "(default: %(default)s)",
    )
    actions = parser.add_mutually_exclusive_group()
    for name, action, text in (
        ("--plan", print_plan, "say what is missing, in which call, how long; run nothing"),
        ("--publish", publish, "gate, merge and store what is measured"),
    ):
        actions.add_argument(name, dest="action", action="store_const", const=action, help=text)
    return parser


def print_plan(options: argparse.Namespace, table: Table, clock: Clock, begun: float) -> int:
    """Calls, their jobs and the seconds of each workload; notes what estimates are made of."""
    caller = _caller(options, table)
    caller.stored.note(options.to)
    entries = read_ledger(options.to)
    jobs = in_turn(missing_jobs(_jobs(options, table), entries), read_failed(options.to))
    calls = caller.plan(jobs, places(entries))
    for number, call in enumerate(calls, start=1):
        seconds = sum(job_seconds(job, caller.stored) for job in call)
        print(f"call {number}: {seconds:.0f} s")
        for job in call:
            parts = ", ".join(
                f"{folder} {run_seconds(job, folder, caller.stored):.0f}"
                for folder in job.workloads
            )
            print(
                f"  {job_seconds(job, caller.stored):4.0f} s  {job.engine}, {job.setting.name}, "
                f"{_runs(job)}: start {start_seconds(job):.0f}, {parts}"
            )
    total = sum(job_seconds(job, caller.stored) for call in calls for job in call)
    print(f"{len(calls)} calls, {total:.0f} s, as estimated")
    return 0


def _runs(job: Job) -> str:
    return f"{job.runs} runs" if job.runs > 1 else "1 run"


def _caller(options: argparse.Namespace, table: Table) -> Caller:
    return Caller(table, StoredDurations.read(options.results, options.to), options.limit)


def _jobs(options: argparse.Namespace, table: Table) -> list[Job]:
    engines = options.engines.split(",") if options.engines else None
    folders = options.folders.split(",") if options.folders else None
    return select_jobs(table, engines, folders)


def measure_table(options: argparse.Namespace, table: Table, clock: Clock, begun: float) -> int:
    """Run what fits into the limit; tell what took how long and what is still missing."""
    caller, stages = _caller(options, table), discover_stages(Path())
    _check_origin(options)
    jobs = _jobs(options, table)
    left = in_turn(_installed(missing_jobs(jobs, read_ledger(options.to))), read_failed(options.to))
    while left:
        left_s = options.limit - (clock() - begun)
        job = caller.next_job(left, left_s, places(read_ledger(options.to)))
        if job is None:
            break
        left = without(left, job)
        estimate_s = job_seconds(job, caller.stored)
        started = clock()
        command = job_command(job, stages[job.engine], table, options)
        failure = run_job(job, command, options.to, min(left_s, LATE * estimate_s + 60))
        _note_failed(job, options.to)
        _say(
            f"{job.engine}, {job.setting.name}: {clock() - started:.0f} s, "
            f"{estimate_s:.0f} estimated; {failure or ', '.join(job.workloads)}"
        )
    still_missing = missing_jobs(jobs, read_ledger(options.to))
    for job in still_missing:
        _say(f"missing: {job.engine}: {', '.join(job.workloads)}")
    return EXIT_INCOMPLETE if still_missing else 0


def _note_failed(job: Job, to: Path) -> None:
    """Remember what of the job was not measured, and forget what was."""
    missing = [places_of(rest) for rest in missing_jobs([job], read_ledger(to))]
    write_failed(to, (read_failed(to) - places_of(job)).union(*missing))


def _check_origin(options: argparse.Namespace) -> None:
    """ValueError if runs of this call could not stand beside those that are there."""
    there = [
        (f"{entry.engine} in {options.to / entry.folder}", entry.origin)
        for entry in read_ledger(options.to)
        if entry.origin is not None
    ]
    one_origin([*there, ("this call", this_origin(options.commit))])


def _installed(jobs: Sequence[Job]) -> list[Job]:
    """The jobs of engines that can be imported here."""
    missing = {
        engine for engine, package in PACKAGES.items() if importlib.util.find_spec(package) is None
    }
    for engine in sorted(missing & {job.engine for job in jobs}):
        _say(f"{engine} is not installed here: left out of this call")
    return [job for job in jobs if job.engine not in missing]


def run_job(job: Job, command: Sequence[str], to: Path, timeout_s: float) -> str | None:
    """One process, whose words go to a log; what went wrong, or None."""
    to.mkdir(parents=True, exist_ok=True)
    log_file = to / f"{job.engine}-{next(iter(job.workloads))}.log"
    ended = run_process(command, Path().absolute(), timeout_s, log_file)
    if ended.failure is None:
        return None
    return f"{ended.failure}\n{log_tail(log_file)}"


def job_command(job: Job, stage: Stage, table: Table, options: argparse.Namespace) -> list[str]:
    """The words of `compare.session measure`."""
    runs = (f"{folder}={spec}" for folder, spec in job.workloads.items())
    return [
        *(sys.executable, "-m", "compare.session", "measure", job.engine),
        *("--to", str(options.to), "--runs", str(job.runs)),
        *(("--commit", options.commit) if options.commit else ()),
        *(word for run in runs for word in ("--run", run)),
        *table.engine_options(stage, job.setting),
    ]


def publish(options: argparse.Namespace, table: Table, clock: Clock, begun: float) -> int:
    """Into the project's results; what is missing is told, and the rest is stored."""
    return publish_table(options.to, options.results, _jobs(options, table), options.commit)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
