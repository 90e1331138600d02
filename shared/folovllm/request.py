"""What a request is, in every stage: prompt, sampling settings, progress, state."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property

from .setting_checks import (
    checked_bias,
    checked_stop,
    checked_token_ids,
    require_bool,
    require_int,
    require_range,
)


class RequestStatus(Enum):
    """Where a request is in its life; only `FINISHED` is final."""

    WAITING = auto()
    """Not started, or preempted and to be computed again; holds no KV cache."""
    RUNNING = auto()
    SWAPPED = auto()
    """Preempted, with its keys and values in host memory."""
    FINISHED = auto()


class FinishReason(Enum):
    """Why a request ended; the values are those of the OpenAI API."""

    STOP = "stop"
    """An end-of-sequence token, a stop token id or a stop string."""
    LENGTH = "length"
    """`max_tokens` were produced."""
    ABORT = "abort"
    """The client took it back."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when to stop; names and defaults are vLLM's."""

    n: int = 1
    """Completions per prompt; each is a request of its own with its own seed."""
    max_tokens: int | None = 16
    """Most tokens to produce; None means as many as `max_model_len` leaves room for."""
    min_tokens: int = 0
    """No end-of-sequence or stop token is sampled before this many tokens."""
    temperature: float = 1.0
    """0 is greedy. Logits are divided by it after penalties and before the filters below."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 (or -1) keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this (nucleus sampling)."""
    min_p: float = 0.0
    """Drop tokens less likely than this times the likeliest one."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already produced."""
    frequency_penalty: float = 0.0
    """Subtracted from a logit once per time that token was produced."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or output."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids."""
    seed: int | None = None
    """Same seed, same tokens, whatever else is in the batch; None draws from the engine's seed."""
    logprobs: int | None = None
    """Report the chosen token's log-probability and this many of the likeliest."""
    stop: str | Sequence[str] | None = None
    """Text that ends the output; it is cut off unless `include_stop_str_in_output`."""
    stop_token_ids: Sequence[int] | None = None
    """Token ids that end the output, beside the model's own."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Keep going after end-of-sequence tokens; stop strings and ids still count."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text (they stay in the token ids)."""

    def __post_init__(self) -> None:
        require_int("n", self.n, 1)
        if self.max_tokens is not None:
            require_int("max_tokens", self.max_tokens, 1)
        require_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens}); "
                f"lower min_tokens or raise max_tokens"
            )
        require_range("temperature", self.temperature, 0.0, math.inf)
        require_int("top_k", self.top_k, -1)
        require_range("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise ValueError(
                "top_p must be above 0 and at most 1, got 0; use temperature=0 instead"
            )
        require_range("min_p", self.min_p, 0.0, 1.0)
        require_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        require_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        require_range("repetition_penalty", self.repetition_penalty, 0.0, math.inf)
        if self.repetition_penalty == 0.0:
            raise ValueError("repetition_penalty must be above 0 (1 switches it off), got 0")
        if self.seed is not None:
            require_int("seed", self.seed, 0)
        if self.logprobs is not None:
            require_int("logprobs", self.logprobs, 0)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            require_bool(name, getattr(self, name))
        object.__setattr__(self, "stop", checked_stop(self.stop))
        object.__setattr__(
            self, "stop_token_ids", checked_token_ids("stop_token_ids", self.stop_token_ids)
        )
        object.__setattr__(self, "logit_bias", checked_bias(self.logit_bias))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @cached_property
    def has_only_temperature(self) -> bool:
        """Whether tokens follow from logits and temperature alone, and nothing is reported."""
        rules = (self.logit_bias, self.min_tokens, self.min_p)
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1.0)
        return (
            not any(rules)
            and not any(penalties)
            and self.logprobs is None
            and self.top_k <= 0
            and self.top_p == 1.0
        )

    @property
    def needs_output_on_host(self) -> bool:
        """Whether a token cannot be sampled before the ids of those before it are known."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1.0)
        return any(penalties)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        assert isinstance(self.stop, tuple)
        return self.stop


@dataclass(eq=False, kw_only=True)
class Request:
    """One prompt on its way to its output tokens.

    The scheduler of a stage owns the mutable fields. `num_computed_tokens` counts the tokens
    whose keys and values are in the KV cache; `num_tokens - num_computed_tokens` is what is left
    to compute, whether that is a prompt, one new token or a recomputation (there are no phases).
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    """Every end-of-sequence id: of the model, and of its tokenizer where it has one."""
    seed: int = 0
    """Key of this request's random numbers; the n-th output token uses counter n."""
    priority: int = 0
    """Lower runs first under the priority policy."""
    place: tuple[int, int] = (0, 0)
    """(priority, order of arrival) as the scheduler counts them; kept when it has to wait again."""
    fork_of: "Request | None" = None
    """A request with the same prompt, whose computed keys and values this one may share."""
    cache_salt: str | None = None
    """Only requests with the same salt share cached prefixes, those with None among themselves; a
    fork has its parent's. A stage without a prefix cache shares nothing, whatever the salt."""
    is_steered: bool = False
    """Whether its maker looks at every token before there is to be another, as beam search does."""
    arrival_time: float = 0.0
    """Seconds, on the clock of whoever made the request."""
    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None
    """Prompt tokens that a prefix cache had when this request first ran; None before that, in
    stages without one, and for forks, whose prompt was looked up for another request."""
    num_pending_tokens: int = 0
    """Output tokens that a launched step will bring and whose ids the host does not know yet."""
    finish_reason: FinishReason | None = None
    token_ids: list[int] = field(init=False)
    """Prompt and output, in order, as far as the host knows them."""
    num_prompt_tokens: int = field(init=False)
    max_tokens: int = field(init=False)
    stop_token_ids: frozenset[int] = field(init=False)
    """Ids that end this request: the given ones, and the model's unless `ignore_eos`."""

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError(
                f"request {self.request_id} has an empty prompt; give it at least one token "
                f"(for example the model's bos token)"
            )
        if self.sampling_params.max_tokens is None:
            raise ValueError(
                f"request {self.request_id} has max_tokens=None; an engine needs a number "
                f"(LLM.generate fills it in from max_model_len)"
            )
        self.token_ids = list(self.prompt_token_ids)
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.max_tokens = self.sampling_params.max_tokens
        stop = frozenset(self.sampling_params.stop_token_ids or ())
        self.stop_token_ids = stop if self.sampling_params.ignore_eos else stop | self.eos_token_ids

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def needs_output_on_host(self) -> bool:
        """Whether no step may be launched before the ids of the tokens so far are known."""
        return self.is_steered or self.sampling_params.needs_output_on_host

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def append_output_token(self, token_id: int) -> FinishReason | None:
        """Record a sampled token; return the reason if it was the last one.

        Sets `status` and `finish_reason` when it was. A pending token is this one now.
        """
        self.token_ids.append(token_id)
        self.num_pending_tokens = max(self.num_pending_tokens - 1, 0)
        num_output_tokens = len(self.token_ids) - self.num_prompt_tokens
        min_tokens = self.sampling_params.min_tokens
        if token_id in self.stop_token_ids and num_output_tokens > min_tokens:
            self.finish(FinishReason.STOP)
        elif num_output_tokens >= self.max_tokens:
            self.finish(FinishReason.LENGTH)
        return self.finish_reason

    def take_back_output(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens; if one behind them ended the request, it goes on."""
        del self.token_ids[num_tokens:]
        self.status = RequestStatus.WAITING
        self.finish_reason = None

    def finish(self, reason: FinishReason) -> None:
        self.status = RequestStatus.FINISHED
        self.finish_reason = reason
        self.num_pending_tokens = 0  # what is on its way is nobody's
        self.fork_of = None  # or the last beam of a search keeps all its ancestors alive
