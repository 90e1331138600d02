"""What a request is, in every stage: prompt, progress, state."""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from .sampling_params import SamplingParams, StructuredOutputsParams

if TYPE_CHECKING:
    from .interfaces import TokenGrammar, TokenLogprobs

__all__ = ["FinishReason", "Request", "RequestStatus", "SamplingParams", "StructuredOutputsParams"]


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
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    """`SamplingParams.bad_words`: the last token of each is not sampled behind the others."""
    grammar: "TokenGrammar | None" = None
    """`SamplingParams.structured_outputs` for the tokens of a model; no other request has it."""
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
    prompt_logprobs: "list[TokenLogprobs]" = field(init=False, default_factory=list)
    """Of the prompt's tokens but the first, as far as they are known: complete when the first
    output token is. None of them is lost or doubled when the prompt is computed again."""
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
        if self.sampling_params.bad_words and not self.bad_words_token_ids:
            raise ValueError(
                f"request {self.request_id} has bad_words, which are text; an engine needs them as "
                f"bad_words_token_ids (LLM.generate fills them in from the tokenizer)"
            )
        if self.sampling_params.structured_outputs is not None and self.grammar is None:
            raise ValueError(
                f"request {self.request_id} has structured_outputs; an engine needs them compiled, "
                f"as `grammar` (LLM.generate does it, with a GrammarCompiler)"
            )
        if self.fork_of is not None and self.sampling_params.prompt_logprobs is not None:
            raise ValueError(
                f"request {self.request_id} shares the prompt of {self.fork_of.request_id}, which "
                f"it does not compute; ask that one for prompt_logprobs"
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
        has_long_bad_words = any(len(word) > 1 for word in self.bad_words_token_ids)
        is_ruled = self.sampling_params.needs_output_on_host or has_long_bad_words
        return self.is_steered or is_ruled

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether all of the prompt has to be computed, for the sake of its log-probabilities."""
        is_complete = len(self.prompt_logprobs) >= self.num_prompt_tokens - 1
        return self.sampling_params.prompt_logprobs is not None and not is_complete

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
