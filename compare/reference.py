"""What a quantised model must answer: the first stage's tokens on the same weights, written out.

Its tokens are not those of the unquantised model, so no other stage's can be asked for. But the
first stage runs a checkpoint with the same weights at 16 or 32 bits, and there it must agree.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeGuard

from folovllm.workloads.options import WorkloadOptions

from .agreement import is_quantized, needs_reference, setting_failures, workload_failures
from .processes import log_tail, run_process
from .results import Result, read_json
from .runner import FailedRun, FinishedRun, Outcome, RunSettings, bench_command, stage_command
from .stages import Stage

BASELINE = "m1_baseline"
"""The stage that answers for all quantised ones."""
DEQUANTIZER = "m7_gptq"
"""The stage whose `dequantize` writes the weights out."""
_NUM_GATE_REQUESTS = "8"
"""What `bench` has for --gate-requests."""
_COUNT_OPTIONS = {
    "azure": "num",
    "mooncake": "num",
    "sharegpt": "num",
    "multi-turn": "conversations",
}
"""What cuts a workload that is read from a file."""


class _Failure(Exception):
    """Why there is no reference; the second argument is the end of what was printed."""


def add_references(
    outcomes: Sequence[Outcome],
    settings: RunSettings,
    stages: Mapping[str, Stage],
    report: Callable[[str], None] = print,
) -> list[Outcome]:
    """The outcomes, with the reference as `gate.reference` in every run that needs one.

    `stages` are all that there are, also those that did not run. Where there is no reference, the
    runs were not gated: each becomes a failed run that says why.
    """
    first = next((run.result for run in outcomes if _is_wanting(run)), None)
    if first is None:
        return list(outcomes)
    report(f"reference for {first['stage']}: {BASELINE} on the dequantised checkpoint")
    try:
        reference = _make_reference(first, settings, stages)
    except _Failure as failure:
        reason, tail = failure.args
        report(f"FAILED, {reason}\n{tail}")
        return [_without_gate(outcome, reason, tail) for outcome in outcomes]
    return [_with_reference(outcome, reference) for outcome in outcomes]


def _is_wanting(outcome: Outcome) -> TypeGuard[FinishedRun]:
    return isinstance(outcome, FinishedRun) and needs_reference(outcome.result)


def _with_reference(outcome: Outcome, reference: Mapping[str, object]) -> Outcome:
    if not _is_wanting(outcome):
        return outcome
    gate = {**outcome.result["gate"], "reference": reference}
    return replace(outcome, result={**outcome.result, "gate": gate})


def _without_gate(outcome: Outcome, reason: str, tail: str) -> Outcome:
    if not _is_wanting(outcome):
        return outcome
    return FailedRun(
        stage=outcome.stage,
        repeat=outcome.repeat,
        reason=f"it could not be gated: {reason}",
        stderr_tail=tail,
        exit_status=None,
    )


def _make_reference(
    quantized: Result, settings: RunSettings, stages: Mapping[str, Stage]
) -> dict[str, object]:
    """Dequantise, let the first stage answer, and forget the weights again."""
    missing = [name for name in (BASELINE, DEQUANTIZER) if name not in stages]
    if missing:
        raise _Failure(f"there is no stage {' and no '.join(missing)} under {settings.root}", "")
    dtype = str(quantized["model"]["dtype"])
    folder = settings.runs_folder.absolute() / "dequantized"
    output = folder.with_name("reference.json")
    try:
        options = {"output": str(folder), "dtype": dtype}
        if "model" in settings.common:  # else the stage's own default
            options["model"] = settings.common["model"]
        _run(stage_command(stages[DEQUANTIZER], "dequantize", options), settings)
        baseline = reference_settings(quantized["stage"], stages[BASELINE], settings)
        common = {**baseline.common, "model": str(folder), "dtype": dtype}
        baseline = replace(baseline, common=common)
        _run(bench_command(stages[BASELINE], baseline, output), settings)
        result = read_json(output)
    except ValueError as error:
        raise _Failure(str(error), "") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # as large as the model
    who = f"{BASELINE} on the dequantised checkpoint"
    if is_quantized(result):
        raise _Failure(f"{who} says that its model is quantised", "")
    failures = setting_failures(who, result, quantized["stage"], quantized)
    failures += workload_failures(who, result, quantized["stage"], quantized)
    if failures:
        raise _Failure("; ".join(failures), "")
    return {"stage": BASELINE, **result["gate"]}


def reference_settings(stage_name: str, baseline: Stage, settings: RunSettings) -> RunSettings:
    """What the first stage gets: the limits of the quantised one, and as little to time as can be.

    The gate's requests are the first of the whole workload, however little of it is timed.
    """
    own = settings.stage_engine.get(stage_name, {})
    num_requests = settings.common.get("gate_requests", _NUM_GATE_REQUESTS)
    return replace(
        settings,
        workload=first_request_of(settings.workload, num_requests),
        stage_workloads={},
        stage_engine={baseline.name: {name: own[name] for name in own if name in baseline.options}},
        runs_per_process=1,
    )


def first_request_of(spec: str, num_gate_requests: str) -> str:
    """The spec of a workload's first request: `fixed:batch=8` -> `fixed:1,batch=8`.

    One from a file is read only as far as it is wanted, so there it is as many as the gate asks.
    """
    options = WorkloadOptions.parse(spec)
    given, positional = dict(options.given), "1"
    if options.positional and not options.positional.isdecimal():
        name, positional = _COUNT_OPTIONS.get(options.kind, "num"), options.positional
        given[name] = min(given.get(name, num_gate_requests), num_gate_requests, key=int)
    pairs = [f"{name}={value}" for name, value in given.items()]
    return f"{options.kind}:{','.join([positional, *pairs])}"


def _run(command: Sequence[str], settings: RunSettings) -> None:
    """_Failure if it does not end well."""
    log_file = settings.runs_folder.absolute() / "reference.stderr.txt"
    ended = run_process(command, settings.root, settings.timeout_s, log_file)
    if ended.failure is not None:
        told = " ".join(command[1:4])
        raise _Failure(f"`python {told}`: {ended.failure}", log_tail(log_file))
