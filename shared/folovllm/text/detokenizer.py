"""Turns a request's tokens into text as they come, and finds the stop strings in it."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from ..request import SamplingParams
from .tokenizer import Tokenizer


class _Match(NamedTuple):
    """A stop string at `[start, end)` of the searched text."""

    end: int
    start: int
    stop: str


class IncrementalDetokenizer:
    """Text of one request, token by token, at constant cost per token.

    Tokens are turned into bytes, and bytes into text by an incremental UTF-8 decoder, which keeps
    the bytes of an unfinished character to itself: no half character is ever handed out, and
    nothing is decoded twice. (The usual way decodes a window of tokens again and again and
    compares the texts; it has to guess whether a U+FFFD at the end is final.)

    While there are stop strings, the last `max(len(stop)) - 1` characters are held back: they may
    be the beginning of one. What a stop string does to the text does not depend on how the text
    was cut into tokens: the one that is complete first wins, and of those that are complete at the
    same character the longest.

        stop="FG", tokens "AB" "CDEF" "GHI":  append gives "A", "BCDE", ""; stop_reason "FG"
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped_ids: frozenset[int] = (
            tokenizer.special_token_ids if sampling_params.skip_special_tokens else frozenset()
        )
        self._stops = sampling_params.stop_strings
        self._include_stop = sampling_params.include_stop_str_in_output
        self._min_tokens = sampling_params.min_tokens
        self._num_lookback = max(map(len, self._stops), default=1) - 1
        self._num_tokens = 0
        self._recent = ""
        """The last characters: what is held back, and what a stop string may have begun in."""
        self._num_emitted = 0
        """How many characters of `_recent` were handed out already."""
        self._stop_reason: str | None = None
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._prompt_tail = self._unfinished_character(prompt_token_ids)
        self._starts_text = self._skipped_ids.issuperset(prompt_token_ids)
        self._whole_characters = tokenizer.whole_characters
        self._is_between_characters = not (self._starts_text or self._prompt_tail)
        """Whether what a token adds depends on the token alone."""

    @property
    def stop_reason(self) -> str | None:
        """The stop string that ended the text; None while there is none."""
        return self._stop_reason

    def append(self, token_id: int) -> str:
        """Take one more token; return the text that is certain now, "" if there is none yet.

        The token that completes a stop string sets `stop_reason`; text behind the stop string is
        dropped. RuntimeError for a token after that.
        """
        if self._stop_reason is not None:
            raise RuntimeError(
                f"token {token_id} comes after the stop string {self._stop_reason!r}; "
                f"the request should have been aborted"
            )
        self._num_tokens += 1
        text = self._decode(token_id)
        return self._search_and_emit(text) if text else ""

    def extend(self, token_ids: Sequence[int]) -> str:
        """Take several tokens; the same text as from `append`, one after the other.

        For requests without stop strings, whose text nobody needs before the end, or not after
        every token. RuntimeError where there are stop strings: only `append` can tell which token
        ends a request.
        """
        if self._stops:
            raise RuntimeError(f"tokens are searched for {self._stops} one at a time: use append")
        if len(token_ids) == 1:
            return self._decode(token_ids[0])
        shown = (token_id for token_id in token_ids if token_id not in self._skipped_ids)
        pieces = []
        if self._starts_text or self._prompt_tail:
            for token_id in shown:
                pieces.append(self._next_bytes(token_id))
                if not (self._starts_text or self._prompt_tail):
                    break
        pieces += map(self._tokenizer.token_bytes, shown)
        return self._decode_bytes(b"".join(pieces))

    def _decode(self, token_id: int) -> str:
        if token_id in self._skipped_ids:
            return ""
        if self._is_between_characters:  # nearly always
            text = self._whole_characters[token_id]
            if text is not None:
                return text
        if self._starts_text or self._prompt_tail:
            return self._decode_bytes(self._next_bytes(token_id))
        return self._decode_bytes(self._tokenizer.token_bytes(token_id))

    def _decode_bytes(self, data: bytes) -> str:
        text = self._utf8.decode(data)
        waits_for_more = self._starts_text or self._prompt_tail or self._utf8.getstate()[0]
        self._is_between_characters = not waits_for_more
        return text

    def finish(self) -> str:
        """Return what was held back; a character that stayed unfinished becomes U+FFFD.

        For the end of a request. The flushed U+FFFD is not searched for stop strings: it is no
        text of the model.
        """
        text = self._recent[self._num_emitted :]
        if self._stop_reason is None:
            text += self._utf8.decode(b"", final=True)
        self._recent, self._num_emitted = "", 0
        return text

    def _next_bytes(self, token_id: int) -> bytes:
        """Bytes of the token, joined to a character that the prompt began, if it goes on."""
        if self._starts_text:
            token_bytes = self._tokenizer.first_token_bytes(token_id)
        else:
            token_bytes = self._tokenizer.token_bytes(token_id)
        if not token_bytes:
            return b""
        self._starts_text = False
        tail, self._prompt_tail = self._prompt_tail, b""
        if tail and not self._is_unfinished_or_whole(tail + token_bytes[:1]):
            # The prompt's half character stays broken. It was never part of this output.
            return token_bytes
        return tail + token_bytes

    @staticmethod
    def _is_unfinished_or_whole(data: bytes) -> bool:
        decoder = codecs.getincrementaldecoder("utf-8")("strict")
        try:
            decoder.decode(data)
        except UnicodeDecodeError:
            return False
        return True

    def _unfinished_character(self, prompt_token_ids: Sequence[int]) -> bytes:
        """The bytes (at most 3) of a character that the prompt begins and does not finish."""
        tail = b""
        for token_id in reversed(prompt_token_ids):
            tail = self._tokenizer.token_bytes(token_id) + tail
            if len(tail) >= 3:
                break
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(tail)
        return decoder.getstate()[0]

    def _search_and_emit(self, text: str) -> str:
        num_searched = len(self._recent)
        recent = self._recent + text
        if self._num_tokens > self._min_tokens:
            match = self._first_stop(recent, num_searched)
            if match is not None:
                self._stop_reason = match.stop
                end = match.end if self._include_stop else match.start
                emitted = recent[self._num_emitted : end]
                self._recent, self._num_emitted = "", 0
                return emitted
        num_kept = min(len(recent), self._num_lookback)
        # A stop string that stays in the output need not be held back, only remembered.
        end = len(recent) if self._include_stop else len(recent) - num_kept
        emitted = recent[self._num_emitted : end]
        self._recent = recent[len(recent) - num_kept :]
        self._num_emitted = end - (len(recent) - num_kept)
        return emitted

    def _first_stop(self, text: str, num_searched: int) -> _Match | None:
        """The stop string that ends first among those that end behind `num_searched`."""
        matches = []
        for stop in self._stops:
            start = text.find(stop, max(0, num_searched - len(stop) + 1))
            if start >= 0:
                matches.append(_Match(start + len(stop), start, stop))
        return min(matches, default=None)
