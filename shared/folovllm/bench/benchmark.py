"""Benchmark of one engine on one workload: fit check, warm-up, gate run, clock, report."""

from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from typing import Any

from ..hardware import Ceilings, describe_environment, device_slug, measure_ceilings
from ..model.config import kv_bytes_per_token
from ..model.cost import model_cost
from ..model.transformer import CausalLM
from ..workloads.workload import Workload
from .blocks import block_section, prefix_section
from .measure import Measurement, measure
from .metrics import (
    device_memory_parts,
    host_memory_parts,
    kv_utilisation,
    roofline_fraction,
)
from .prepare import run_gate, warm_up
from .probes import Clock, PeakMemory, ProcessMemory, SystemClock
from .recorder import check_fit
from .report import (
    check_record,
    decode_step_summary,
    describe_workload,
    host_time_section,
    request_rows,
    speed_section,
    step_columns,
    step_works,
)

SCHEMA = 1


def run_benchmark(
    llm: Any,
    workload: Workload,
    *,
    stage: str,
    seed: int = 0,
    gate_requests: int = 8,
    gate_tokens: int = 16,
    warmup_tokens: int = 4,
    model_name: str | None = None,
    load_format: str | None = None,
    ceilings: Ceilings | None = None,
    clock: Clock | None = None,
    memory: PeakMemory | None = None,
) -> dict[str, Any]:
    """Run `workload` once through `llm.engine` and return the report (docs: schema 1).

    Greedy, end-of-sequence tokens ignored, exactly `output_len` tokens per request. In this order
    and with only the last step timed: every request is checked to fit; the ceilings of the device
    are measured unless given; a warm-up run of `warmup_tokens` tokens per request compiles
    kernels and fills the allocator; the first `gate_requests` requests run together for
    `gate_tokens` tokens, whose ids and top-2 gaps compare uses to check that stages agree.

    llm: has `.engine` (a stage's LLMEngine) and `.model`. model_name and load_format are only
    reported. memory: what tells the peak, if the engine is not in this process. ValueError naming
    a request that cannot run; RuntimeError if the engine's outputs or stats contradict the
    workload.
    """
    _require_positive(
        gate_requests=gate_requests, gate_tokens=gate_tokens, warmup_tokens=warmup_tokens
    )
    clock = clock or SystemClock()
    engine, model = llm.engine, llm.model
    check_fit(engine, workload, seed)
    ceilings = ceilings or measure_ceilings(model.device)
    warmup = warm_up(engine, model, workload, warmup_tokens, seed, clock)
    gate = run_gate(engine, workload, gate_requests, gate_tokens, seed)
    memory = memory or ProcessMemory(model.device)
    run = measure(engine, model.device, workload, seed, clock, memory)
    check_record(run.record, workload)
    return {
        "schema": SCHEMA,
        "stage": stage,
        "device": device_slug(model.device),
        "workload": describe_workload(workload),
        "model": _describe_model(model, model_name, load_format),
        "tensor_parallel_size": model.collectives.num_ranks,
        "engine_config": _plain(asdict(engine.config)),
        "attention": type(getattr(engine.model_runner, "attention", None)).__name__,
        "seed": seed,
        "sampling": {"temperature": 0.0, "ignore_eos": True},
        **speed_section(run.record, workload),
        "decode_step_s": decode_step_summary(run.record),
        **_resource_section(model, run, ceilings),
        **host_time_section(run.host_s, run.record.stats),
        "cuda_graphs": _describe_graphs(getattr(engine.model_runner, "graphs", None)),
        "warmup": warmup,
        "gate": gate,
        "steps": step_columns(run.record),
        "block_map": run.block_map,
        "requests": request_rows(run.record, workload),
        "environment": describe_environment(),
    }


def _require_positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _describe_graphs(graphs: Any) -> dict[str, Any] | None:
    """What capturing CUDA graphs cost, for stages that do."""
    if graphs is None:
        return None
    return {
        "shapes": sorted(graphs.graphs),
        "capture_s": graphs.capture_s,
        "num_bytes": graphs.num_bytes,
    }


def _resource_section(model: CausalLM, run: Measurement, ceilings: Ceilings) -> dict[str, Any]:
    """Memory and how well the device was used."""
    stats = run.record.stats
    bytes_per_token = kv_bytes_per_token(model.config, model.dtype)
    parts = device_memory_parts if model.device.type == "cuda" else host_memory_parts
    live = [step.num_kv_tokens_live for step in stats]
    return {
        "peak_memory_bytes": parts(
            total=run.peak_memory_bytes,
            weights=model.num_parameter_bytes,
            kv_reserved=run.peak_kv_bytes,
            kv_live=max(live) * bytes_per_token,
        ),
        "kv_utilisation": kv_utilisation(live, [step.num_kv_tokens_reserved for step in stats]),
        "kv_blocks": block_section(stats, bytes_per_token),
        "prefix_cache": prefix_section(stats),
        "gpu_utilisation": run.gpu_utilisation,
        "roofline_fraction": roofline_fraction(
            model_cost(model),
            step_works(run.record),
            duration_s=run.record.duration_s,
            copy_bytes_per_s=ceilings.copy_bytes_per_s,
            matmul_flops_per_s=ceilings.matmul_flops_per_s,
        ),
        "ceilings": asdict(ceilings),
    }


def _describe_model(
    model: CausalLM, model_name: str | None, load_format: str | None
) -> dict[str, Any]:
    return {
        "name": model_name,
        "load_format": load_format,
        "quantization": model.config.quantization,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_parameters": model.num_parameters,
        "weight_bytes": model.num_parameter_bytes,
        "kv_bytes_per_token": kv_bytes_per_token(model.config, model.dtype),
    }


def _plain(value: Any) -> Any:
    """Dataclass fields as JSON has them: enums become their values."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value
