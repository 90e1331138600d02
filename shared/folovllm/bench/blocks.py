"""What a benchmark reports of stages whose KV cache is cut into blocks, and of what they keep."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ..interfaces import StepStats


def block_section(stats: Sequence[StepStats], kv_bytes_per_token: int) -> dict[str, Any] | None:
    """Blocks and their waste over a run, from the stats of its steps; None without blocks.

    Waste is room that is reserved and holds no token: here the empty ends of last blocks.
    """
    used = [s.num_used_blocks for s in stats if s.num_used_blocks is not None]
    free = [s.num_free_blocks for s in stats if s.num_free_blocks is not None]
    if not used or len(used) < len(stats):
        return None
    num_blocks = used[0] + free[0]
    holding = [s for s in stats if s.num_kv_tokens_reserved]
    empty = [s.num_kv_tokens_reserved - s.num_kv_tokens_live for s in holding]
    return {
        "block_size": stats[0].num_kv_tokens_capacity // num_blocks,
        "num_blocks": num_blocks,
        "max_used_blocks": max(used),
        "mean_free_blocks": fmean(free),
        "waste": _mean([n / s.num_kv_tokens_reserved for n, s in zip(empty, holding, strict=True)]),
        "wasted_tokens_per_request": _mean(
            [n / s.num_running for n, s in zip(empty, holding, strict=True)]
        ),
        "num_preemptions": sum(s.num_preemptions for s in stats),
        "swapped_bytes": sum(s.num_swapped_tokens for s in stats) * kv_bytes_per_token,
    }


def prefix_section(stats: Sequence[StepStats]) -> dict[str, Any] | None:
    """What a prefix cache found and gave up over a run; None in stages without one.

    hit_rate is the share of prompt tokens that need not be computed: of requests that run for the
    first time, so that it says nothing of prompts computed again after a preemption.
    """
    if any(s.num_cached_blocks is None for s in stats):
        return None
    num_looked_up = sum(s.num_prompt_tokens_looked_up or 0 for s in stats)
    num_found = sum(s.num_prompt_tokens_found or 0 for s in stats)
    return {
        "hit_rate": num_found / num_looked_up if num_looked_up else None,
        "num_prompt_tokens_looked_up": num_looked_up,
        "num_prompt_tokens_found": num_found,
        "num_evicted_blocks": sum(s.num_evicted_blocks or 0 for s in stats),
        "max_cached_blocks": max(s.num_cached_blocks or 0 for s in stats),
        "max_idle_blocks": max(s.num_idle_blocks or 0 for s in stats),
    }


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
