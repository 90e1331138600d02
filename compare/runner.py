"""Run each stage's own benchmark in a fresh process, in turns, and collect the JSON files."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .processes import log_tail, run_process
from .results import Result, lookup, read_json
from .stages import Stage

EXIT_NOT_INSTALLED = 3
"""A peer ends with this when its engine cannot be imported."""
EXIT_REFUSED = 2
"""A stage ends with this when it cannot do what was asked for; asking again changes nothing."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every stage of one comparison gets; values are text, as on a command line."""

    workload: str
    common: Mapping[str, str]
    """Options that every `bench` command has: model, load_format, dtype, device, seed."""
    engine: Mapping[str, str]
    """Options of engine configurations; a stage gets those that its EngineConfig has."""
    stage_workloads: Mapping[str, str]
    stage_engine: Mapping[str, Mapping[str, str]]
    """Options of single engines by stage, in the place of those in `engine`."""
    timeout_s: float
    root: Path
    """Folder of the stages; the processes run in it."""
    runs_folder: Path
    """Where the JSON and the standard error of every run go."""
    runs_per_process: int = 1
    """Measured runs of a stage in one process; a peer's process always measures one."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    stage: str
    repeat: int
    result: Result


@dataclass(frozen=True, kw_only=True)
class FailedRun:
    stage: str
    repeat: int
    reason: str
    stderr_tail: str
    exit_status: int | None
    """None where the run took too long."""


@dataclass(frozen=True, kw_only=True)
class SkippedStage:
    """A stage that this machine cannot run, which is not a failure."""

    stage: str
    reason: str


Outcome = FinishedRun | FailedRun | SkippedStage


def plan_runs(stages: Sequence[Stage], repeats: int) -> list[tuple[Stage, int]]:
    """Turns (stage, repeat): all stages once, then all again in reverse, and so on.

    Taking turns spreads what changes over time (heat, other users) over all stages alike, and
    turning round keeps one stage from always running after the same one.
    """
    turns = []
    for repeat in range(repeats):
        order = stages if repeat % 2 == 0 else list(reversed(stages))
        turns += [(stage, repeat) for stage in order]
    return turns


def bench_command(stage: Stage, settings: RunSettings, output: Path) -> list[str]:
    """The command line of one run of one stage."""
    workload = settings.stage_workloads.get(stage.name, settings.workload)
    options = {**settings.common, "workload": workload, "output": str(output)}
    options |= {name: value for name, value in settings.engine.items() if name in stage.options}
    options |= settings.stage_engine.get(stage.name, {})
    if settings.runs_per_process > 1 and not stage.is_peer:
        options["runs"] = str(settings.runs_per_process)
    return stage_command(stage, "bench", options)


def stage_command(stage: Stage, name_of_command: str, options: Mapping[str, str]) -> list[str]:
    """`python -m m2_batching bench --seed 0 …`."""
    command = [sys.executable, "-m", stage.module, name_of_command]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if name in stage.switches:
            command.append(f"--{flag}" if value == "true" else f"--no-{flag}")
        else:
            command += [f"--{flag}", value]
    return command


def run_stages(
    stages: Sequence[Stage],
    repeats: int,
    settings: RunSettings,
    report: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run every stage `repeats` times; a failed run is an outcome and stops no other stage.

    A stage that refuses what it is asked for is asked once.
    """
    outcomes: list[Outcome] = []
    skipped: set[str] = set()
    turns = plan_runs(stages, repeats)
    for number, (stage, repeat) in enumerate(turns, start=1):
        if stage.name in skipped:
            continue
        told = f"[{number}/{len(turns)}] {stage.name}, repeat {repeat + 1}: "
        for outcome in run_once(stage, repeat, settings):
            outcomes.append(outcome)
            if isinstance(outcome, FinishedRun):
                rate = lookup(outcome.result, "output_tokens_per_s") or 0.0
                duration = lookup(outcome.result, "duration_s") or 0.0
                report(f"{told}{rate:,.1f} output tokens/s in {duration:.1f} s")
            elif isinstance(outcome, SkippedStage):
                skipped.add(stage.name)
                report(f"{told}skipped, {outcome.reason}")
            else:
                report(f"{told}FAILED, {outcome.reason}\n{outcome.stderr_tail}")
                if outcome.exit_status == EXIT_REFUSED:
                    skipped.add(stage.name)
    return outcomes


def run_once(stage: Stage, repeat: int, settings: RunSettings) -> list[Outcome]:
    """The runs of one process."""
    settings.runs_folder.mkdir(parents=True, exist_ok=True)
    output = settings.runs_folder.absolute() / f"{stage.name}.{repeat + 1}.json"
    log_file = output.with_suffix(".stderr.txt")
    command = bench_command(stage, settings, output)
    ended = run_process(command, settings.root, settings.timeout_s, log_file)
    tail, reason = log_tail(log_file), ended.failure
    if ended.status == EXIT_NOT_INSTALLED and stage.is_peer:
        return [SkippedStage(stage=stage.name, reason=tail.strip().rpartition("\n")[2])]
    if reason is None:
        try:
            return [
                FinishedRun(stage=stage.name, repeat=repeat, result=read_json(file))
                for file in _run_files(stage, settings, output)
            ]
        except ValueError as error:
            reason = str(error)
    failed = FailedRun(
        stage=stage.name, repeat=repeat, reason=reason, stderr_tail=tail, exit_status=ended.status
    )
    return [failed]


def _run_files(stage: Stage, settings: RunSettings, output: Path) -> list[Path]:
    """What `bench --runs` writes: FILE.json, FILE.run2.json, …"""
    num_runs = 1 if stage.is_peer else settings.runs_per_process
    further = [output.with_suffix(f".run{run}.json") for run in range(2, num_runs + 1)]
    return [output, *further]


def new_runs_folder(results: Path) -> Path:
    """A folder for the raw runs of one comparison, which git is told to ignore."""
    folder = results / ".runs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    return folder / time.strftime("%Y%m%d-%H%M%S")
