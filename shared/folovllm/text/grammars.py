"""Structured outputs: from a schema, a regular expression or a grammar to masks of tokens.

llguidance does the work: it walks through the trie of a tokenizer's tokens along with a parser,
and so finds all tokens that a valid output may go on with, in tens of microseconds.
"""

import json
import logging
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ..request import Request
from ..sampling_params import StructuredOutputsParams
from .tokenizer import Tokenizer

_NUM_REMEMBERED = 64
"""Grammars that a compiler keeps: calls with many prompts, and servers, ask for the same ones."""

_logger = logging.getLogger(__name__)


class Grammar:
    """The state of one request's output in its grammar; implements `TokenGrammar`.

    It reads the request's own tokens, and nothing else says how far the output has come: neither
    a preemption nor a step that broke off can make the two differ.
    """

    def __init__(self, matcher: Any) -> None:
        """matcher: an llguidance.LLMatcher at its start, that nobody else uses."""
        self._matcher = matcher
        self._num_read = 0
        """Output tokens that the matcher has consumed."""

    def fill_mask(self, request: Request, mask: np.ndarray) -> None:
        """See `TokenGrammar`; stop tokens of the request's own count like end-of-sequence ones.

        Where nothing may follow, and yet the output is not complete (the vocabulary has no token
        for what must come, or a limit of llguidance is reached), it ends, with a warning: there is
        no token that could save it.
        """
        self._read(request)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        is_complete = self._matcher.is_accepting()
        words = mask.view(np.uint32)
        ends = [token_id for token_id in request.eos_token_ids if _has(words, token_id)]
        if ends and not is_complete:
            reason = self._matcher.get_error() or "no token can follow"
            first_line = reason.splitlines()[0]
            _logger.warning("%s ends before its grammar does: %s", request.request_id, first_line)
            return
        for token_id in request.sampling_params.stop_token_ids or ():
            bit = np.uint32(1 << (token_id % 32))
            words[token_id // 32] &= ~bit
            if is_complete:
                words[token_id // 32] |= bit

    def fork(self) -> "Grammar":
        """The same grammar for another request, whose output has not begun."""
        matcher = self._matcher.deep_copy()
        matcher.reset()
        return Grammar(matcher)

    def _read(self, request: Request) -> None:
        """Consume the output tokens since the last look, or give those back that were taken."""
        num_output_tokens = len(request.token_ids) - request.num_prompt_tokens
        if num_output_tokens < self._num_read:
            self._matcher.rollback(self._num_read - num_output_tokens)
        else:
            first = request.num_prompt_tokens + self._num_read
            self._matcher.consume_tokens(request.token_ids[first:])
        self._num_read = num_output_tokens


def _has(words: np.ndarray, token_id: int) -> bool:
    return bool(int(words[token_id // 32]) >> (token_id % 32) & 1)


class _Tokens:
    """A vocabulary as `llguidance.TokenizerWrapper` takes it.

    With the bytes that the detokeniser will make of every token, so that what a grammar has seen
    is what the caller gets. A token that ends outputs is no text, also where a model names an
    ordinary one: an output would end in its middle.
    """

    bos_token_id = None

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        self.eos_token_id = min(eos_token_ids)
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self.special_token_ids = sorted(eos_token_ids | tokenizer.special_token_ids)
        self._tokenizer = tokenizer
        special = set(self.special_token_ids)
        self._id_of = {
            token: token_id
            for token_id, token in reversed(list(enumerate(self.tokens)))
            if token and token_id not in special
        }
        self._longest = max(map(len, self._id_of))

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text that a grammar leaves no choice about: the first is the only one then.

        As the tokenizer cuts it, if that adds nothing (a space before the first word) and takes no
        special token; else the longest token that fits, again and again.
        """
        data = text.encode()
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        is_text = all(self._id_of.get(self.tokens[token_id]) == token_id for token_id in ids)
        if is_text and b"".join(self.tokens[token_id] for token_id in ids) == data:
            return ids
        return list(self._cut(data))

    def _cut(self, data: bytes) -> Iterator[int]:
        while data:
            prefixes = (data[:length] for length in range(self._longest, 0, -1))
            longest = next((prefix for prefix in prefixes if prefix in self._id_of), None)
            if longest is None:
                return  # the vocabulary has no token for this byte
            yield self._id_of[longest]
            data = data[len(longest) :]


class GrammarCompiler:
    """Makes grammars for one model's tokens.

    A `Grammar` cannot be sent to another process: compile where the engine is.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        """vocab_size: of the model's logits. Costs nothing before the first `compile`."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._first_matcher = lru_cache(maxsize=_NUM_REMEMBERED)(self._make_matcher)

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """A grammar at its start.

        ValueError if the schema, expression or grammar is none, or asks for what llguidance cannot
        check, and where the model has no tokenizer or no end-of-sequence token; ImportError, which
        says what to install, without llguidance.
        """
        if self._tokenizer is None:
            raise ValueError(
                "structured_outputs is about text, but this model has no tokenizer; name one with "
                "tokenizer=…"
            )
        if not self._eos_token_ids:
            raise ValueError(
                "structured_outputs needs an end-of-sequence token, to end where the output is "
                "complete; name one in the generation_config.json of this model"
            )
        return Grammar(self._first_matcher(*_specification(params))).fork()

    @cached_property
    def _llguidance(self) -> Any:
        try:
            import llguidance
        except ImportError as error:
            raise ImportError(
                "structured_outputs needs the package llguidance; install it, or the extra that "
                "has it: pip install 'folovllm[structured]'"
            ) from error
        return llguidance

    @cached_property
    def _tokens(self) -> Any:
        """The trie of the tokenizer's tokens, which takes a moment to build: once."""
        assert self._tokenizer is not None
        if self._tokenizer.vocab_size > self._vocab_size:
            raise ValueError(
                f"the tokenizer has {self._tokenizer.vocab_size} tokens, but the model only "
                f"{self._vocab_size}: structured_outputs cannot tell which text its tokens are"
            )
        tokens = _Tokens(self._tokenizer, self._vocab_size, self._eos_token_ids)
        wrapper = self._llguidance.TokenizerWrapper(tokens)
        return self._llguidance.LLTokenizer(wrapper, eos_token=sorted(self._eos_token_ids))

    def _make_matcher(self, kind: str, text: str, options: tuple[tuple[str, Any], ...]) -> Any:
        matchers = self._llguidance.LLMatcher
        if kind == "json":
            source = matchers.grammar_from_json_schema(text, overrides=dict(options))
        else:
            source = self._llguidance.grammar_from(kind, text)
        matcher = matchers(self._tokens, source, log_level=0)
        if matcher.is_error():
            raise ValueError(
                f"structured_outputs cannot follow this {kind}: {matcher.get_error().strip()}"
            )
        return matcher


def _specification(params: StructuredOutputsParams) -> tuple[str, str, tuple[tuple[str, Any], ...]]:
    """The kind of grammar, its text, and how llguidance is to read it."""
    options: dict[str, Any] = {"whitespace_flexible": not params.disable_any_whitespace}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    if params.json is not None:
        return "json", str(params.json), tuple(options.items())
    if params.json_object:
        return "json", '{"type": "object"}', tuple(options.items())
    if params.regex is not None:
        return "regex", params.regex, ()
    if params.choice is not None:
        texts = (json.dumps(text, ensure_ascii=False) for text in params.choice)
        return "lark", f"start: {' | '.join(texts)}", ()
    return "grammar", params.grammar or "", ()
