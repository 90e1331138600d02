"""The batch whose sampling takes the most memory, for profiling."""

import torch

from ..request import Request, SamplingParams
from .prompt_logprobs import MOST_ROWS_AT_ONCE
from .sampler import Sampler


def run_largest_sampling(sampler: Sampler, num_rows: int, dtype: torch.dtype) -> None:
    """Sample `num_rows` rows of random logits by the rules that take the most memory.

    Not fewer than are described at once where log-probabilities of a prompt are asked for.
    Sorting a large vocabulary for top_p takes several times the logits themselves, so a cache
    sized without it would leave no room for the first batch that asks.
    """
    num_rows = max(num_rows, MOST_ROWS_AT_ONCE)
    params = SamplingParams(max_tokens=2, top_p=0.9, repetition_penalty=1.1, logprobs=8)
    requests = [
        Request(request_id=f"profile-{row}", prompt_token_ids=[0], sampling_params=params)
        for row in range(num_rows)
    ]
    logits = torch.randn(num_rows, sampler.num_columns, device=sampler.device).to(dtype)
    sampler.sample(logits, sampler.prepare(requests)).to_host()
