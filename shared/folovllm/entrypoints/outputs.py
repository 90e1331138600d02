"""What a caller gets back: the completions of one prompt, with vLLM's field names."""

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # interfaces imports torch; importing results must stay cheap
    from ..interfaces import TokenLogprobs
    from ..text.tokenizer import Tokenizer


class Logprob(NamedTuple):
    """One token's log-probability at one position, before sampling rules."""

    logprob: float
    rank: int
    """1 is the likeliest token of the position."""
    decoded_token: str | None
    """None without a tokenizer."""


class RequestOutputKind(Enum):
    """What one after another of a request's outputs holds; names are vLLM's."""

    CUMULATIVE = auto()
    """All so far, every time."""
    DELTA = auto()
    """What is new since the output before: text, token ids, log-probabilities."""
    FINAL_ONLY = auto()
    """One output, when the request is finished."""


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a prompt, finished or as far as it has come; or, as a delta, a part."""

    index: int
    """Which of the prompt's `n` completions this is."""
    text: str
    token_ids: list[int]
    """With the token that ended the output: an end-of-sequence token or a stop string's last."""
    cumulative_logprob: float | None = None
    """Sum over the tokens; None unless `logprobs` were asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    """Per output token: the chosen token first, then the likeliest ones in order."""
    finish_reason: str | None = None
    """"stop", "length" or "abort"; None while the request runs."""
    stop_reason: int | str | None = None
    """The stop string or stop token id; None for an end-of-sequence token and other reasons."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestMetrics:
    """When things happened, in seconds on the clock of `time.perf_counter`."""

    arrival_time: float
    first_token_time: float | None
    last_token_time: float | None

    @property
    def ttft_s(self) -> float | None:
        """First token - arrival; None before there is one."""
        if self.first_token_time is None:
            return None
        return self.first_token_time - self.arrival_time


@dataclass(frozen=True)
class RequestOutput:
    """All completions of one prompt."""

    request_id: str
    prompt: str | None
    """None if the prompt was given as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    """True when every completion is."""
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    """Of the prompt: those that were found in a prefix cache and not computed."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """Per prompt token: itself first, then the likeliest ones in its place; None for the first
    token, before which there is nothing. None unless asked for, and before there is an output."""


def make_logprobs(
    position: "TokenLogprobs", token_id: int, tokenizer: "Tokenizer | None"
) -> dict[int, Logprob]:
    """vLLM's shape of an engine's logprobs: {token_id: Logprob}, the chosen token first."""

    def text(some_token_id: int) -> str | None:
        return None if tokenizer is None else tokenizer.token_text(some_token_id)

    logprobs = {token_id: Logprob(position.logprob, position.rank, text(token_id))}
    for rank, (top_token_id, logprob) in enumerate(position.top, start=1):
        if top_token_id != token_id:
            logprobs[top_token_id] = Logprob(logprob, rank, text(top_token_id))
    return logprobs
