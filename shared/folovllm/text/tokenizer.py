"""Text to token ids and back: a thin wrapper over a Hugging Face tokenizer."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from .chat import (
    DEFAULT_OPTIONS,
    ChatOptions,
    Message,
    TemplateTraits,
    check_options,
    normalise_messages,
)
from .pieces import PieceEncoder, find_separators

_BYTE_FALLBACK_LEN = len("<0x00>")


class Tokenizer:
    """Encodes prompts, decodes outputs, and knows which bytes every single token stands for.

    The last part is what incremental detokenisation needs. `decode` of a whole list is not a sum
    over its tokens: a character may be spread over several tokens, and sentencepiece-like
    tokenizers drop the space before the first word. `token_bytes` is additive instead: joined
    over the tokens of an output it gives the UTF-8 bytes that follow the text of the prompt.
    """

    def __init__(self, path: str | Path) -> None:
        """Load from a model directory, a `tokenizer.json` file or a Hub id; never runs remote code.

        Every setting of the files holds that says how one text becomes ids (bos and eos, added
        tokens, normalisation); truncation and padding, which a file may have kept from a batch,
        do not, and no length limit does: an engine refuses what is too long. Raises ValueError
        if there is no usable tokenizer. transformers is imported here and not
        with the module: it takes a second that bookkeeping and its tests need not pay.
        """
        self.path = str(path)
        self._hf = self._load(self.path)
        self._backend = self._hf.backend_tokenizer
        # How a batch was cut and filled up when the tokenizer was saved is no part of a prompt.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._refuse_dropout()
        self._token_bytes: dict[int, bytes] = {}
        self.whole_characters: Mapping[int, str | None] = _WholeCharacters(self.token_bytes)
        """Any token's id -> its text after other text, None if it holds part of a character."""
        self._traits: dict[str, TemplateTraits] = {}

    @staticmethod
    def _load(path: str) -> Any:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        try:
            if path.endswith(".json"):
                if not Path(path).is_file():
                    raise ValueError("there is no such file")
                tokenizer = PreTrainedTokenizerFast(tokenizer_file=path)
            elif Path(path).is_absolute() and not Path(path).is_dir():
                raise ValueError("there is no such directory")
            else:
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # transformers and tokenizers raise bare Exception among others
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"cannot load a tokenizer from {path!r}: {reason}; give a directory with "
                f"tokenizer.json, such a file, or the id of a model on the Hub"
            ) from error
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise ValueError(
                f"the tokenizer of {path!r} ({type(tokenizer).__name__}) has no tokenizer.json; "
                f"only tokenizers of the `tokenizers` library are supported"
            )
        return tokenizer

    def _refuse_dropout(self) -> None:
        """ValueError where merges are left out at random, as some do in training."""
        dropout = getattr(self._backend.model, "dropout", None)
        if dropout:
            raise ValueError(
                f"the tokenizer of {self.path!r} has a dropout of {dropout}: it would encode the "
                f"same text differently every time; set it to null in tokenizer.json"
            )

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens with their added ones; a model's logits may be padded beyond it."""
        return len(self._hf)

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """The end-of-sequence id of the tokenizer's own settings; empty if there is none."""
        eos = self._hf.eos_token_id
        return frozenset() if eos is None else frozenset((eos,))

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """What `skip_special_tokens` leaves out of the text."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @property
    def has_chat_template(self) -> bool:
        return self._hf.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with what the tokenizer puts around every prompt (bos).

        add_special_tokens: False for a text that has them already, as a chat template writes it.
        ValueError if it holds half a surrogate pair, which stands for no character.
        """
        _check_unicode(text)
        # This call takes a third less time than `encode`, which also notes where each token stands,
        # and other threads run meanwhile: a server that reads a long prompt goes on streaming.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, unknown ids nothing.

        Spaces are not cleaned up afterwards (`clean_up_tokenization_spaces`): what a clean-up
        removes depends on the text that follows, so that no stream could reproduce it.
        """
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        options: ChatOptions = DEFAULT_OPTIONS,
        cache_salt: str | None = None,
    ) -> list[int]:
        """Token ids of a conversation in the format that the model was trained on.

        cache_salt: only calls with the same one share what was encoded for earlier turns.

        ValueError if there is no template, a message is malformed, the template does not look at
        one of the options, refuses the conversation, fails on it or makes nothing of it.
        """
        if not self.has_chat_template and options.chat_template is None:
            raise ValueError(
                f"the tokenizer of {self.path!r} has no chat template: it belongs to a base "
                f"model; use generate with plain text, an instruct model, or give a chat_template"
            )
        text = self._render(messages, options)
        token_ids = self._encode_conversation(text, cache_salt)
        if not token_ids:
            raise ValueError(
                f"the chat template of {self.path!r} makes {text!r} of this conversation, which "
                f"has no tokens; correct the template, or give generate a prompt of your own"
            )
        return token_ids

    def _encode_conversation(self, text: str, cache_salt: str | None) -> list[int]:
        """As `encode`, without special tokens: the template has written them."""
        if self._pieces is None:
            return self.encode(text, add_special_tokens=False)
        _check_unicode(text)
        return self._pieces.encode(text, cache_salt)

    @cached_property
    def _pieces(self) -> PieceEncoder | None:
        separators = find_separators(self._backend)
        if not separators:
            return None
        return PieceEncoder(separators, partial(self.encode, add_special_tokens=False))

    def _render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        template, traits = self._find_template(options)
        check_options(options, traits, repr(self.path))
        content_format = options.chat_template_content_format
        if content_format == "auto":
            content_format = "openai" if traits.loops_over_content else "string"
        normalised = normalise_messages(messages, content_format)
        try:
            text: str = self._hf.apply_chat_template(
                normalised,
                tools=[dict(tool) for tool in options.tools] if options.tools else None,
                chat_template=template,
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
                tokenize=False,
                **(options.chat_template_kwargs or {}),
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise self._template_error(error) from error
        return text

    def _find_template(self, options: ChatOptions) -> tuple[str, TemplateTraits]:
        """The template that these options choose; what the tokenizer's own read is remembered."""
        try:
            template: str = self._hf.get_chat_template(options.chat_template, options.tools or None)
            traits = self._traits.get(template) or TemplateTraits.of(template)
        except Exception as error:  # of several none is the default, or it is no template
            raise self._template_error(error) from error
        if options.chat_template is None:
            self._traits[template] = traits
        return template, traits

    def _template_error(self, error: Exception) -> ValueError:
        from jinja2 import TemplateError

        if isinstance(error, TemplateError):
            return ValueError(
                f"the chat template of {self.path!r} refuses this conversation: {error}"
            )
        return ValueError(
            f"the chat template of {self.path!r} fails on this conversation "
            f"({type(error).__name__}: {error}); correct the template"
        )

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token adds after other text; part of a character is possible.

        Unknown ids add nothing. Special tokens give their own text: leaving them out is up to
        the caller. Remembered per token, since a stream asks for the same few again and again.
        """
        found = self._token_bytes.get(token_id)
        if found is None:
            found = self._token_bytes[token_id] = self._compute_token_bytes(token_id)
        return found

    def first_token_bytes(self, token_id: int) -> bytes:
        """As `token_bytes`, where no text stands before: without the space of a first word."""
        token_bytes = self.token_bytes(token_id)
        if self._is_byte_level or token_bytes[:1] != b" ":
            return token_bytes
        return self.decode([token_id], skip_special_tokens=False).encode()

    def token_text(self, token_id: int) -> str:
        """A single token as text after other text; part of a character becomes U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def _compute_token_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return self._byte_level_bytes(token)
        if (
            "ByteFallback" in self._decoder_types
            and len(token) == _BYTE_FALLBACK_LEN
            and token.startswith("<0x")
        ):
            return bytes.fromhex(token[3:5])
        # Every other decoder works on whole characters, so the difference that the token makes
        # after some other token is its text, with the space that would be cut off at the start.
        before = self.decode([self._anchor_id], skip_special_tokens=False)
        both = self.decode([self._anchor_id, token_id], skip_special_tokens=False)
        return both[len(before) :].encode()

    def _byte_level_bytes(self, token: str) -> bytes:
        """Undo GPT-2's byte alphabet; a token with other characters was added as plain text."""
        try:
            return bytes(self._byte_of_character[character] for character in token)
        except KeyError:
            return token.encode()

    @cached_property
    def _decoder_types(self) -> frozenset[str]:
        """Names of the steps that the tokenizer's decoder is made of."""
        decoder = self._backend.decoder
        if decoder is None:
            return frozenset()
        state = json.loads(decoder.__getstate__())
        return frozenset(part["type"] for part in state.get("decoders", [state]))

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in self._decoder_types

    @cached_property
    def _byte_of_character(self) -> dict[str, int]:
        """GPT-2's alphabet: printable bytes stand for themselves, the others from U+0100 on."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in set(printable)]
        alphabet = {chr(byte): byte for byte in printable}
        return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}

    @cached_property
    def _anchor_id(self) -> int:
        """Some token that is plain text: what stands before a token when its text is asked."""
        special = self.special_token_ids
        for token, token_id in sorted(self._backend.get_vocab().items(), key=lambda item: item[1]):
            if token_id in special or token.startswith("<0x"):
                continue
            if self.decode([token_id]).isalnum():
                return int(token_id)
        raise ValueError(f"the tokenizer of {self.path!r} has no token that is a plain word")


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is no valid Unicode: it holds {text[error.start]!r} at index "
            f"{error.start}; read it with the encoding that it was written in"
        ) from error


class _WholeCharacters(dict[int, str | None]):
    """Fills itself when it is asked, so that what a stream asks again and again is a look-up."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        super().__init__()
        self._token_bytes_of = token_bytes

    def __missing__(self, token_id: int) -> str | None:
        try:
            text: str | None = self._token_bytes_of(token_id).decode()
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text
