"""Conversations become tokens turn by turn: what was encoded for an earlier turn is remembered."""

import json
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

_MAX_CHARACTERS = 1 << 24
"""Of all texts that are remembered; with their tokens some 100 MB at the very most."""
_CHARACTERS_OF_ENTRY = 256
"""What an entry takes beside its text, counted as if it were text."""
_INDEPENDENT = frozenset(
    ("Sequence", "ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit")
)
"""Pre-tokenizers that look at nothing but the text that they are given."""


class PieceEncoder:
    """Encodes a text piece by piece, cut at the tokens that a tokenizer finds before all else.

    Such a token (`<|im_end|>`) stands between the turns of a conversation, and what is on one side
    of it changes no token on the other. So a conversation that comes back with one more question
    costs the new turns and a look-up for each of the others:

        <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n …
                    ~~~~~~~~          ~~             ~~~~~~~~~~~~~~~~ pieces between them

    Threads may share it. Pieces that were used last are kept, `max_characters` of them, and none
    that is longer than an eighth of that.
    """

    def __init__(
        self,
        separators: dict[str, int],
        encode: Callable[[str], list[int]],
        max_characters: int = _MAX_CHARACTERS,
    ) -> None:
        """separators: their ids; encode: the tokens of a text that has none of them."""
        self._separators = separators
        longest_first = sorted(separators, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._encode = encode
        self._max_characters = max_characters
        self._num_characters = 0
        self._known: OrderedDict[tuple[str | None, str], array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, text: str, salt: str | None) -> list[int]:
        """What the tokenizer makes of all of it, without what it puts around a prompt.

        salt: who gives another one learns nothing from the time that this takes.
        """
        token_ids: list[int] = []
        for index, piece in enumerate(self._cut.split(text)):
            if index % 2:
                token_ids.append(self._separators[piece])
            elif piece:
                token_ids.extend(self._tokens_of((salt, piece)))
        return token_ids

    def _tokens_of(self, key: tuple[str | None, str]) -> "array[int]":
        with self._lock:
            found = self._known.get(key)
            if found is not None:
                self._known.move_to_end(key)
                return found
        found = array("I", self._encode(key[1]))
        if _cost(key) <= self._max_characters // 8:
            self._remember(key, found)
        return found

    def _remember(self, key: tuple[str | None, str], token_ids: "array[int]") -> None:
        with self._lock:
            if key not in self._known:
                self._known[key] = token_ids
                self._num_characters += _cost(key)
            while self._num_characters > self._max_characters:
                forgotten, _ = self._known.popitem(last=False)
                self._num_characters -= _cost(forgotten)


def _cost(key: tuple[str | None, str]) -> int:
    return len(key[1]) + _CHARACTERS_OF_ENTRY


def find_separators(backend: Any) -> dict[str, int]:
    """The tokens at which texts of a `tokenizers.Tokenizer` may be cut, with their ids.

    Empty where a piece could depend on what is beside it: if one of these tokens takes spaces
    around it, or counts at the edge of a word only, or if the first piece is treated otherwise.
    """
    if backend.encode_special_tokens:
        return {}
    found = {}
    for token_id, token in backend.get_added_tokens_decoder().items():
        if token.normalized:  # looked for later, within a piece
            continue
        if token.lstrip or token.rstrip or token.single_word or not token.content:
            return {}
        found[token.content] = token_id
    pre_tokenizer = backend.pre_tokenizer
    if pre_tokenizer is not None and not _is_independent(json.loads(pre_tokenizer.__getstate__())):
        return {}
    return found


def _is_independent(pre_tokenizer: dict[str, Any]) -> bool:
    if pre_tokenizer["type"] == "Metaspace":
        return pre_tokenizer.get("prepend_scheme") in ("always", "never")
    parts = pre_tokenizer.get("pretokenizers", ())
    return pre_tokenizer["type"] in _INDEPENDENT and all(map(_is_independent, parts))
