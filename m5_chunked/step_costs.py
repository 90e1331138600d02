"""Measures what steps cost, at start-up, for chunks that respect a latency goal."""

import time

import numpy as np

from folovllm.request import Request, SamplingParams

from .chunk_policy import StepCost
from .model_runner import ModelRunner
from .scheduler import ScheduledRequest, SchedulerOutput

_NUM_RUNS = 3
_MOST_DECODES = 32
"""Requests in the largest decode step that is timed: what a key costs does not need more."""


def measure_step_cost(runner: ModelRunner) -> StepCost:
    """Time steps of several kinds and fit the four terms of StepCost to them.

    Uses the cache, in which nothing may be yet.
    """
    config = runner.config
    longest = config.max_model_len - 1
    largest = min(config.max_num_batched_tokens, config.max_model_len)
    num_fitting = runner.kv_cache.num_tokens // (longest + 1)
    num_decodes = max(1, min(_MOST_DECODES, config.max_num_seqs, num_fitting))
    chunks = {max(largest // 2, 1), max(largest // 8, 1)}
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
    return StepCost(*_fit(np.array(rows), np.array(seconds)))


def _fit(rows: np.ndarray, seconds: np.ndarray) -> list[float]:
    """Least squares of relative errors: half a millisecond matters as much as fifty.

    rows: [num_steps, num_terms]. A term that comes out below 0 is left out of the fit.
    """
    scaled, terms = rows / seconds[:, None], list(range(rows.shape[1]))
    while True:
        solved = np.linalg.lstsq(scaled[:, terms], np.ones(len(rows)), rcond=None)[0]
        if solved.min() >= 0:
            found = dict(zip(terms, solved.tolist(), strict=True))
            return [found.get(term, 0.0) for term in range(rows.shape[1])]
        del terms[int(solved.argmin())]


def _time_step(runner: ModelRunner, num_requests: int, num_computed: int, num_new: int) -> float:
    """Seconds of a step of these requests, after one that does not count."""
    num_blocks = -(-(num_computed + num_new) // runner.config.block_size)
    # What memory holds by chance may be NaN, and zeros multiply faster than numbers.
    runner.kv_cache.kv[:, :, : num_requests * num_blocks].normal_()
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
    return min(times[1:])  # what other programs on the machine add is not the step's
