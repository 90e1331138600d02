"""What a benchmark reports of stages whose KV cache is cut into blocks."""

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


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
