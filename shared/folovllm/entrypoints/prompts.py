"""The forms in which a prompt may be given, turned into token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias, TypeGuard

from ..text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A prompt in the form that an engine takes."""

    text: str | None
    """None if it was given as token ids."""
    token_ids: list[int]
    cache_salt: str | None = None
    """Who gives the same salt shares cached prefixes; None: everybody who gives none."""


PromptInput: TypeAlias = str | Sequence[int] | Mapping[str, Any] | Prompt
"""Text, token ids, `{"prompt": text}`, `{"prompt_token_ids": ids}`, or what `render_chat` made.

Beside "prompt" or "prompt_token_ids" may stand "cache_salt" (vLLM's name): only prompts with the
same salt share cached prefixes, so that nobody learns from the time to a first token what others
asked. In stages without a prefix cache nothing is shared, and a salt changes nothing."""

_FORMS = (
    'text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}, the last two with '
    'or without "cache_salt": text'
)


def split_prompts(prompts: PromptInput | Sequence[PromptInput]) -> list[PromptInput]:
    """One prompt or several, as a list; a flat list of whole numbers is one prompt."""
    if isinstance(prompts, str | Mapping | Prompt) or (_is_token_ids(prompts) and prompts):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise ValueError(f"a prompt is {_FORMS}, got {type(prompts).__name__}: {prompts!r}")
    return list(prompts)  # type: ignore[arg-type]


def parse_prompt(
    prompt: PromptInput, index: int, tokenizer: Tokenizer | None, vocab_size: int
) -> Prompt:
    """Token ids of one prompt; ValueError, naming its index, if it cannot be one."""
    text, token_ids = _take_apart(prompt, index)
    if text is not None:
        if tokenizer is None:
            raise ValueError(
                f"prompt {index} is text, but this model has no tokenizer; "
                f"give token ids, or name one with tokenizer=…"
            )
        token_ids = tokenizer.encode(text)
    if not token_ids:
        raise ValueError(f"prompt {index} has no tokens; an engine needs at least one")
    if isinstance(prompt, Prompt):
        check_token_ids(f"prompt {index}", token_ids, vocab_size)
        return prompt
    token_ids = list(map(int, token_ids))
    check_token_ids(f"prompt {index}", token_ids, vocab_size)
    cache_salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
    return Prompt(text, token_ids, cache_salt)


def check_token_ids(what: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """ValueError naming the first id that is outside the model's vocabulary."""
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise ValueError(
            f"{what} holds token id {wrong}, but this model's ids are 0 to {vocab_size - 1}"
        )


def _take_apart(prompt: PromptInput, index: int) -> tuple[str | None, Sequence[int]]:
    """The text or the token ids of a prompt; the other is None or empty."""
    if isinstance(prompt, Prompt):
        return None, prompt.token_ids
    if isinstance(prompt, Mapping):
        salt = prompt.get("cache_salt")
        if not (salt is None or (isinstance(salt, str) and salt)):
            raise ValueError(
                f"cache_salt of prompt {index} must be a text, not empty, got {salt!r}"
            )
        form = set(prompt) - {"cache_salt"}
        if form == {"prompt"} and isinstance(prompt["prompt"], str):
            return prompt["prompt"], []
        if form == {"prompt_token_ids"} and _is_token_ids(prompt["prompt_token_ids"]):
            return None, prompt["prompt_token_ids"]
    elif isinstance(prompt, str):
        return prompt, []
    elif _is_token_ids(prompt):
        return None, prompt
    raise ValueError(f"prompt {index} must be {_FORMS}, got {prompt!r}")


def _is_token_ids(value: object) -> TypeGuard[Sequence[int]]:
    """Also of an empty list: that it has no tokens is said later.

    Looks at each type once, not at each id: prompts have tens of thousands of them.
    """
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(
            issubclass(item_type, Integral) and not issubclass(item_type, bool)
            for item_type in set(map(type, value))
        )
    )
