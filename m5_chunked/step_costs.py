"""Measures what steps cost, at start-up, for chunks that respect a latency goal."""

import time
from statistics import median

import numpy as np

from folovllm.request import Request, SamplingParams

from .chunk_policy import StepCost
from .model_runner import ModelRunner
from .scheduler import ScheduledRequest, SchedulerOutput

_NUM_RUNS = 3


def measure_step_cost(runner: ModelRunner) -> StepCost:
    """Time steps of several kinds and fit the four terms of StepCost to them.

    Uses the cache, in which nothing may be yet. Terms that come out below 0, where noise is larger
    than what they stand for, count as 0.
    """
    config = runner.config
    longest = config.max_model_len - 1
    largest = min(config.max_num_batched_tokens, config.max_model_len)
    num_decodes = max(1, min(config.max_num_seqs, runner.kv_cache.num_tokens // (longest + 1)))
    chunks = {largest, max(largest // 2, 1), max(largest // 8, 1)}
    rows, seconds = [], []
    for num_requests, num_computed, num_new in [
        *((1, 0, n) for n in sorted(chunks)),
        *((1, config.max_model_len - n, n) for n in sorted(chunks)),
        *((n, length, 1) for n in (1, num_decodes) for length in (0, longest)),
    ]:
        num_pairs = num_new * (num_computed + (num_new + 1) / 2)
        is_decode = num_new == 1
        rows.append(
            [
                1.0,
                num_requests * num_new,
                0.0 if is_decode else num_pairs,
                float(num_requests * (num_computed + 1)) if is_decode else 0.0,
            ]
        )
        seconds.append(_time_step(runner, num_requests, num_computed, num_new))
    # Relative errors count: a step of half a millisecond matters as much as one of fifty.
    weights = 1 / np.array(seconds)
    solved = np.linalg.lstsq(np.array(rows) * weights[:, None], np.ones(len(rows)), rcond=None)
    fixed_s, token_s, pair_s, context_s = np.maximum(solved[0], 0.0).tolist()
    return StepCost(fixed_s, token_s, pair_s, context_s)


def _time_step(runner: ModelRunner, num_requests: int, num_computed: int, num_new: int) -> float:
    """Seconds of a step of these requests, after one that does not count."""
    num_blocks = -(-(num_computed + num_new) // runner.config.block_size)
    scheduled = []
    for index in range(num_requests):
        request = Request(
            request_id=f"measured-{index}",
            prompt_token_ids=[0] * (num_computed + num_new),
            sampling_params=SamplingParams(max_tokens=1, temperature=0.0),
            num_computed_tokens=num_computed,
        )
        table = list(range(index * num_blocks, (index + 1) * num_blocks))
        scheduled.append(ScheduledRequest(request, num_new, table))
    step = SchedulerOutput(scheduled=tuple(scheduled), block_copies=())
    times = []
    for _ in range(_NUM_RUNS + 1):
        start = time.perf_counter()
        runner.launch(step).wait()
        times.append(time.perf_counter() - start)
    return median(times[1:])
