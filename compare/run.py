"""`compare run`: from the command line's options to runs, gate and published results."""

import argparse
import sys
from collections.abc import Sequence

from .gate import check_gate
from .profiles import Profile, choose_profile
from .publish import print_charts, print_gate, print_pages, print_tables, store_runs
from .reference import add_references
from .results import Result, workload_slug
from .runner import FailedRun, FinishedRun, Outcome, RunSettings, new_runs_folder, run_stages
from .stages import Stage, discover_stages, select_stages

EXIT_REFUSED = 1
"""The gate failed, or nothing finished: no table, no charts."""
EXIT_INCOMPLETE = 4
"""Published, but some run failed."""


def run(options: argparse.Namespace, extra: Sequence[str]) -> int:
    """`compare run`."""
    outcomes, settings = measure(options, extra)
    return publish_outcomes(outcomes, settings, options)


def measure(options: argparse.Namespace, extra: Sequence[str]) -> tuple[list[Outcome], RunSettings]:
    """Run the stages that the options name, in turns; what came out, and what each was given."""
    profile = choose_profile(options.profile, options.device)
    repeats = profile.repeats if options.repeats is None else options.repeats
    if repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {repeats}")
    if options.runs_per_process < 1:
        raise ValueError(f"--runs-per-process must be at least 1, got {options.runs_per_process}")
    names = options.stages.split(",") if options.stages else None
    found = discover_stages(options.root)
    stages = select_stages(found, names)
    if not stages:
        raise ValueError(f"no stage folder (m1_… to m7_…) under {options.root.absolute()}")
    settings = _settings(options, extra, profile, stages)
    print(
        f"{len(stages)} stages, {repeats} repeats in turns, workload {settings.workload}; "
        f"raw runs in {settings.runs_folder}",
        flush=True,
    )
    outcomes = run_stages(stages, repeats, settings, report=_say)
    return add_references(outcomes, settings, found, report=_say), settings


def _say(text: str) -> None:
    print(text, flush=True)


def _settings(
    options: argparse.Namespace, extra: Sequence[str], profile: Profile, stages: Sequence[Stage]
) -> RunSettings:
    common = {
        "model": options.model or profile.model,
        # a profile's load format belongs to its model
        "load_format": options.load_format or ("auto" if options.model else profile.load_format),
        "dtype": options.dtype or profile.dtype,
        "device": options.device,
        "seed": str(options.seed),
        **profile.bench_options,
    }
    if options.stage_workload or options.workload:
        stage_workloads = _stage_workloads(options.stage_workload, stages)
    else:
        stage_workloads = dict(profile.stage_workloads)
    known = set().union(*(stage.options for stage in stages))
    engine = {} if options.workload else dict(profile.engine_options)
    engine = {name: value for name, value in engine.items() if name in known}
    return RunSettings(
        workload=options.workload or profile.workload,
        common={name: value for name, value in common.items() if value is not None},
        engine={**engine, **_engine_options(extra, stages)},
        stage_workloads=stage_workloads,
        stage_engine=_stage_engine(options.stage_option, stages),
        timeout_s=options.timeout,
        root=options.root.absolute(),
        runs_folder=new_runs_folder(options.results),
        runs_per_process=options.runs_per_process,
    )


def _stage_workloads(pairs: Sequence[str], stages: Sequence[Stage]) -> dict[str, str]:
    """`["m1_baseline=nano:8"]` -> `{"m1_baseline": "nano:8"}`."""
    chosen = {}
    for pair in pairs:
        name, equals, spec = pair.partition("=")
        if not equals or not spec or name not in {stage.name for stage in stages}:
            raise ValueError(
                f"--stage-workload takes STAGE=SPEC with one of the stages that run "
                f"({', '.join(stage.name for stage in stages)}), got {pair!r}"
            )
        chosen[name] = spec
    return chosen


def _stage_engine(texts: Sequence[str], stages: Sequence[Stage]) -> dict[str, dict[str, str]]:
    """`["m4_flash.max_num_seqs=8"]` -> `{"m4_flash": {"max_num_seqs": "8"}}`; the last counts."""
    known = {stage.name: stage.options for stage in stages}
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        place, equals, value = text.partition("=")
        name, _, option = place.partition(".")
        option = option.replace("-", "_")
        if not equals or not value or option not in known.get(name, ()):
            raise ValueError(
                f"--stage-option takes STAGE.OPTION=VALUE with a stage that runs "
                f"({', '.join(known)}) and an option of its EngineConfig, got {text!r}"
            )
        found.setdefault(name, {})[option] = value
    return found


def _engine_options(extra: Sequence[str], stages: Sequence[Stage]) -> dict[str, str]:
    """`["--max-num-seqs", "64"]` -> `{"max_num_seqs": "64"}`; some stage must know each.

    A switch, `--enforce-eager` or `--no-enforce-eager`, is "true" or "false".
    """
    known = sorted(set().union(*(stage.options for stage in stages)))
    switches = set().union(*(stage.switches for stage in stages))
    found = {}
    words = [part for word in extra for part in (word.split("=", 1) if "=" in word else [word])]
    while words:
        name = words.pop(0)
        option = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--"):
            option = ""
        if option in switches or option.removeprefix("no_") in switches:
            found[option.removeprefix("no_")] = "true" if option in switches else "false"
        elif option in known and words:
            found[option] = words.pop(0)
        else:
            raise ValueError(
                f"{name!r} is no option of `compare run` and none of the stages' engines has it, "
                f"or it has no value; engine options here: {', '.join(known) or 'none'}"
            )
    return found


def publish_outcomes(
    outcomes: Sequence[Outcome], settings: RunSettings, options: argparse.Namespace
) -> int:
    """Gate the finished runs; publish them or say why not."""
    runs = finished_runs(outcomes, options.commit)
    gate = check_gate(runs)
    print_gate(gate)
    if not gate.passed:
        print(f"No table and no charts; the runs are in {settings.runs_folder}", file=sys.stderr)
        return EXIT_REFUSED
    device = next(iter(runs.values()))[0]["device"]
    folder = options.results / device / (options.name or workload_slug(settings.workload))
    published = store_runs(runs, folder)
    for file in published.set_aside:
        print(f"moved away, not comparable with these runs: {file}")
    print_tables([folder], options.root)
    print_charts([folder])
    print_pages([folder], options.root)
    failed = [outcome for outcome in outcomes if isinstance(outcome, FailedRun)]
    for outcome in failed:
        print(f"FAILED: {outcome.stage}, repeat {outcome.repeat + 1}: {outcome.reason}")
    return EXIT_INCOMPLETE if failed else 0


def finished_runs(outcomes: Sequence[Outcome], commit: str | None) -> dict[str, list[Result]]:
    """Results by stage; `commit`, where one is stated, stands in them instead of the one found."""
    runs: dict[str, list[Result]] = {}
    for outcome in outcomes:
        if isinstance(outcome, FinishedRun):
            runs.setdefault(outcome.stage, []).append(with_commit(outcome.result, commit))
    return runs


def with_commit(result: Result, commit: str | None) -> Result:
    """Put the commit that the user states in the place of what the run found.

    A copy of the files on another machine finds none, or that of a history which it is not in.
    """
    if commit is None:
        return result
    stated = {"commit": commit, "dirty": False, "commit_stated": True}
    return {**result, "environment": {**result["environment"], **stated}}
