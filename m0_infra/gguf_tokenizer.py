"""Builds `tokenizer.json` and `tokenizer_config.json` from the metadata of a GGUF file."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from .gguf_weights import GGUFCheckpoint

CONTROL, USER_DEFINED = 3, 4
"""GGUF token types that are matched whole in a text, before any merging; CONTROL is special."""


def build_tokenizer(checkpoint: GGUFCheckpoint) -> Tokenizer:
    """The byte-level BPE tokenizer that the file describes.

    How a text is cut before merging is named, not stored, in GGUF (`tokenizer.ggml.pre`). It
    matters: `smollm` cuts at every digit first, so that "\\n\\n1" is two newlines in one token and
    then "1", as the model was trained; GPT-2's rule alone would give two newline tokens.
    ValueError for a kind of tokenizer that this function does not know.
    """
    kind, rule = checkpoint.get("tokenizer.ggml.model"), checkpoint.get("tokenizer.ggml.pre")
    if (kind, rule) != ("gpt2", "smollm"):
        raise ValueError(
            f"the GGUF file has a {kind!r} tokenizer that cuts text by the rule {rule!r}; "
            f"only 'gpt2' with the rule 'smollm' can be converted"
        )
    tokens: list[str] = checkpoint.get("tokenizer.ggml.tokens")
    left_right = (merge.split(" ") for merge in checkpoint.get("tokenizer.ggml.merges"))
    merges = [(left, right) for left, right in left_right]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(
                add_prefix_space=bool(checkpoint.find("tokenizer.ggml.add_space_prefix")),
                use_regex=True,
            ),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    whole = [_added_token(*pair) for pair in _whole_tokens(checkpoint).values()]
    tokenizer.add_tokens(whole)
    return tokenizer


def tokenizer_config(checkpoint: GGUFCheckpoint) -> dict[str, Any]:
    """The fields of `tokenizer_config.json`, chat template included."""
    tokens: list[str] = checkpoint.get("tokenizer.ggml.tokens")

    def token(role: str) -> str:
        return tokens[checkpoint.get(f"tokenizer.ggml.{role}_token_id")]

    added = {
        str(token_id): {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": special,
        }
        for token_id, (content, special) in _whole_tokens(checkpoint).items()
    }
    return {
        "add_prefix_space": bool(checkpoint.find("tokenizer.ggml.add_space_prefix")),
        "added_tokens_decoder": added,
        "bos_token": token("bos"),
        "chat_template": checkpoint.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": token("eos"),
        "model_max_length": checkpoint.get("llama.context_length"),
        "pad_token": token("padding"),
        # Not GPT2Tokenizer: that class replaces the rule for cutting text with its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": token("unknown"),
    }


def _whole_tokens(checkpoint: GGUFCheckpoint) -> dict[int, tuple[str, bool]]:
    """Tokens matched whole: {token id: (text, whether it is special)}."""
    tokens = checkpoint.get("tokenizer.ggml.tokens")
    types = checkpoint.get("tokenizer.ggml.token_type")
    return {
        token_id: (token, token_type == CONTROL)
        for token_id, (token, token_type) in enumerate(zip(tokens, types, strict=True))
        if token_type in (CONTROL, USER_DEFINED)
    }


def _added_token(content: str, special: bool) -> AddedToken:
    return AddedToken(content, special=special, normalized=False)
