"""A conversation in pieces has the tokens of the whole, and is remembered within bounds."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer, save_metaspace_tokenizer
from folovllm.text.chat import ChatOptions
from folovllm.text.pieces import PieceEncoder, find_separators
from folovllm.text.tokenizer import Tokenizer

MODEL = Path("models/SmolLM2-135M-Instruct")


def like_qwen():
    """NFC, a regular expression, bytes, and marks that are added but not special."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the quick brown fox e\u0301 " * 9], trainer)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|im_end|>|"])
    backend.add_tokens(
        [AddedToken("<think>", normalized=False), AddedToken("fox", normalized=True)]
    )
    return backend


@pytest.fixture(scope="module")
def backends(tmp_path_factory):
    saved = {
        "byte_level": save_byte_level_tokenizer(tmp_path_factory.mktemp("byte_level")),
        "metaspace": save_metaspace_tokenizer(tmp_path_factory.mktemp("metaspace")),
    }
    if MODEL.is_dir():
        saved["embedded"] = MODEL
    found = {name: Tokenizer(path)._backend for name, path in saved.items()}
    return {**found, "like_qwen": like_qwen()}


def whole(backend, text):
    return backend.encode(text, add_special_tokens=False).ids


def in_pieces(backend, **options):
    return PieceEncoder(find_separators(backend), lambda text: whole(backend, text), **options)


@settings(derandomize=True, deadline=None)
@given(data=st.data())
def test_pieces_have_the_tokens_of_the_whole(backends, data):
    name = data.draw(st.sampled_from(["byte_level", "embedded", "like_qwen"]))
    if name not in backends:
        return
    backend = backends[name]
    marks = [*find_separators(backend), "<|im", "|>", "\n", " ", "fox", "e\u0301", "\u0301", "界"]
    parts = st.lists(st.sampled_from(marks) | st.text(max_size=6), max_size=12)
    encoder = in_pieces(backend)
    for text in ("".join(data.draw(parts)) for _ in range(2)):
        for _ in range(2):
            assert encoder.encode(text, None) == whole(backend, text)


def test_texts_are_cut_only_where_pieces_are_independent(backends):
    assert {"<|im_start|>", "<think>"} <= set(find_separators(backends["like_qwen"]))
    assert "fox" not in find_separators(backends["like_qwen"])
    for flags in ({"rstrip": True}, {"lstrip": True}, {"single_word": True}):
        backend = like_qwen()
        backend.add_special_tokens([AddedToken("<mark>", normalized=False, **flags)])
        assert find_separators(backend) == {}
    backend = like_qwen()
    for scheme, are_found in (("first", False), ("never", True), ("always", True)):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        assert bool(find_separators(backend)) == are_found, scheme
        if are_found:
            text = "a b<|im_start|>c d<|im_end|> e"
            assert in_pieces(backend).encode(text, None) == whole(backend, text)
    backend = like_qwen()
    backend.encode_special_tokens = True
    assert find_separators(backend) == {}


class Counting:
    def __init__(self):
        self.asked = []

    def encode(self, text):
        self.asked.append(text)
        return [len(text)]


def test_earlier_turns_are_encoded_once_for_everybody_with_the_same_salt():
    counting = Counting()
    encoder = PieceEncoder({"|": 7}, counting.encode)
    assert encoder.encode("ab|c", None) == [2, 7, 1]
    assert encoder.encode("ab|c|d", None) == [2, 7, 1, 7, 1]
    assert counting.asked == ["ab", "c", "d"]
    encoder.encode("ab", "salt")
    encoder.encode("ab", "salt")
    assert counting.asked == ["ab", "c", "d", "ab"]


def test_what_was_not_used_for_longest_is_forgotten_and_giants_are_not_kept():
    counting = Counting()
    encoder = PieceEncoder({"|": 7}, counting.encode, max_characters=8 * 300)
    texts = [str(number).rjust(40) for number in range(8)]  # 296 each
    encoder.encode("|".join(texts), None)
    encoder.encode(texts[0], None)
    encoder.encode("x" * 40, None)  # in place of texts[1]
    encoder.encode("y" * 100, None)  # more than an eighth of all
    del counting.asked[:]
    encoder.encode("|".join([texts[0], *texts[2:], "x" * 40]), None)
    assert counting.asked == []
    encoder.encode(f"{texts[1]}|{'y' * 100}", None)
    assert counting.asked == [texts[1], "y" * 100]


def test_conversations_are_encoded_in_pieces(tmp_path):
    tokenizer = Tokenizer(save_byte_level_tokenizer(tmp_path))
    mark = next(iter(find_separators(tokenizer._backend)))
    template = "{% for m in messages %}" + mark + "{{ m['content'] }}{% endfor %}" + mark
    options = ChatOptions(chat_template=template)
    messages = [{"role": "user", "content": "Hello 世界"}, {"role": "assistant", "content": "Hi"}]
    for salt in (None, None, "salt"):
        ids = tokenizer.apply_chat_template(messages, options, salt)
        text = f"{mark}Hello 世界{mark}Hi{mark}"
        assert ids == tokenizer.encode(text, add_special_tokens=False)
    with pytest.raises(ValueError, match="no valid Unicode"):
        tokenizer.apply_chat_template([{"role": "user", "content": "\ud800"}], options)
