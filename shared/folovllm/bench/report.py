"""Turns the record of one run into the JSON that a benchmark writes."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from statistics import median
from typing import Any

import numpy as np

from ..interfaces import StepStats
from ..workloads.workload import Workload
from .late_requests import late_section, no_late_section, step_ranges
from .metrics import RequestTimes, StepWork, latency_summary, summarise, throughput
from .recorder import RequestRecord, RunRecord

_DECIMALS = 6
"""Of seconds in columns: a microsecond."""


def describe_workload(workload: Workload) -> dict[str, Any]:
    """What identifies a workload, without its tokens."""
    return {
        "name": workload.name,
        "spec": workload.spec,
        "sha256": workload.sha256,
        "num_requests": len(workload.requests),
        "num_input_tokens": workload.num_input_tokens,
        "num_output_tokens": workload.num_output_tokens,
        "num_requests_before_cut": workload.num_requests_before_cut,
        "parameters": workload.parameters,
    }


def speed_section(record: RunRecord, workload: Workload) -> dict[str, Any]:
    """Duration, throughput and latencies; those by group and around late requests, or None."""
    times = [
        RequestTimes(
            record.requests[request.request_id].arrival_s,
            record.token_times_s(request.request_id),
        )
        for request in workload.requests
    ]
    open_loop = workload.is_open_loop
    rates = throughput(
        num_requests=len(workload.requests),
        num_input_tokens=workload.num_input_tokens,
        num_output_tokens=workload.num_output_tokens,
        duration_s=record.duration_s,
    )
    return {
        "duration_s": record.duration_s,
        **rates,
        **latency_summary(times),
        "ttft_by_group_s": _ttft_by_group([request.group for request in workload.requests], times),
        **(late_section(times, record.starts_s) if open_loop else no_late_section()),
    }


def _ttft_by_group(
    groups: Sequence[str | None], times: Sequence[RequestTimes]
) -> dict[str, dict[str, float | None]] | None:
    """`summarise` of TTFT over the requests of each label; None if no request has one."""
    ttft_s: dict[str, list[float]] = {}
    for group, request in zip(groups, times, strict=True):
        if group is not None:
            ttft_s.setdefault(group, []).append(request.ttft_s)
    return {group: summarise(values) for group, values in ttft_s.items()} or None


def decode_step_summary(record: RunRecord) -> dict[str, Any]:
    """Durations of the steps in which every scheduled request had exactly one token."""
    durations = [
        end - start
        for start, end, stats in zip(record.starts_s, record.ends_s, record.stats, strict=True)
        if 0 < stats.num_scheduled_requests == stats.num_scheduled_tokens
    ]
    return {**summarise(durations), "count": len(durations)}


def host_time_section(
    seconds: Mapping[str, Sequence[float]], stats: Sequence[StepStats]
) -> dict[str, dict[str, float]]:
    """Median seconds per step of each timed method: over all steps, and over the widest ones."""
    widest = max(s.num_running for s in stats)
    at_widest = [i for i, s in enumerate(stats) if s.num_running == widest]
    return {
        "host_time_s": {label: median(column) for label, column in seconds.items()},
        "host_time_at_max_running_s": {
            label: median(column[i] for i in at_widest) for label, column in seconds.items()
        },
    }


def step_columns(record: RunRecord) -> dict[str, list[float]]:
    """One list per quantity that the stage has, one entry per step."""
    columns: dict[str, list[float]] = {
        "start_s": [round(start, _DECIMALS) for start in record.starts_s],
        "duration_s": [
            round(end - start, _DECIMALS)
            for start, end in zip(record.starts_s, record.ends_s, strict=True)
        ],
    }
    for column in fields(StepStats):
        values = [getattr(stats, column.name) for stats in record.stats]
        if None not in values:
            columns[column.name] = values
    return columns


def request_rows(record: RunRecord, workload: Workload) -> list[dict[str, Any]]:
    """One object per request, in the order of the workload."""
    return [
        _request_row(record, record.requests[source.request_id]) for source in workload.requests
    ]


def step_works(record: RunRecord) -> list[StepWork]:
    """What each step had to compute, from which request got a token in it.

    A request that gets its k-th token (k > 0) attends with one query to its prompt and k tokens;
    one that gets its first attends causally within its prompt. Where a step ran fewer tokens than
    these prompts have (a part was computed earlier or found in a cache), only that share of
    their attention is counted, so that the sum stays a lower bound.
    """
    num_steps = len(record.stats)
    decodes, rows = [0] * num_steps, [0] * num_steps
    cached, pairs = [0] * num_steps, [0] * num_steps
    prompts, prompt_pairs = [0] * num_steps, [0] * num_steps
    for request in record.requests.values():
        prompt_len = request.request.num_prompt_tokens
        for k, step in enumerate(request.steps):
            rows[step] += 1
            if k == 0:
                prompts[step] += prompt_len
                prompt_pairs[step] += prompt_len * (prompt_len + 1) // 2
            else:
                decodes[step] += 1
                cached[step] += prompt_len + k - 1
                pairs[step] += prompt_len + k
    works = []
    for step, stats in enumerate(record.stats):
        num_prompt_tokens = min(stats.num_scheduled_tokens - decodes[step], prompts[step])
        share = num_prompt_tokens / prompts[step] if prompts[step] else 0.0
        works.append(
            StepWork(
                num_tokens=stats.num_scheduled_tokens,
                num_logits_rows=rows[step],
                num_cached_tokens_read=cached[step],
                num_attention_pairs=pairs[step] + int(share * prompt_pairs[step]),
            )
        )
    return works


def check_record(record: RunRecord, workload: Workload) -> None:
    """RuntimeError, naming the request or step, if the engine did not do what was asked.

    A throughput over tokens that never came would be wrong and look fine.
    """
    for source in workload.requests:
        request = record.requests[source.request_id]
        reason = request.finish_reason.value if request.finish_reason else None
        if len(request.token_ids) != source.output_len or reason != "length":
            raise RuntimeError(
                f"request {source.request_id} ended with {len(request.token_ids)} tokens and "
                f"finish reason {reason!r}; expected {source.output_len} and 'length'"
            )
        if record.starts_s[request.steps[0]] < request.arrival_s:
            raise RuntimeError(f"request {source.request_id} ran before it arrived")
    num_tokens = [0] * len(record.stats)
    for request in record.requests.values():
        for step in request.steps:
            num_tokens[step] += 1
    for step, stats in enumerate(record.stats):
        if not num_tokens[step] <= stats.num_scheduled_requests <= stats.num_scheduled_tokens:
            raise RuntimeError(
                f"step {step} gave {num_tokens[step]} tokens but says that it scheduled "
                f"{stats.num_scheduled_requests} requests and {stats.num_scheduled_tokens} tokens"
            )
        if stats.num_kv_tokens_live > stats.num_kv_tokens_reserved:
            raise RuntimeError(
                f"step {step} says that {stats.num_kv_tokens_live} KV tokens live in room for "
                f"{stats.num_kv_tokens_reserved}"
            )


def _request_row(record: RunRecord, request: RequestRecord) -> dict[str, Any]:
    source = request.request
    times = record.token_times_s(source.request_id)
    digest = hashlib.sha256(np.asarray(request.token_ids, dtype="<i4").tobytes())
    return {
        "request_id": source.request_id,
        "follows": source.follows,
        "group": source.group,
        "num_prompt_tokens": source.num_prompt_tokens,
        "num_output_tokens": len(request.token_ids),
        "arrival_s": round(request.arrival_s, _DECIMALS),
        "first_token_s": round(times[0], _DECIMALS),
        "last_token_s": round(times[-1], _DECIMALS),
        "token_steps": step_ranges(request.steps),
        "finish_reason": request.finish_reason.value if request.finish_reason else None,
        "output_sha256": digest.hexdigest(),
    }
