"""The correctness gate: engines that disagree are not compared for speed.

Every benchmark run first answers the workload's first requests greedily and keeps the tokens with
the gap between the two likeliest log-probabilities at each position. In float32 the engines must
choose the same tokens. In a 16-bit type two correct engines may differ where the two likeliest
tokens are a rounding error apart, and after such a place their texts are different texts: so the
first difference of each request is looked at, and it is accepted only if both engines saw a gap
within the tolerance there.

The tolerance is two roundings of a logit: logits of trained models lie in [16, 32) at their top,
where neighbouring bfloat16 numbers are 0.125 apart (float16: 0.0156), and each of the two logits
may be off by one neighbour. float16 gets four times that, because there what the layers add up
matters more than the last rounding. Models of random weights have far smaller logits, hence the
second bound: never more than the median gap of the reference, which a wrong engine exceeds at half
of its first differences.

A quantised model gives other tokens than the one it was made from. Each of its runs brings the
tokens that it must give (`gate.reference`, made by `reference.py`) and is compared with these, by
the same rules; its settings are compared with everybody's.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .agreement import has_random_weights, is_quantized, setting_failures, workload_failures
from .results import Result, lookup
from .stages import is_ladder_stage, ladder_order

GAP_TOLERANCE = {"bfloat16": 0.25, "float16": 0.125}
"""Nats between the two likeliest tokens below which a 16-bit difference is accepted."""


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """What the gate found; `failures` empty means that the numbers may be published."""

    failures: tuple[str, ...]
    notes: tuple[str, ...]
    """What was not or could not be checked, and differences within the tolerance."""
    num_tokens_compared: int

    @property
    def passed(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class _Finding:
    failures: list[str]
    notes: list[str]
    num_tokens: int = 0


@dataclass(frozen=True)
class _Base:
    """A run that others are compared with, and the stage that it is of."""

    name: str
    run: Result


def check_gate(runs_by_stage: Mapping[str, Sequence[Result]]) -> GateReport:
    """Compare every run with the first run of the lowest stage, and a stage's runs with each other.

    `runs_by_stage` maps a stage's name to its runs (one merged result is a list of one). Runs of
    quantised models are compared with their own references.
    """
    names = sorted((name for name, runs in runs_by_stage.items() if runs), key=ladder_order)
    if not names:
        return GateReport(failures=("no run finished",), notes=(), num_tokens_compared=0)
    bases: dict[bool, _Base] = {}  # by whether the model is quantised; the lowest stage comes first
    for name in names:
        for run in runs_by_stage[name]:
            bases.setdefault(is_quantized(run), _Base(name, run))
    failures: list[str] = []
    notes: list[str] = []
    num_tokens = 0
    for name in names:
        runs = runs_by_stage[name]
        failures += _repeat_failures(name, runs)
        for repeat, run in enumerate(runs):
            who = f"{name} (repeat {repeat + 1})" if len(runs) > 1 else name
            finding = _check_run(who, run, bases)
            failures += finding.failures
            notes += [note for note in finding.notes if note not in notes]
            num_tokens += finding.num_tokens
    plain = [name for name in names if not all(map(is_quantized, runs_by_stage[name]))]
    if len(plain) == 1:
        notes.append(f"{plain[0]} is alone: nothing to compare its tokens with")
    return GateReport(failures=tuple(failures), notes=tuple(notes), num_tokens_compared=num_tokens)


def _check_run(who: str, run: Result, bases: Mapping[bool, _Base]) -> _Finding:
    """Settings against the lowest stage and the lowest with such a model, then tokens."""
    own = bases[is_quantized(run)]
    failures: dict[str, None] = {}  # in order, each once
    for base in (next(iter(bases.values())), own):
        if base.run is not run:
            failures |= dict.fromkeys(setting_failures(who, run, base.name, base.run))
            failures |= dict.fromkeys(workload_failures(who, run, base.name, base.run))
    if failures:
        return _Finding(list(failures), [])
    reason = lookup(run, "gate.not_comparable") or lookup(own.run, "gate.not_comparable")
    if reason is not None and not (is_ladder_stage(run["stage"]) and is_ladder_stage(own.name)):
        is_told = own.run is not run or is_quantized(run)
        return _Finding([], [f"{run['stage']}: tokens not compared ({reason})"] if is_told else [])
    if is_quantized(run):
        return _compare_with_own_reference(who, run)
    return _Finding([], []) if own.run is run else _compare_tokens(who, run, own.name, own.run)


def _compare_with_own_reference(who: str, run: Result) -> _Finding:
    if has_random_weights(run):
        reason = "random quantised weights, which no other stage can have"
        return _Finding([], [f"{run['stage']}: tokens not compared ({reason})"])
    reference = lookup(run, "gate.reference")
    if reference is None:
        return _Finding(
            [
                f"{who} ran a quantised model and brings no tokens of the first stage on its "
                f"dequantised checkpoint (gate.reference); measure it with `python -m compare "
                f"run`, which makes them"
            ],
            [],
        )
    ref_name = f"{reference.get('stage')} on the dequantised checkpoint"
    return _compare_tokens(who, run, ref_name, {"gate": reference})


def _compare_tokens(who: str, run: Result, ref_name: str, reference: Result) -> _Finding:
    """Compare the gate's tokens of the requests that both runs answered."""
    mine, theirs = lookup(run, "gate.tokens") or [], lookup(reference, "gate.tokens") or []
    dtype = str(lookup(run, "model.dtype"))
    tolerance = gap_tolerance(dtype, lookup(reference, "gate.top2_gaps") or [])
    failures: list[str] = []
    notes: list[str] = []
    num_tokens = 0
    for index, (tokens, expected) in enumerate(zip(mine, theirs, strict=False)):
        position = _first_difference(tokens, expected)
        num_tokens += min(len(tokens), len(expected)) if position is None else position
        if position is None:
            continue
        gaps = [_gap(result, index, position) for result in (run, reference)]
        told = (
            f"{who} and {ref_name} differ at request {index}, output position {position}: token "
            f"{_at(tokens, position)} and {_at(expected, position)}"
        )
        if tolerance == 0.0:
            failures.append(f"{told}; {dtype} must agree token for token")
        elif any(gap is None or gap > tolerance for gap in gaps):
            failures.append(f"{told}; top-2 gaps {gaps} nats, at most {tolerance:.3g} is accepted")
        else:
            notes.append(f"{told}; a near tie (gaps {gaps} nats, {tolerance:.3g} accepted)")
    if not failures and not min(len(mine), len(theirs)):
        failures.append(f"{who} and {ref_name} have no gate tokens in common: nothing was checked")
    if dtype == "float32" and not failures:
        notes += _whole_output_notes(run, ref_name, reference)
    return _Finding(failures, notes, num_tokens)


def gap_tolerance(dtype: str, reference_gaps: Sequence[Sequence[float]]) -> float:
    """Largest top-2 gap, in nats, at which two engines may choose different tokens; 0 = never."""
    limit = GAP_TOLERANCE.get(dtype, 0.0)
    gaps = [gap for row in reference_gaps for gap in row if gap is not None]
    return min(limit, statistics.median(gaps)) if limit and gaps else limit


def _first_difference(tokens: Sequence[int], expected: Sequence[int]) -> int | None:
    """First position at which they differ; a shorter output differs where it ends."""
    for position, (token, other) in enumerate(zip(tokens, expected, strict=False)):
        if token != other:
            return position
    return None if len(tokens) == len(expected) else min(len(tokens), len(expected))


def _at(tokens: Sequence[int], position: int) -> str:
    return str(tokens[position]) if position < len(tokens) else "(ended)"


def _gap(run: Result, index: int, position: int) -> float | None:
    try:
        return float(run["gate"]["top2_gaps"][index][position])
    except (KeyError, IndexError, TypeError):
        return None


def _output_hashes(run: Result) -> dict[str, str]:
    return {
        request["request_id"]: request["output_sha256"]
        for request in run.get("requests", ())
        if request.get("output_sha256")
    }


def _repeat_failures(name: str, runs: Sequence[Result]) -> list[str]:
    """In float32 every repeat of a stage must produce the same outputs."""
    if not runs or lookup(runs[0], "model.dtype") != "float32":
        return []
    first = _output_hashes(runs[0])
    failures = []
    for repeat, run in enumerate(runs[1:], start=2):
        other = _output_hashes(run)
        differing = [key for key in first if other.get(key) != first[key]]
        if differing or len(first) != len(other):
            failures.append(
                f"{name}: repeat {repeat} gave other outputs than repeat 1 for "
                f"{len(differing)} of {len(first)} requests (first: {differing[:1]})"
            )
    return failures


def _whole_output_notes(run: Result, ref_name: str, reference: Result) -> list[str]:
    """Whole timed outputs go beyond the gate; they have no gaps, so a difference is only told."""
    mine, theirs = _output_hashes(run), _output_hashes(reference)
    common = [key for key in mine if key in theirs]
    if not common:
        return []
    num_equal = sum(mine[key] == theirs[key] for key in common)
    return [
        f"{run['stage']}: whole timed outputs equal to {ref_name}'s for {num_equal} of "
        f"{len(common)} requests"
    ]
