"""Host time of a decode step in every stage: scheduling, input preparation, bookkeeping."""

from typing import Any

import torch

from .conftest import record

ROUNDS = 100
"""Each of them lengthens every request by a token, and there is room for a few hundred."""


def test_scheduler_step(benchmark: Any, decoding: Any) -> None:
    """schedule() and update(), with the forward pass between them left out."""
    scheduler = decoding.engine.scheduler

    def step() -> Any:
        return record(scheduler, scheduler.schedule())

    benchmark.extra_info["num_running"] = decoding.num_running
    output = benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=5)
    assert len(output.tokens) == output.stats.num_scheduled_tokens == decoding.num_running


@torch.inference_mode()
def test_prepare_inputs(benchmark: Any, decoding: Any) -> None:
    """From a SchedulerOutput to tensors on the device, as far as the host has to wait."""
    scheduled = decoding.schedule()
    benchmark.extra_info["num_running"] = decoding.num_running
    batch = benchmark(decoding.engine.model_runner.prepare_inputs, scheduled)
    assert batch.input_ids.shape == (decoding.num_running,)
