"""The fields of every call, as OpenAI and vLLM name them; whatever is not here is refused."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ...sampling_params import SamplingParams
from ...text.chat import ChatOptions
from .errors import ApiError
from .settings import ServerSettings

Count = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
Seed = Annotated[int, Field(ge=0, lt=1 << 62)]

_TAKEN_OVER = (
    "n", "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "seed", "stop", "stop_token_ids",
    "allowed_token_ids", "bad_words", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens",
    "truncate_prompt_tokens", "prompt_logprobs",
)  # fmt: skip
"""Fields that SamplingParams has under the same name."""


class Body(BaseModel):
    """Strict: no number written as text, no field that nobody knows."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Usage so far in every chunk; vLLM's."""


class GenerationBody(Body):
    """What completions and chat have in common. None, and left out, is the server's default."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: float | None = None
    top_k: Count | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Count] | None = None
    allowed_token_ids: list[Count] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: Count | None = None
    prompt_logprobs: Count | None = None
    priority: Count | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    return_token_ids: bool | None = None
    # What changes no answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @property
    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    def sampling_params(self, defaults: SamplingParams, settings: ServerSettings) -> SamplingParams:
        """The fields that were given, over the defaults; ValueError or ApiError names one."""
        self._check_limits(settings)
        given = {name: value for name in _TAKEN_OVER if (value := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            given["logit_bias"] = _with_token_ids(self.logit_bias)
        given["logprobs"] = self.num_logprobs
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError(400, "prompt_logprobs are not streamed", param="prompt_logprobs")
        values = {name: getattr(defaults, name) for name in SamplingParams.__dataclass_fields__}
        return SamplingParams(**{**values, **given})

    def _check_limits(self, settings: ServerSettings) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        for name, number, limit in (
            ("n", self.n or 1, settings.max_n),
            ("stop", len(stop), settings.max_stop_strings),
            ("bad_words", len(self.bad_words or ()), settings.max_stop_strings),
            (self.logprobs_field, self.num_logprobs or 0, settings.max_logprobs),
            ("prompt_logprobs", self.prompt_logprobs or 0, settings.max_logprobs),
        ):
            if number > limit:
                raise ApiError(400, f"{name}: {number} is above this server's {limit}", param=name)
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options without stream=true has no effect", param="stream_options"
            )

    @property
    def logprobs_field(self) -> str:
        return "logprobs"


class CompletionBody(GenerationBody):
    """Of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Count | None = None
    add_special_tokens: bool | None = None
    best_of: Count | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def sampling_params(self, defaults: SamplingParams, settings: ServerSettings) -> SamplingParams:
        params = super().sampling_params(defaults, settings)
        if self.best_of is not None and self.best_of != params.n:
            raise ApiError(
                400, f"best_of ({self.best_of}) other than n ({params.n}) is not supported",
                param="best_of",
            )  # fmt: skip
        if self.echo and self.logprobs is not None:
            raise ApiError(
                400, "echo with logprobs is not supported; ask for prompt_logprobs", param="echo"
            )
        return params


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: str


class ConversationBody(Body):
    """What makes a prompt of messages."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None

    def chat_options(self) -> ChatOptions:
        """A template of the client's own is no option: it is a program."""
        if self.tool_choice not in (None, "none", "auto"):
            raise ApiError(
                400, 'tool_choice must be "auto" or "none": nothing makes a model call a tool here',
                param="tool_choice",
            )  # fmt: skip
        return ChatOptions(
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            chat_template_kwargs=self.chat_template_kwargs,
            tools=None if self.tool_choice == "none" else self.tools,
        )


class ChatBody(ConversationBody, GenerationBody):
    """Of /v1/chat/completions."""

    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    response_format: ResponseFormat | None = None
    parallel_tool_calls: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def logprobs_field(self) -> str:
        return "top_logprobs"

    def sampling_params(self, defaults: SamplingParams, settings: ServerSettings) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        if self.response_format is not None and self.response_format.type != "text":
            raise ApiError(
                400, f"response_format of type {self.response_format.type!r} is not supported",
                param="response_format",
            )  # fmt: skip
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ApiError(
                    400, "max_tokens and max_completion_tokens differ", param="max_tokens"
                )
            self.max_tokens = self.max_completion_tokens
        return super().sampling_params(defaults, settings)


class TokenizeBody(Body):
    """Of /tokenize, for a text."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class TokenizeChatBody(ConversationBody):
    """Of /tokenize, for a conversation."""

    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """Of /detokenize."""

    tokens: list[Count]


def _with_token_ids(biases: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token_id): bias for token_id, bias in biases.items()}
    except ValueError:
        raise ApiError(
            400, "logit_bias must map token ids to numbers", param="logit_bias"
        ) from None
