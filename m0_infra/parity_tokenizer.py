"""Prompts as token ids: by Transformers' tokenizer, and whether ours makes the same of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from folovllm.text.tokenizer import Tokenizer


def encode_prompts(directory: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids by Transformers' tokenizer, as a user's turn where there is a chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    has_template = tokenizer.chat_template is not None
    return [
        _encode_turn(tokenizer, text) if has_template else _encode_text(tokenizer, text)
        for text in texts
    ]


def compare_encodings(
    tokenizer: Tokenizer, directory: Path, texts: Sequence[str]
) -> list[str | None]:
    """Per text, where our ids differ from those of Transformers' tokenizer; None if they agree.

    Compared is the text as it is, and as a user's turn where there is a chat template.
    """
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(directory)
    return [_compare_encoding(tokenizer, reference, text) for text in texts]


def _compare_encoding(tokenizer: Tokenizer, reference: Any, text: str) -> str | None:
    forms = [("text", tokenizer.encode(text), _encode_text(reference, text))]
    if reference.chat_template is not None:
        turn = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        forms.append(("user's turn", turn, _encode_turn(reference, text)))
    for form, ours, theirs in forms:
        if ours != theirs:
            pairs = zip(ours, theirs, strict=False)
            first = next(
                (i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, (ours, theirs)))
            )
            return (
                f"as {form} the prompt is {len(ours)} ids, not {len(theirs)}, and differs from "
                f"id {first} on"
            )
    return None


def _encode_text(reference: Any, text: str) -> list[int]:
    ids: list[int] = reference(text)["input_ids"]
    return ids


def _encode_turn(reference: Any, text: str) -> list[int]:
    rendered = reference.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    ids: list[int] = reference(rendered, add_special_tokens=False)["input_ids"]
    return ids
