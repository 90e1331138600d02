"""How much memory the KV cache may take when nobody says, and what to say when it is too much."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from .host_memory import available_host_bytes

_CPU_FRACTION = 0.125
"""Of the available host memory: others share it, and a CPU is too slow to fill more."""


class Holders(Protocol):
    """The processes that hold a model together."""

    @property
    def num_ranks(self) -> int: ...
    def least(self, number: int) -> int:
        """The smallest of what they give."""


class LoadedModel(Protocol):
    """What a CausalLM says about where it is."""

    @property
    def device(self) -> torch.device: ...
    @property
    def collectives(self) -> Holders: ...


def profile_kv_cache_bytes(
    model: LoadedModel, gpu_memory_utilization: float, run_largest_step: Callable[[], object]
) -> int:
    """Bytes left for keys and values once the model's largest step has what it needs.

    On CUDA, runs that step, and returns `gpu_memory_utilization` of the device's memory less
    what is in use by other programs and less the step's peak (vLLM's memory profiling). On a
    CPU, an eighth of the available memory, shared by the processes that hold the model together.
    Of several processes all get the least that one of them has. ValueError when nothing is left.
    """
    device, collectives = model.device, model.collectives
    if device.type != "cuda":
        share = _CPU_FRACTION / collectives.num_ranks
        return collectives.least(int(available_host_bytes() * share))
    torch.cuda.reset_peak_memory_stats(device)
    run_largest_step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    used_by_others = total - free - torch.cuda.memory_reserved(device)
    left = int(total * gpu_memory_utilization) - used_by_others - peak
    if left <= 0:
        raise ValueError(
            f"nothing is left for the KV cache: gpu_memory_utilization {gpu_memory_utilization} "
            f"of {total} bytes, less {used_by_others} used by other programs, less {peak} for the "
            f"weights and the largest step; raise gpu_memory_utilization, or lower "
            f"max_num_batched_tokens or max_model_len"
        )
    return collectives.least(left)


class StepLimits(Protocol):
    """What a stage's EngineConfig says about the size of a step."""

    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...


def largest_prompts(limits: StepLimits) -> set[tuple[int, int]]:
    """(requests, tokens of each) of steps that fill the budget: the longest prompts, or all of it.

    With a budget of 8,192 and prompts of up to 5,000 tokens: 1 of 5,000, 2 of 4,096. Of a prompt
    that is longer than the budget, a step computes as much as the budget.
    """
    budget = limits.max_num_batched_tokens
    num_needed = -(-budget // limits.max_model_len)
    return {
        (min(budget // prompt_len, limits.max_num_seqs), prompt_len)
        for prompt_len in (min(limits.max_model_len, budget), budget // num_needed)
    }


@contextmanager
def kv_cache_allocation() -> Iterator[None]:
    """Around making an engine: memory that torch cannot get is a ValueError that says so."""
    try:
        yield
    except RuntimeError as error:  # on CUDA OutOfMemoryError, on a CPU nothing more special
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the KV cache does not fit beside the weights ({reason}); lower kv_cache_bytes"
        ) from error
