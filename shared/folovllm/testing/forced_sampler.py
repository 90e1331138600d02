"""A sampler that returns given tokens and keeps the logits, for teacher-forced comparisons."""

from collections.abc import Mapping, Sequence

import torch

from ..request import Request
from ..sampling.sampler import SampledTokens


def forced_tokens(token_ids: Sequence[int], device: torch.device) -> SampledTokens:
    """What a sampler returns that was told its choices."""
    ids = torch.tensor(list(token_ids), dtype=torch.int64, device=device)
    return SampledTokens(torch.stack((ids, torch.ones_like(ids))), logprobs=None)


class ForcedSampler:
    """Takes the place of `engine.model_runner.sampler`.

    Teacher forcing feeds the reference's tokens whatever the model would have chosen, so that
    every step compares the same context and one near-tie does not end the comparison.
    """

    def __init__(self, token_ids: Mapping[str, Sequence[int]]) -> None:
        self.token_ids = token_ids
        """Request id -> the tokens to return, in order."""
        self.recorded: dict[str, dict[int, torch.Tensor]] = {name: {} for name in token_ids}
        """Request id -> index of the output token -> logits. What a chunk of a prompt leaves under
        0 makes room for what its last one does."""

    def validate(self, request: Request) -> None:
        if request.request_id not in self.token_ids:
            raise ValueError(f"there are no tokens to force on request {request.request_id}")

    def collect_noise(self, requests: Sequence[Request]) -> None:
        """There is none: the tokens are given, so nothing may be sampled inside a graph."""

    def prepare(self, requests: Sequence[Request]) -> Sequence[Request]:
        return requests

    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> SampledTokens:
        """logits: [num_requests, vocab_size]."""
        chosen = []
        for request, row in zip(requests, logits.float().cpu(), strict=True):
            index = request.num_output_tokens
            self.recorded[request.request_id][index] = row
            chosen.append(self.token_ids[request.request_id][index])
        return forced_tokens(chosen, logits.device)

    def logits_of(self, request_id: str) -> torch.Tensor:
        """[num_output_tokens, vocab_size] float32 on the CPU."""
        recorded = self.recorded[request_id]
        assert list(recorded) == list(range(len(recorded)))
        return torch.stack(list(recorded.values()))
