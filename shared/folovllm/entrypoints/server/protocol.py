"""The fields of every call, as OpenAI and vLLM name them; whatever is not here is refused."""

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...sampling_params import SamplingParams, StructuredOutputsParams
from ...text.chat import ChatOptions
from .errors import ApiError
from .settings import ServerSettings

Count = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
Seed = Annotated[int, Field(ge=0, lt=1 << 62)]

_TAKEN_OVER = frozenset((
    "n", "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "seed", "stop", "stop_token_ids",
    "allowed_token_ids", "bad_words", "include_stop_str_in_output", "ignore_eos",
    "skip_special_tokens", "truncate_prompt_tokens", "prompt_logprobs",
))  # fmt: skip
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


class StructuredOutputs(BaseModel):
    """vLLM's field, with the names of `StructuredOutputsParams`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None
    """Always is it followed to the letter."""


class ResponseFormat(BaseModel):
    """OpenAI's field."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def structured_outputs(self) -> StructuredOutputsParams | None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ApiError(
                400, 'response_format has a json_schema with type "json_schema", and only then',
                param="response_format",
            )  # fmt: skip
        if self.json_schema is not None:
            return StructuredOutputsParams(json=self.json_schema.schema_)
        return StructuredOutputsParams(json_object=True) if self.type == "json_object" else None


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
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    priority: Count | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    return_token_ids: bool | None = None
    # What changes no answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    prompt_field: ClassVar[str]
    """The field that the prompt is made of."""

    @property
    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    def sampling_params(self, defaults: SamplingParams, settings: ServerSettings) -> SamplingParams:
        """The fields that were given, over the defaults; ValueError or ApiError names one."""
        self._check_limits(settings)
        given = self._given()
        if self.logit_bias is not None:
            given["logit_bias"] = _with_token_ids(self.logit_bias)
        given["logprobs"] = self.num_logprobs
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError(400, "prompt_logprobs are not streamed", param="prompt_logprobs")
        given["structured_outputs"] = self._structure()
        return replace(defaults, **given)

    def _given(self) -> dict[str, Any]:
        """Fields of SamplingParams that have the same name here, as far as they were given."""
        names = _TAKEN_OVER & self.model_fields_set
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _structure(self) -> StructuredOutputsParams | None:
        wanted = None
        if self.response_format is not None:
            wanted = self.response_format.structured_outputs()
        if self.structured_outputs is None:
            return wanted
        if wanted is not None:
            raise ApiError(
                400, "give structured_outputs or response_format, not both",
                param="structured_outputs",
            )  # fmt: skip
        return StructuredOutputsParams(**self.structured_outputs.model_dump(by_alias=True))

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

    prompt_field = "prompt"

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
        if not self.echo or self.logprobs is None:
            return params
        if self.prompt_logprobs not in (None, self.logprobs):
            raise ApiError(
                400,
                f"echo with logprobs ({self.logprobs}) tells as many of the prompt; leave out "
                f"prompt_logprobs ({self.prompt_logprobs}), or give the same number",
                param="prompt_logprobs",
            )
        return replace(params, prompt_logprobs=self.logprobs)

    @property
    def echoes_only(self) -> bool:
        """Whether the prompt is all that is wanted; an engine always makes one token."""
        return bool(self.echo) and self.max_tokens == 0

    def _given(self) -> dict[str, Any]:
        given = super()._given()
        return {**given, "max_tokens": 1} if self.echoes_only else given


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

    prompt_field = "messages"

    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
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
