"""Texts that must not be produced, as the tokens in which they would be."""

from collections.abc import Sequence

from .tokenizer import Tokenizer


def encode_bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token ids of every word as it stands at the start of a text and behind a space.

    The latter counts where the space is part of a token of the word, and not one of its own. (vLLM
    also wants both to have the same number of tokens, and lets the word through where they differ.)
    ValueError for a word without tokens.
    """
    encoded: list[tuple[int, ...]] = []
    for word in words:
        text = word.lstrip()
        at_start = tuple(tokenizer.encode(text, add_special_tokens=False))
        if not at_start:
            raise ValueError(f"bad_words holds {word!r}, which has no tokens; leave it out")
        behind_space = tuple(tokenizer.encode(" " + text, add_special_tokens=False))
        encoded.append(at_start)
        if behind_space[-len(at_start) :] != at_start:
            encoded.append(behind_space)
    return tuple(dict.fromkeys(encoded))
