"""What a scheduler decided in one step and why, and what came of a step: facts for sentences."""

from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple


class Share(NamedTuple):
    """What one request gets of a step."""

    request_id: str
    num_scheduled_tokens: int
    num_computed_tokens: int
    """Before the step, what was found in a cache included."""
    num_tokens: int
    num_prompt_tokens: int

    @property
    def is_last(self) -> bool:
        """Whether nothing is left to compute behind it, so that it brings a token."""
        return self.num_computed_tokens + self.num_scheduled_tokens == self.num_tokens

    @property
    def is_decode(self) -> bool:
        """Whether it is the one token that was sampled last."""
        is_output = self.num_computed_tokens >= self.num_prompt_tokens
        return is_output and self.num_scheduled_tokens == 1 and self.is_last


class Started(NamedTuple):
    """A request that came to run from the queue."""

    request_id: str
    num_found_tokens: int
    """Computed before, for it or for others."""
    parent_id: str | None
    """Whose blocks it shares, if they are those of a request that runs."""


class Refusal(NamedTuple):
    """The KV cache manager had no room."""

    request_id: str
    num_needed: int | None
    """Blocks; None where a request gets one slot."""
    num_spare: int
    """Blocks that must stay free besides."""
    num_free: int | None


class GaveWay(NamedTuple):
    """A running request that lost its blocks."""

    request_id: str
    num_blocks: int
    is_swapped: bool
    refusal: Refusal
    """Of the request that it gave way to, which may be itself."""


class Cause(Enum):
    """Why a request that could run does not."""

    NO_ROOM = auto()
    NO_PLACE = auto()
    """As many run as may."""
    NO_BUDGET = auto()
    """All tokens of the step are given out."""
    TOO_LONG_FOR_BUDGET = auto()
    """What is left to compute does not fit in whole."""
    TOO_LONG_IF_PADDED = auto()
    """It would, if prompts were not padded to the longest."""
    PARENT_STARTS = auto()
    OTHERS_FIRST = auto()
    PREEMPTION = auto()
    """Nobody comes in the step in which somebody had to go."""


class Wait(NamedTuple):
    """A request that waits, and why."""

    request_id: str
    num_tokens: int
    """Left to compute if it started now."""
    is_swapped: bool
    cause: Cause | None
    """None if it gave way in this step, or if no rule that is known here explains it."""
    refusal: Refusal | None = None
    other_id: str | None = None
    """Of PARENT_STARTS and OTHERS_FIRST: whom it waits for."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of a stage's config; None where the stage has no such limit."""

    max_num_batched_tokens: int | None
    max_num_seqs: int | None
    max_chunk_tokens: int | None
    target_step_ms: float | None
    mixes_prompts_and_decodes: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One call of `Scheduler.schedule`."""

    number: int
    """Of the step, counted from 1."""
    limits: Limits
    shares: tuple[Share, ...]
    started: tuple[Started, ...]
    resumed: tuple[str, ...]
    """Ids of requests that came back from host memory."""
    gave_way: tuple[GaveWay, ...]
    resting: tuple[str, ...]
    """Ids of requests that run and get nothing: their last token is on its way, or others start."""
    waits: tuple[Wait, ...]
    """The heads of the queues, in order; those behind them wait because these do."""
    num_waiting: int
    """All of them, the swapped ones included."""


class Ended(NamedTuple):
    """A request whose last token came."""

    request_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One call of `Scheduler.update`."""

    number: int
    """Of the step whose tokens these are."""
    token_ids_of: tuple[str, ...]
    """Ids of the requests that got a token."""
    ended: tuple[Ended, ...]
    num_freed_blocks: int | None
    """None in stages without blocks."""
    num_kept_blocks: int | None
    """Of the freed ones, those that a prefix cache keeps; None in stages without one."""
