"""Measures what steps cost, at start-up, for chunks that respect a latency goal."""

import time

from folovllm.request import Request, SamplingParams

from .chunk_policy import StepCost, TimedChunks
from .cuda_graph import mixed_lengths
from .model_runner import ModelRunner
from .scheduler import ScheduledRequest, SchedulerOutput

_NUM_RUNS = 3
_SHORT_S = 0.05
"""A step that takes longer is timed once."""
_NUM_DECODES = 8
"""Requests with single tokens, where the cache has room: beside a chunk, and with long contexts."""


def measure_chunk_sizes(runner: ModelRunner, target_s: float) -> TimedChunks:
    """Time steps of growing length until one takes longer than `target_s`.

    Each without context and with the longest: in between, time grows with the context. Uses the
    cache, in which nothing may be yet.
    """
    config = runner.config
    blocks_of_longest = -(-config.max_model_len // config.block_size)
    num_blocks = runner.kv_cache.num_tokens // config.block_size
    num_longest = min(num_blocks // blocks_of_longest, config.max_num_seqs, _NUM_DECODES)
    num_beside = min(num_blocks - blocks_of_longest, config.max_num_seqs - 1, _NUM_DECODES)
    # What memory holds by chance may be NaN, and zeros multiply faster than numbers.
    num_used = max(num_longest * blocks_of_longest, blocks_of_longest + num_beside)
    runner.kv_cache.kv[:, :, :num_used].normal_()
    costs: list[StepCost] = []
    for num_tokens in mixed_lengths(min(config.max_num_batched_tokens, config.max_model_len)):
        num_decodes = min(num_beside, num_tokens // 2)
        num_new = num_tokens - num_decodes
        num_cached = config.max_model_len - num_new
        decodes = [(0, 1)] * num_decodes
        step_s = _time_step(runner, [*decodes, (0, num_new)])
        longest_s = _time_step(runner, [*decodes, (num_cached, num_new)])
        key_s = max(longest_s - step_s, 0.0) / max(num_cached, 1)
        costs.append(StepCost(num_tokens, step_s, key_s))
        if step_s > target_s:
            break
    longest = config.max_model_len - 1
    short_s = _time_step(runner, [(0, 1)] * num_longest)
    long_s = _time_step(runner, [(longest, 1)] * num_longest)
    decode_key_s = max(long_s - short_s, 0.0) / max(num_longest * longest, 1)
    return TimedChunks(costs, decode_key_s, target_s, config.max_chunk_tokens)


def _time_step(runner: ModelRunner, shares: list[tuple[int, int]]) -> float:
    """Seconds of a step of (tokens in the cache, tokens to compute), after one not counted."""
    scheduled, num_blocks = [], 0
    for index, (num_computed, num_new) in enumerate(shares):
        request = Request(
            request_id=f"measured-{index}",
            prompt_token_ids=[0] * (num_computed + num_new),
            sampling_params=SamplingParams(max_tokens=1, temperature=0.0),
            num_computed_tokens=num_computed,
        )
        first = num_blocks
        num_blocks += -(-(num_computed + num_new) // runner.config.block_size)
        scheduled.append(ScheduledRequest(request, num_new, range(first, num_blocks)))
    step = SchedulerOutput(scheduled=tuple(scheduled), block_copies=())
    times: list[float] = []
    while len(times) <= _NUM_RUNS and (len(times) < 2 or times[-1] < _SHORT_S):
        start = time.perf_counter()
        runner.launch(step).wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])  # what other programs on the machine add is not the step's
