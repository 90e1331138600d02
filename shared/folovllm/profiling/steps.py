"""Where the time of one prompt step and one decode step goes, kernel by kernel."""

import random
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..hardware import Ceilings, describe_environment, device_slug, measure_ceilings
from ..interfaces import StepStats
from ..request import Request, SamplingParams
from .groups import group_works, summarise_groups

_NUM_TIMED_STEPS = 20
"""Decode steps timed without the profiler, which itself takes host time."""
_NUM_WARMUP_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """All launches of one kernel in a step (on a CPU: all calls of one torch operator)."""

    name: str
    count: int
    total_s: float
    """On the device, from the end of the kernel before where that is later than the start: kernels
    may overlap, and what they add to the step adds up. On a CPU the operator itself, without
    those that it calls."""


@dataclass(frozen=True, kw_only=True)
class _ProfiledStep:
    kernels: list[KernelRow]
    stats: StepStats


def profile_steps(llm: Any, *, stage: str, batch_size: int, context_len: int) -> dict[str, Any]:
    """Profile the step that computes prompts and a decode step of `batch_size` requests.

    Prompts are `context_len` random tokens. Returns what `python -m STAGE profile --output`
    writes. ValueError if the requests cannot run, or never run together.
    """
    engine, device = llm.engine, llm.model.device
    ceilings = measure_ceilings(device)
    num_steps = 2 * (_NUM_WARMUP_STEPS + _NUM_TIMED_STEPS)
    requests = _make_requests(llm, batch_size, context_len, max_tokens=num_steps, name="warm-up")
    _add(engine, requests)
    _step_until_decoding(engine, batch_size)
    for _ in range(_NUM_WARMUP_STEPS):
        engine.step()
    decode_s = [_timed_step(engine) for _ in range(_NUM_TIMED_STEPS)]
    decode = _profiled_step(engine, device)
    decode_len = requests[0].num_tokens - 1
    _abort(engine, requests)
    requests = _make_requests(llm, batch_size, context_len, max_tokens=2, name="timed")
    _add(engine, requests)
    prompt_s = [_timed_step(engine)]
    _abort(engine, requests)
    requests = _make_requests(llm, batch_size, context_len, max_tokens=2, name="profiled")
    _add(engine, requests)
    prompt = _profiled_step(engine, device)
    _abort(engine, requests)
    return {
        "schema": 1,
        "stage": stage,
        "device": device_slug(device),
        "batch_size": batch_size,
        "context_len": context_len,
        "num_layers": llm.model.config.num_layers,
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "decode": _section(llm, decode_s, decode, decode_len, ceilings),
        "prompt": _section(llm, prompt_s, prompt, context_len, ceilings),
        "ceilings": vars(ceilings),
        "environment": describe_environment(),
    }


def _section(
    llm: Any, step_s: list[float], step: _ProfiledStep, seq_len: int, ceilings: Ceilings
) -> dict[str, Any]:
    """seq_len: tokens of each request in the cache after the step."""
    kernels = [vars(row) for row in step.kernels]
    num_requests = step.stats.num_scheduled_requests
    works = group_works(
        llm.model,
        num_requests=num_requests,
        query_len=step.stats.num_scheduled_tokens // num_requests,
        seq_len=seq_len,
    )
    return {
        "step_s": median(step_s),
        "kernels_s": sum(row.total_s for row in step.kernels),
        "num_launches": sum(row.count for row in step.kernels),
        "num_scheduled_requests": num_requests,
        "num_scheduled_tokens": step.stats.num_scheduled_tokens,
        "groups": summarise_groups(kernels, works, ceilings),
        "kernels": kernels,
    }


def _make_requests(
    llm: Any, batch_size: int, context_len: int, *, max_tokens: int, name: str
) -> list[Request]:
    rng = random.Random(0)
    vocab_size = llm.model.config.vocab_size
    return [
        Request(
            request_id=f"{name}-{index}",
            prompt_token_ids=[rng.randrange(vocab_size) for _ in range(context_len)],
            sampling_params=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
        )
        for index in range(batch_size)
    ]


def _add(engine: Any, requests: list[Request]) -> None:
    for request in requests:
        engine.add_request(request)


def _abort(engine: Any, requests: list[Request]) -> None:
    for request in requests:
        engine.abort_request(request.request_id)


def _step_until_decoding(engine: Any, batch_size: int) -> None:
    """Step until one token of every request is computed in the same step."""
    while engine.has_unfinished_requests():
        stats = engine.step().stats
        if stats.num_scheduled_requests == stats.num_scheduled_tokens == batch_size:
            return
    raise ValueError(
        f"{batch_size} requests never decoded together in this engine; lower --batch-size, or "
        f"raise max_num_seqs or kv_cache_bytes"
    )


def _timed_step(engine: Any) -> float:
    """Seconds; a step ends when its tokens are on the host, so the device is done."""
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def _profiled_step(engine: Any, device: torch.device) -> _ProfiledStep:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        stats = engine.step().stats
    rows = _cuda_rows(profiler) if device.type == "cuda" else _operator_rows(profiler)
    kernels = sorted(rows, key=lambda row: row.total_s, reverse=True)
    return _ProfiledStep(kernels=kernels, stats=stats)


def _cuda_rows(profiler: profile) -> list[KernelRow]:
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    added_us: dict[str, float] = {}
    counts: dict[str, int] = {}
    end_us = 0.0
    for event in sorted(events, key=lambda event: float(event.time_range.end)):
        start_us = max(end_us, event.time_range.start)
        end_us = max(end_us, event.time_range.end)
        added_us[event.name] = added_us.get(event.name, 0.0) + end_us - start_us
        counts[event.name] = counts.get(event.name, 0) + 1
    return [
        KernelRow(name=name, count=counts[name], total_s=us * 1e-6) for name, us in added_us.items()
    ]


def _operator_rows(profiler: profile) -> list[KernelRow]:
    return [
        KernelRow(name=event.key, count=event.count, total_s=event.self_cpu_time_total * 1e-6)
        for event in profiler.key_averages()
        if event.key.startswith("aten::")
    ]
