"""How many tokens of a prompt go into a step: as many as fit, or as many as a time allows."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from folovllm.request import Request

LEAST_CHUNK = 64
"""Tokens that a step computes of its first prompt even if it is late then: prompts must end."""


class ChunkSizes(Protocol):
    """Decides how large chunks are; asked in every step."""

    def start_step(self, running: Sequence[Request]) -> None:
        """A step begins in which all of these want a token at least."""

    def take(self, num_computed_tokens: int, num_wanted: int) -> int:
        """How many of `num_wanted` tokens behind `num_computed_tokens` to compute, at least 1.

        Counts them to the step, so that a second chunk gets what is left.
        """


class FixedChunks:
    """The same limit for every chunk."""

    def __init__(self, max_chunk_tokens: int | None) -> None:
        self.max_chunk_tokens = max_chunk_tokens

    def start_step(self, running: Sequence[Request]) -> None: ...

    def take(self, num_computed_tokens: int, num_wanted: int) -> int:
        return (
            num_wanted if self.max_chunk_tokens is None else min(num_wanted, self.max_chunk_tokens)
        )


class StepCost(NamedTuple):
    """What steps of one length cost, in seconds, as `step_costs.measure_chunk_sizes` found."""

    num_tokens: int
    step_s: float
    """Of a step of so many tokens, most of them a chunk that begins its prompt."""
    key_s: float
    """More for every key in the cache that the chunk attends to."""


class TimedChunks:
    """Chunks as large as keep a step within a time, by what steps of several lengths took.

    The keys that decodes read are paid for first. As the context of a prompt grows, its chunks
    shrink: a token costs a pair with every key before it. A chunk fills its step to a length that
    was measured, because captured steps are padded to those.
    """

    def __init__(
        self,
        costs: Sequence[StepCost],
        decode_key_s: float,
        target_s: float,
        max_chunk_tokens: int | None,
    ) -> None:
        """costs: in ascending order; decode_key_s: seconds for every key that a decode reads."""
        self.costs = costs
        self.decode_key_s = decode_key_s
        self.target_s = target_s
        self.max_chunk_tokens = max_chunk_tokens
        self.num_tokens, self.left_s, self.least = 0, target_s, LEAST_CHUNK
        """Of the step: its tokens so far, what is left for its length, the next chunk at least."""

    def start_step(self, running: Sequence[Request]) -> None:
        decode_lens = [r.num_tokens for r in running if r.num_tokens - r.num_computed_tokens == 1]
        self.num_tokens = len(decode_lens)
        self.left_s = self.target_s - self.decode_key_s * sum(decode_lens)
        self.least = LEAST_CHUNK

    def take(self, num_computed_tokens: int, num_wanted: int) -> int:
        affordable = max(
            (
                num_tokens - self.num_tokens
                for num_tokens, step_s, key_s in self.costs
                if step_s + key_s * num_computed_tokens <= self.left_s
            ),
            default=0,
        )
        if affordable <= 0:
            affordable = self.least
        num_tokens = min(affordable, self.max_chunk_tokens or num_wanted, num_wanted)
        self.num_tokens, self.least = self.num_tokens + num_tokens, 1
        # The next chunk pays for the longer step; the keys of this one are paid for here.
        longer = (cost.key_s for cost in self.costs if cost.num_tokens >= num_tokens)
        self.left_s -= next(longer, self.costs[-1].key_s) * num_computed_tokens
        return num_tokens
