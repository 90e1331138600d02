"""The timed run of a benchmark, and what is watched while it lasts."""

from dataclasses import dataclass
from typing import Any

import torch

from ..workloads.workload import Workload
from .block_map import BlockMapRecorder, pack_block_map
from .probes import (
    Clock,
    GpuUtilisation,
    HostTimers,
    PeakMemory,
    frozen_heap,
)
from .recorder import RunRecord, record_run


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was seen while the clock ran."""

    record: RunRecord
    host_s: dict[str, list[float]]
    """Method -> seconds, one entry per step."""
    peak_memory_bytes: int | None
    peak_kv_bytes: int
    """Most bytes that the KV tensors took after any step."""
    gpu_utilisation: float | None
    block_map: dict[str, Any] | None
    """None in stages without blocks."""


def measure(
    engine: Any,
    device: torch.device,
    workload: Workload,
    seed: int,
    clock: Clock,
    memory: PeakMemory,
) -> Measurement:
    """The timed run; an engine that keeps prefixes forgets those of warm-up and gate first."""
    methods = {
        "schedule": (engine.scheduler, "schedule"),
        "prepare_inputs": (engine.model_runner, "prepare_inputs"),
        "update": (engine.scheduler, "update"),
    }
    kv_cache = engine.model_runner.kv_cache
    kv_bytes: list[int] = []
    manager: Any = getattr(engine, "kv_cache_manager", None)
    blocks = BlockMapRecorder(manager, clock) if hasattr(manager, "block_tables") else None

    def after_step() -> None:
        kv_bytes.append(kv_cache.num_bytes)
        if blocks is not None:
            blocks.after_step()

    if hasattr(engine, "reset_prefix_cache"):
        engine.reset_prefix_cache()
    with frozen_heap():
        memory.reset()
        with GpuUtilisation(device) as gpu, HostTimers(methods, clock) as timers:
            record = record_run(
                engine,
                workload,
                seed=seed,
                clock=clock,
                before_step=timers.begin_step,
                after_step=after_step,
            )
    return Measurement(
        record=record,
        host_s=timers.seconds,
        peak_memory_bytes=memory.peak_bytes(),
        peak_kv_bytes=max(kv_bytes),
        gpu_utilisation=gpu.mean,
        block_map=_block_map(blocks, record),
    )


def _block_map(blocks: BlockMapRecorder | None, record: RunRecord) -> dict[str, Any] | None:
    stats = record.stats[0]
    if blocks is None or stats.num_used_blocks is None or stats.num_free_blocks is None:
        return None
    num_blocks = stats.num_used_blocks + stats.num_free_blocks
    return pack_block_map(blocks.block_map(num_blocks, list(record.requests)))
