"""Benchmark results made up for tests: the shape of real ones, numbers chosen."""

import hashlib
import random
from typing import Any

import numpy as np

from folovllm.bench.block_map import CACHED, FREE, SHARED, BlockMap, pack_block_map
from folovllm.bench.late_requests import late_section, step_ranges
from folovllm.bench.metrics import RequestTimes


def make_run(
    stage: str = "m1_baseline",
    *,
    rate: float = 20.0,
    num_requests: int = 8,
    num_requests_before_cut: int | None = None,
    batch: int = 1,
    output_len: int = 16,
    dtype: str = "float32",
    sha256: str | None = None,
    on_cuda: bool = False,
) -> dict[str, Any]:
    """One run of `num_requests` requests served `batch` at a time at `rate` output tokens/s."""
    rng = random.Random(7)
    lengths = [rng.randrange(20, 200) for _ in range(num_requests_before_cut or num_requests)]
    lengths = lengths[:num_requests]
    num_output = output_len * num_requests
    step_s = batch / rate
    steps: dict[str, list[float]] = {name: [] for name in STEP_COLUMNS}
    requests: list[dict[str, Any]] = []
    now = 0.0
    for first in range(0, num_requests, batch):
        group = range(first, min(first + batch, num_requests))
        for index in range(output_len):
            tokens = sum(lengths[i] for i in group) if index == 0 else len(group)
            duration = step_s * (1 + tokens / 300)
            row = [now, duration, tokens, len(group), len(group), num_requests - group[-1] - 1, 0,
                   len(group) * (index + 100), len(group) * 256, batch * 256]  # fmt: skip
            for name, value in zip(STEP_COLUMNS, row, strict=True):
                steps[name].append(value)
            now += duration
            if index == 0:
                begun = now
        requests += [
            {"request_id": str(i), "num_prompt_tokens": lengths[i], "arrival_s": 0.0,
             "num_output_tokens": output_len, "first_token_s": begun, "last_token_s": now,
             "finish_reason": "length",
             "output_sha256": hashlib.sha256(f"{i}".encode()).hexdigest()}
            for i in group
        ]  # fmt: skip
    ttft = sorted(request["first_token_s"] for request in requests)
    e2e = sorted(request["last_token_s"] for request in requests)
    weights, reserved = 269e6, batch * 256 * 46080.0
    activations = 0.05e9 * batch if on_cuda else None
    total = weights + reserved + (activations if activations is not None else 0.6e9)
    return {
        "schema": 1, "stage": stage, "device": "nvidia-h200" if on_cuda else "cpu-2-cores",
        "workload": {
            "name": "nano", "spec": "nano" if num_requests_before_cut is None
            else f"nano:{num_requests}", "parameters": {"seed": 0},
            "sha256": sha256 or f"{num_requests:064x}", "num_requests": num_requests,
            "num_input_tokens": sum(lengths), "num_output_tokens": num_output,
            "num_requests_before_cut": num_requests_before_cut},
        "model": {
            "name": "models/SmolLM2-135M-Instruct", "load_format": "auto", "dtype": dtype,
            "num_parameters": 134_515_008, "weight_bytes": 269_030_016,
            "kv_bytes_per_token": 46080},
        "engine_config": {"max_model_len": 2048, "kv_cache_bytes": None}, "seed": 0,
        "duration_s": now, "output_tokens_per_s": num_output / now,
        "total_tokens_per_s": (num_output + sum(lengths)) / now, "requests_per_s":
        num_requests / now,
        "ttft_s": _summary(ttft), "tpot_s": _summary([step_s * 1.01] * 8),
        "itl_s": _summary([step_s] * 90 + [step_s * 1.7] * 10), "e2e_s": _summary(e2e),
        "peak_memory_bytes": {"total": total, "weights": weights, "kv_reserved": reserved,
                              "kv_live": 0.6 * reserved, "activations": activations},
        "kv_utilisation": 0.43, "gpu_utilisation": 0.87 if on_cuda else None,
        "roofline_fraction": 0.021 * batch, "ceilings": {},
        "host_time_s": {"schedule": 1e-4, "prepare_inputs": 2e-4, "update": 5e-5},
        "host_time_at_max_running_s": {"schedule": 1e-4, "prepare_inputs": 2e-4, "update": 5e-5},
        "decode_step_s": {**_summary([step_s] * 20), "count": 20}, "warmup": {},
        "steps": steps, "requests": requests,
        "gate": {"tokens": [[5, 6, 7, 8], [9, 10, 11, 12]],
                 "top2_gaps": [[1.0, 2.0, 0.1, 3.0], [0.8, 1.5, 0.9, 2.0]]},
        "environment": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0",
                        "triton": "3.9.0", "commit": "0123456789abcdef", "dirty": True,
                        "device": "NVIDIA H200" if on_cuda else "some CPU, 2 cores"},
    }  # fmt: skip


def with_blocks(run: dict[str, Any], num_blocks: int) -> dict[str, Any]:
    """The run of a stage with blocks: request 0 loses its blocks and gets others later."""
    num_steps = len(run["steps"]["start_s"])
    run["steps"]["num_used_blocks"] = [3] * num_steps
    run["steps"]["num_free_blocks"] = [num_blocks - 3] * num_steps
    run["kv_blocks"] = {"block_size": 16, "num_blocks": num_blocks, "waste": 0.1}
    owners = np.full((num_blocks, 4), FREE, dtype=np.int32)
    owners[:4] = [[0, 0, FREE, FREE], [0, SHARED, FREE, 0], [CACHED] * 4, [FREE, 1, 1, 1]]
    run["block_map"] = pack_block_map(
        BlockMap(
            num_blocks=num_blocks,
            block_stride=1,
            steps=[0, 2, 4, 6],
            request_ids=[request["request_id"] for request in run["requests"]],
            sampling_s=0.0,
            owners=owners,
        )
    )
    return run


def with_late_request(run: dict[str, Any], beside_s: list[float]) -> dict[str, Any]:
    """The run of 4 decoders with 30 tokens each, and a prompt that comes in the tenth step.

    A step takes 50 ms. Those after the arrival take as long as `beside_s` says; the last of them
    gives the late request its first token.
    """
    durations = [0.05] * 10 + beside_s + [0.05] * (20 - len(beside_s))
    ends = np.cumsum(durations)
    arrival, first = 0.48, 9 + len(beside_s)
    steps = {**{i: list(range(30)) for i in range(4)}, 4: list(range(first, first + 3))}
    columns: dict[str, list[float]] = {name: [1] * 30 for name in STEP_COLUMNS}
    columns |= {"start_s": (ends - durations).tolist(), "duration_s": durations}
    requests = [
        {"request_id": str(i), "num_prompt_tokens": 9, "arrival_s": 0.0 if i < 4 else arrival,
         "num_output_tokens": len(found), "first_token_s": float(ends[found[0]]),
         "last_token_s": float(ends[found[-1]]), "finish_reason": "length",
         "output_sha256": "", "token_steps": step_ranges(found)}
        for i, found in steps.items()
    ]  # fmt: skip
    times = [
        RequestTimes(r["arrival_s"], tuple(ends[steps[i]].tolist())) for i, r in enumerate(requests)
    ]
    workload = {**run["workload"], "num_requests": 5, "num_requests_before_cut": None}
    return {
        **run, **late_section(times, columns["start_s"]), "requests": requests, "steps": columns,
        "workload": workload, "duration_s": float(ends[-1]),
    }  # fmt: skip


STEP_COLUMNS = (
    "start_s", "duration_s", "num_scheduled_tokens", "num_scheduled_requests", "num_running",
    "num_waiting", "num_preemptions", "num_kv_tokens_live", "num_kv_tokens_reserved",
    "num_kv_tokens_capacity",
)  # fmt: skip


def _summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "mean": sum(ordered) / len(ordered)}
