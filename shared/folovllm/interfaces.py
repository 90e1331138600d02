"""The seams between the shared package and a stage: what an engine is, and what a step returns."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .request import FinishReason, Request

if TYPE_CHECKING:  # the bookkeeping that uses this file runs where torch is not installed
    import numpy as np
    import torch


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one output position, of the model's distribution before sampling rules.

    `top` holds the likeliest tokens first, as (token_id, logprob).
    """

    logprob: float
    """Of the token that was chosen."""
    rank: int
    """Of the token that was chosen; 1 is the likeliest."""
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class SamplerOutput:
    """What sampling returned to the host: one token per row, in the order of the requests."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    """None for requests that did not ask."""


class TokenOutput(NamedTuple):
    """One new token of one request."""

    request_id: str
    token_id: int
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What one step did, for logs, charts and tests.

    The state is that at the end of the forward pass, before finished requests leave.
    """

    num_scheduled_tokens: int
    """Tokens that went through the model in this step."""
    num_scheduled_requests: int
    num_running: int
    """Requests holding KV cache."""
    num_waiting: int
    num_preemptions: int
    """Requests that had to give up their place on the device in this step."""
    num_swapped_tokens: int = 0
    """Tokens' worth of cache that moved between device and host memory in this step."""
    num_kv_tokens_live: int
    """Tokens whose keys and values the cache holds for unfinished requests."""
    num_kv_tokens_reserved: int
    """Tokens that the memory held by those requests has room for."""
    num_kv_tokens_capacity: int
    """Tokens that the whole cache has room for."""
    num_free_blocks: int | None = None
    """None, like the next one, in stages whose cache is not cut into blocks."""
    num_used_blocks: int | None = None
    """A block that requests share counts once."""
    num_cached_blocks: int | None = None
    """Blocks that a prefix cache finds; None, like those below, in stages without one."""
    num_idle_blocks: int | None = None
    """Cached blocks that nobody holds: they are part of `num_free_blocks`."""
    num_evicted_blocks: int | None = None
    """Cached blocks that were given up in this step to make room."""
    num_prompt_tokens_looked_up: int | None = None
    """Of requests that ran for the first time in this step."""
    num_prompt_tokens_found: int | None = None


@dataclass(frozen=True)
class StepOutput:
    """The result of `Engine.step`: at most one token per scheduled request."""

    tokens: tuple[TokenOutput, ...]
    stats: StepStats


class Engine(Protocol):
    """What every stage's LLMEngine offers; LLM, the CLI and the benchmarks use nothing else."""

    def add_request(self, request: Request) -> None:
        """Queue a request; ValueError if it can never run (names the limit) or its id is in use."""

    def abort_request(self, request_id: str) -> None:
        """Drop a request in any state and free what it holds; an unknown id is ignored."""

    def has_unfinished_requests(self) -> bool: ...

    def step(self) -> StepOutput:
        """Run one forward pass over whatever is scheduled."""


class TokenGrammar(Protocol):
    """Which tokens the output of one request may go on with."""

    def fill_mask(self, request: Request, mask: "np.ndarray") -> None:
        """Write which tokens may follow the request's output so far.

        mask: [ceil(vocab_size / 32)] int32, contiguous; bit b of word w stands for token
        32 * w + b. At least one is set, and a stop token's only where the output may end.
        """


class AttendFn(Protocol):
    """The one seam between the model and a stage: attention over that stage's KV cache."""

    def __call__(
        self, layer_idx: int, q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor"
    ) -> "torch.Tensor":
        """Store k and v, attend, return one row per query.

        q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim]; result
        like q. The last dimension is contiguous, rows may be strided.
        """
