"""How much KV cache a run needed, whatever it was given: the memory to compare stages by.

An engine fills what `kv_cache_bytes` gives it, so its peak says what it was given. What its
requests held at once is what it needs to run the workload as it did.
"""

from .results import Result, lookup
from .stages import is_ladder_stage


def kv_tokens_needed(result: Result) -> int | None:
    """Tokens of KV cache with which the engine would have run every step as it did.

    That is the most that its requests reserved at once. Stages with blocks admit a request only if
    every running one could take another block, so those must have been free where one was admitted.
    None of a peer that counts its whole pool as reserved.
    """
    steps = result["steps"]
    reserved, running = steps["num_kv_tokens_reserved"], steps["num_running"]
    if not reserved:
        return None
    if not is_ladder_stage(result["stage"]) and min(reserved) == max(
        steps["num_kv_tokens_capacity"]
    ):
        return None
    block_size = lookup(result, "kv_blocks.block_size") or 0
    needed = max(reserved)
    for before, now, tokens in zip([0, *running], running, reserved, strict=False):
        if now > before:
            needed = max(needed, tokens + (now - 1) * block_size)
    return int(needed)


def waited_for_memory(result: Result) -> bool:
    """Whether more memory would have let more requests run at once, in some step."""
    steps = result["steps"]
    if any(steps["num_preemptions"]):
        return True
    longest = result["engine_config"]["max_model_len"]
    block_size = lookup(result, "kv_blocks.block_size") or 0
    columns = ("num_waiting", "num_running", "num_kv_tokens_reserved", "num_kv_tokens_capacity")
    return any(
        waiting and capacity - reserved < longest + running * block_size
        for waiting, running, reserved, capacity in zip(*(steps[c] for c in columns), strict=True)
    )


def memory_needed_bytes(result: Result) -> float | None:
    """Weights, the KV cache that was needed, activations; on a CPU the process's peak.

    None where the engine does not tell what it needed of its KV cache.
    """
    peak = result["peak_memory_bytes"]
    if peak.get("activations") is None:
        return lookup(result, "peak_memory_bytes.total")
    tokens = kv_tokens_needed(result)
    if tokens is None:
        return None
    kv_bytes = tokens * result["model"]["kv_bytes_per_token"]
    return float(peak["weights"] + kv_bytes + peak["activations"])
