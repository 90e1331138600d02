"""Small real tokenizers of the two common kinds, trained on the spot; nothing is downloaded."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS_TOKEN = "<eos>"
BOS_TOKEN = "<bos>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
_CORPUS = (
    "Hello world, the quick brown fox jumps over the lazy dog. The dog does not care at all.",
    "你好世界，今天天气很好。 สวัสดีชาวโลก ยินดีต้อนรับ 😀 👩‍👩‍👧‍👦 naïve café Ünïcödé",
    "def stop(text):\n    return text.find('STOP') >= 0\n",
)


def save_byte_level_tokenizer(path: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A byte-level BPE tokenizer (as Llama 3 and Qwen have) in `path`; returns `path`.

    Most characters beyond ASCII are spread over several tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return _save(tokenizer, path, chat_template)


def save_metaspace_tokenizer(path: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A tokenizer like sentencepiece's (as Llama 2 has) in `path`; returns `path`.

    Words carry their leading space, unknown characters fall back to one token per byte.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<unk>", BOS_TOKEN, EOS_TOKEN, *byte_tokens],
        limit_alphabet=80,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    # The trainer only takes them as special; a byte token is part of the text.
    tokenizer.add_tokens([AddedToken(token, special=False) for token in byte_tokens])
    return _save(tokenizer, path, chat_template)


def _save(tokenizer: Tokenizer, path: Path, chat_template: str | None) -> Path:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS_TOKEN, eos_token=EOS_TOKEN
    )
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(str(path))
    return path
