"""How many tokens of a prompt go into a step: as many as fit, or as many as a time allows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from folovllm.request import Request

LEAST_CHUNK = 16
"""Tokens of a prompt that a step computes even if it is late then: prompts must end."""


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


@dataclass(frozen=True)
class StepCost:
    """What a step costs, in seconds, as a sum; see `step_costs.measure_step_cost`."""

    fixed_s: float
    token_s: float
    """Of every token: its share of the matrix products."""
    pair_s: float
    """Of every pair of a chunk's query and a key that it sees."""
    context_s: float
    """Of every key that a single query (a decode) sees: it is read for nobody else."""

    def of_chunk(self, num_tokens: int, num_computed_tokens: int) -> float:
        num_pairs = num_tokens * (num_computed_tokens + (num_tokens + 1) / 2)
        return self.token_s * num_tokens + self.pair_s * num_pairs

    def of_decode(self, seq_len: int) -> float:
        return self.token_s + self.context_s * seq_len

    def largest_chunk(self, seconds: float, num_computed_tokens: int) -> int:
        """Most tokens whose `of_chunk` is within `seconds`; 0 if there are none."""
        linear = self.token_s + self.pair_s * (num_computed_tokens + 0.5)
        if seconds <= 0:
            return 0
        if self.pair_s == 0:
            return 1 << 60 if linear == 0 else int(seconds / linear)
        # The positive root of pair_s / 2 n² + linear n = seconds.
        root = math.sqrt(linear**2 + 2 * self.pair_s * seconds)
        return int((root - linear) / self.pair_s)


class TimedChunks:
    """Chunks as large as keep a step within a time, by a model of what steps cost.

    The decodes of the step are paid for first. As the context of a prompt grows, its chunks shrink:
    a token costs a pair with every key before it.
    """

    def __init__(self, cost: StepCost, target_s: float, max_chunk_tokens: int | None) -> None:
        self.cost = cost
        self.target_s = target_s
        self.max_chunk_tokens = max_chunk_tokens
        self.left_s = target_s

    def start_step(self, running: Sequence[Request]) -> None:
        decodes = [
            self.cost.of_decode(r.num_tokens)
            for r in running
            if r.num_tokens - r.num_computed_tokens == 1
        ]
        self.left_s = self.target_s - self.cost.fixed_s - sum(decodes)

    def take(self, num_computed_tokens: int, num_wanted: int) -> int:
        affordable = self.cost.largest_chunk(self.left_s, num_computed_tokens)
        num_tokens = min(
            max(affordable, LEAST_CHUNK), self.max_chunk_tokens or num_wanted, num_wanted
        )
        self.left_s -= self.cost.of_chunk(num_tokens, num_computed_tokens)
        return num_tokens
