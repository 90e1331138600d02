"""Make one result of several runs of a stage: the median run, medians, and the spread."""

import copy
import math
import statistics
from collections.abc import Sequence
from typing import Any

from .results import Result, lookup

MEDIAN_OF = (
    "duration_s",
    "output_tokens_per_s",
    "total_tokens_per_s",
    "requests_per_s",
    "kv_utilisation",
    "gpu_utilisation",
    "roofline_fraction",
)
"""Headline numbers that are replaced by their median over the runs."""

MEDIAN_WITHIN = (
    "ttft_s",
    "tpot_s",
    "itl_s",
    "e2e_s",
    "late_ttft_s",
    "decoder_itl_s",
    "decoder_itl_beside_late_s",
    "decode_step_s",
    "host_time_s",
    "host_time_at_max_running_s",
    "peak_memory_bytes",
)
"""Objects whose every number is replaced likewise."""

MEDIAN_WITHIN_GROUPS = ("ttft_by_group_s",)
"""Objects of such objects, by the label of a group of requests; the spread of every p50 is kept."""

SPREAD_OF = (
    "output_tokens_per_s",
    "requests_per_s",
    "duration_s",
    "ttft_s.p50",
    "tpot_s.p50",
    "itl_s.p99",
    "late_ttft_s.p50",
    "decoder_itl_beside_late_s.max",
    "decode_step_s.p50",
    "peak_memory_bytes.total",
)
"""Numbers of which the smallest, the largest and all values are kept."""


def merge_runs(runs: Sequence[Result]) -> Result:
    """One result that stands for all runs of one stage.

    It is a copy of the run with the median output rate (of an even number the lower of the middle
    two), so that steps, requests and gate belong together, with every headline number replaced by
    its median over the runs. A number that only some runs have is the median of those; one that no
    run has stays None. Adds `repeats` and `spread`.
    """
    if not runs:
        raise ValueError("no runs to merge; a stage needs at least one that finished")
    stages = sorted({run["stage"] for run in runs})
    if len(stages) > 1:
        raise ValueError(f"runs of different stages cannot be merged: {', '.join(stages)}")
    by_rate = sorted(runs, key=lambda run: lookup(run, "output_tokens_per_s") or 0.0)
    merged = copy.deepcopy(by_rate[(len(by_rate) - 1) // 2])
    for name in MEDIAN_OF:
        merged[name] = _median(runs, name)
    for name in MEDIAN_WITHIN:
        if isinstance(merged.get(name), dict):
            merged[name] = {key: _median(runs, f"{name}.{key}") for key in merged[name]}
    merged["repeats"] = len(runs)
    merged["spread"] = {name: _spread(runs, name) for name in SPREAD_OF}
    for name in MEDIAN_WITHIN_GROUPS:
        _merge_groups(merged, runs, name)
    return merged


def _merge_groups(merged: Result, runs: Sequence[Result], name: str) -> None:
    """As `merge_runs` does, for each group of requests that the median run has."""
    if not merged.get(name):
        return
    merged["spread"][name] = {}
    for group, summary in merged[name].items():
        summaries = [(lookup(run, name) or {}).get(group, {}) for run in runs]
        merged[name][group] = {key: _median(summaries, key) for key in summary}
        merged["spread"][name][group] = _spread(summaries, "p50")


def _values(runs: Sequence[Result], path: str) -> list[float]:
    """Numbers at `path`, in run order, without runs that have none."""
    found = (lookup(run, path) for run in runs)
    return [
        value
        for value in found
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ]


def _median(runs: Sequence[Result], path: str) -> float | None:
    values = _values(runs, path)
    if not values:
        return None
    if all(isinstance(value, int) for value in values):
        return statistics.median_low(values)
    return statistics.median(values)


def _spread(runs: Sequence[Result], path: str) -> dict[str, Any] | None:
    values = _values(runs, path)
    return {"min": min(values), "max": max(values), "values": values} if values else None
