"""How tokens are chosen and when they end: the settings of a request, under vLLM's names."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .setting_checks import (
    checked_bias,
    checked_texts,
    checked_token_ids,
    is_int,
    require_bool,
    require_int,
    require_range,
)

_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object")
_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What the whole output must be, in exactly one of five ways; names are vLLM's."""

    json: str | Mapping[str, Any] | None = None
    """A JSON schema that it follows, as an object or as text."""
    regex: str | None = None
    """A regular expression (of Rust's `regex`) that matches all of it."""
    choice: Sequence[str] | None = None
    """Texts of which it is one."""
    grammar: str | None = None
    """A context-free grammar in Lark's form or in GBNF."""
    json_object: bool | None = None
    """True: any JSON object."""
    disable_any_whitespace: bool = False
    """No white space between the parts of JSON, where a model could go on for ever."""
    whitespace_pattern: str | None = None
    """A regular expression of the white space that JSON may have instead of any."""

    def __post_init__(self) -> None:
        given = [name for name in _CONSTRAINTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs needs exactly one of {', '.join(_CONSTRAINTS)}, got "
                f"{' and '.join(given) or 'none'}"
            )
        for name in ("regex", "grammar", "whitespace_pattern"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} must be a text, got {getattr(self, name)!r}")
        if self.json_object not in (None, True):
            raise ValueError(f"json_object can only be True, got {self.json_object!r}; leave it")
        require_bool("disable_any_whitespace", self.disable_any_whitespace)
        is_json = self.json is not None or self.json_object is not None
        if (self.disable_any_whitespace or self.whitespace_pattern is not None) and not is_json:
            raise ValueError(
                f"disable_any_whitespace and whitespace_pattern concern JSON alone, but {given[0]} "
                f"is given; say it there"
            )
        if self.choice is not None:
            choice = checked_texts("choice", self.choice)
            if not choice or isinstance(self.choice, str):
                raise ValueError(f"choice must be a list of at least one text, got {self.choice!r}")
            object.__setattr__(self, "choice", choice)
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))


def _schema_text(schema: str | Mapping[str, Any]) -> str:
    """A JSON schema as text; ValueError if it is none."""
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        if isinstance(parsed, Mapping | bool):
            return json.dumps(parsed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"json must be a JSON schema, got {schema!r} ({error})") from error
    raise ValueError(f"json must be a JSON schema, which is an object, got {schema!r}")


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
    prompt_logprobs: int | None = None
    """The same for every token of the prompt but the first."""
    allowed_token_ids: Sequence[int] | None = None
    """Nothing else is sampled, end-of-sequence tokens neither; None allows all."""
    bad_words: Sequence[str] | None = None
    """Texts that are not produced, with or without a space before them: the token that would
    complete one is forbidden. Another way to cut the same text into tokens is not."""
    stop: str | Sequence[str] | None = None
    """Text that ends the output; it is cut off unless `include_stop_str_in_output`."""
    stop_token_ids: Sequence[int] | None = None
    """Token ids that end the output, beside the model's own."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Keep going after end-of-sequence tokens; stop strings and ids still count."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text (they stay in the token ids)."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the whole output must be. It ends where that is complete, and nowhere before but at
    `max_tokens`. Needs llguidance: `pip install folovllm[structured]`."""
    detokenize: bool = True
    """False makes no text of the output: neither of its tokens nor in log-probabilities."""
    truncate_prompt_tokens: int | None = None
    """Use only so many tokens at the end of a longer prompt; -1: what leaves room for `max_tokens`
    (for one token, if that is None) within `max_model_len`. None refuses a prompt too long."""

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
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), 0)
        for name in _FLAGS:
            require_bool(name, getattr(self, name))
        self._check_truncation()
        for name, value in self._lists_in_one_form().items():
            object.__setattr__(self, name, value)
        self._check_structure()
        if self.stop and not self.detokenize:
            raise ValueError(
                f"stop strings {self.stop} are searched for in the text, which detokenize=False "
                f"does not make; use stop_token_ids, or leave detokenize as it is"
            )

    def _check_structure(self) -> None:
        """Refuse what would cut a structured output off, or leave it without any next token."""
        structure = self.structured_outputs
        if not isinstance(structure, StructuredOutputsParams | None):
            raise ValueError(
                f"structured_outputs must be StructuredOutputsParams(json=…) or the like, got "
                f"{structure!r}"
            )
        if structure is None:
            return
        for name in ("allowed_token_ids", "bad_words", "stop", "min_tokens", "ignore_eos"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is against structured_outputs, whose text "
                    f"says which tokens are possible and where it ends; leave {name} out"
                )

    def _check_truncation(self) -> None:
        limit = self.truncate_prompt_tokens
        if limit is not None and (not is_int(limit) or limit == 0 or limit < -1):
            raise ValueError(
                f"truncate_prompt_tokens must be a whole number of at least 1, or -1 for what "
                f"max_model_len leaves room for, got {limit!r}"
            )

    def _lists_in_one_form(self) -> dict[str, Any]:
        allowed = self.allowed_token_ids
        if allowed is not None:
            allowed = checked_token_ids("allowed_token_ids", allowed)
            if not allowed:
                raise ValueError(
                    "allowed_token_ids is empty: no token could be sampled; name some, or leave it "
                    "None to allow all"
                )
        return {
            "stop": checked_texts("stop", self.stop),
            "stop_token_ids": checked_token_ids("stop_token_ids", self.stop_token_ids),
            "allowed_token_ids": allowed,
            "bad_words": checked_texts("bad_words", self.bad_words),
            "logit_bias": checked_bias(self.logit_bias),
        }

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @cached_property
    def has_only_temperature(self) -> bool:
        """Whether tokens follow from logits and temperature alone, and nothing is reported."""
        rules = (self.logit_bias, self.min_tokens, self.min_p, self.bad_words)
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1.0)
        return (
            not any(rules)
            and not any(penalties)
            and self.logprobs is None
            and self.allowed_token_ids is None
            and self.structured_outputs is None
            and self.top_k <= 0
            and self.top_p == 1.0
        )

    @property
    def needs_output_on_host(self) -> bool:
        """Whether a token cannot be sampled before the ids of those before it are known."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1.0)
        return any(penalties) or self.structured_outputs is not None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        assert isinstance(self.stop, tuple)
        return self.stop
