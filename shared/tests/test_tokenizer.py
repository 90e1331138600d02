"""Tokenizer: encoding, decoding, chat templates, the bytes of single tokens."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer, save_metaspace_tokenizer
from folovllm.text.chat import ChatOptions
from folovllm.text.tokenizer import Tokenizer

TEXT = "Hello 世界 😀 สวัสดี, the  dog\n naïve ฬ"
MODEL = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return Tokenizer(save_byte_level_tokenizer(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory):
    return Tokenizer(save_metaspace_tokenizer(tmp_path_factory.mktemp("metaspace")))


def test_text_survives_encoding_and_decoding(byte_level, metaspace):
    assert byte_level.decode(byte_level.encode(TEXT)) == TEXT
    assert metaspace.decode(metaspace.encode(TEXT)) == TEXT


def test_other_threads_run_while_a_long_text_is_encoded(byte_level):
    encoding = threading.Thread(target=byte_level.encode, args=(TEXT * 20_000,))
    encoding.start()
    num_turns = 0
    while encoding.is_alive():  # for a third of a second at least
        time.sleep(0.001)
        num_turns += 1
    assert num_turns > 20


def test_special_tokens_are_left_out_of_text_only_when_asked(byte_level):
    (eos,) = byte_level.eos_token_ids
    ids = [*byte_level.encode("dog"), eos]
    assert byte_level.decode(ids) == "dog"
    assert byte_level.decode(ids, skip_special_tokens=False) == "dog<eos>"
    assert byte_level.special_token_ids == {0, 1}


def test_byte_level_token_bytes_join_to_the_text(byte_level):
    ids = byte_level.encode(TEXT)
    assert b"".join(map(byte_level.token_bytes, ids)) == TEXT.encode()
    assert len(ids) > len(TEXT) // 2
    assert byte_level.first_token_bytes(ids[0]) == byte_level.token_bytes(ids[0])


def test_metaspace_token_bytes_keep_the_space_that_decode_drops(metaspace):
    ids = metaspace.encode(TEXT)
    assert b"".join(map(metaspace.token_bytes, ids)) == b" " + TEXT.encode()
    (space_dog,) = metaspace.encode("dog")[:1]
    assert metaspace.token_bytes(space_dog)[:1] == b" "
    assert metaspace.first_token_bytes(space_dog) == metaspace.token_bytes(space_dog)[1:]


def test_byte_fallback_token_is_one_byte(metaspace):
    ids = metaspace.encode("🦊")  # not in the vocabulary
    assert [metaspace.token_bytes(i) for i in ids[-4:]] == [b"\xf0", b"\x9f", b"\xa6", b"\x8a"]


def test_added_token_outside_the_byte_alphabet_is_plain_text(tmp_path):
    from tokenizers import Tokenizer as Backend

    path = save_byte_level_tokenizer(tmp_path) / "tokenizer.json"
    backend = Backend.from_file(str(path))
    backend.add_tokens(["｜begin of▁text｜"])
    backend.save(str(path))
    tokenizer = Tokenizer(tmp_path)
    (token_id,) = tokenizer.encode("｜begin of▁text｜")
    assert tokenizer.token_bytes(token_id).decode() == "｜begin of▁text｜"


def test_unknown_ids_are_no_text(byte_level, metaspace):
    for tokenizer in (byte_level, metaspace):
        assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == b""
        assert tokenizer.decode([tokenizer.vocab_size + 7]) == ""


def test_tokenizer_without_decoder_separates_words(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    backend = Backend(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.decode([0, 1]) == "a b"
    assert tokenizer.token_bytes(1) == b" b"
    assert tokenizer.first_token_bytes(1) == b"b"
    assert tokenizer.eos_token_ids == frozenset()


def test_half_a_character_as_token_text_is_a_replacement_character(byte_level):
    half = next(i for i in byte_level.encode("😀") if b"\xf0" in byte_level.token_bytes(i))
    assert "\ufffd" in byte_level.token_text(half) or byte_level.token_text(half) == "😀"
    assert byte_level.token_text(byte_level.encode("a")[0]) == "a"


def test_chat_template_gives_ids_and_opens_the_assistants_turn(byte_level):
    messages = [{"role": "user", "content": "dog"}]
    ids = byte_level.apply_chat_template(messages)
    assert byte_level.decode(ids) == "user: dog\nassistant: "
    closed = byte_level.apply_chat_template(messages, ChatOptions(add_generation_prompt=False))
    assert byte_level.decode(closed) == "user: dog\n"


def test_missing_chat_template_is_refused(tmp_path):
    tokenizer = Tokenizer(save_byte_level_tokenizer(tmp_path, chat_template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "dog"}])


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ({"role": "user", "content": "x"}, "non-empty list"),
        ([{"content": "x"}], "message 0 needs a string under 'role'"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], "message 1 .* 'content'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "part 0 of the 'content' of message 0"),
        (["hello"], "message 0"),
    ],
)
def test_malformed_conversation_is_refused(byte_level, messages, match):
    with pytest.raises(ValueError, match=match):
        byte_level.apply_chat_template(messages)


def test_refusal_of_the_template_itself_is_a_value_error(tmp_path):
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = Tokenizer(save_byte_level_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(ValueError, match="roles must alternate"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_failure_of_the_template_names_it(tmp_path):
    template = "{{ messages[0]['content'] + 1 }}"
    tokenizer = Tokenizer(save_byte_level_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(ValueError, match=r"chat template of .* fails on .* \(TypeError: "):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_template_that_makes_nothing_of_a_conversation_is_named(tmp_path):
    tokenizer = Tokenizer(save_byte_level_tokenizer(tmp_path, chat_template="{# nothing #}"))
    with pytest.raises(ValueError, match=r"chat template of .* makes '' of this conversation"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


# Settings of the files ----------------------------------------------------------------------------


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def template_with_bos_and_eos(path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    backend = Backend.from_file(str(path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    backend.save(str(path / "tokenizer.json"))


def saved_after_a_batch(path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["Hello"], truncation=True, max_length=8, padding="max_length")
    tokenizer.save_pretrained(path)
    assert json.loads((path / "tokenizer.json").read_text())["truncation"]["max_length"] == 8


def set_in_config(**values):
    return lambda path: change_json(path / "tokenizer_config.json", **values)


def with_normalizer(path):
    change_json(path / "tokenizer.json", normalizer={"type": "Lowercase"})


def with_added_token(path):
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(path / "tokenizer.json"))
    backend.add_tokens([AddedToken("lazy", lstrip=True, rstrip=True)])
    backend.save(str(path / "tokenizer.json"))


@pytest.mark.parametrize(
    "change",
    [
        saved_after_a_batch,
        template_with_bos_and_eos,
        with_normalizer,
        with_added_token,
        set_in_config(add_bos_token=True),
        set_in_config(add_eos_token=True),
        set_in_config(add_bos_token=True, add_eos_token=True),
        set_in_config(add_prefix_space=True),
        set_in_config(split_special_tokens=True),
        set_in_config(model_max_length=4),
        set_in_config(truncation_side="left", padding_side="left", pad_token="<eos>"),
        set_in_config(legacy=True),
        set_in_config(clean_up_tokenization_spaces=True),
        set_in_config(extra_special_tokens=["dog"]),
    ],
)
@pytest.mark.parametrize("save", [save_byte_level_tokenizer, save_metaspace_tokenizer])
def test_every_setting_that_changes_ids_reads_as_in_transformers(tmp_path, save, change):
    from transformers import AutoTokenizer

    change(save(tmp_path))
    ours, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hi", TEXT, "the quick <eos> brown fox, the lazy dog " * 4, ""):
        for special in (True, False):
            expected = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special) == expected
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": "the lazy dog"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.apply_chat_template(messages) == expected


def test_truncation_and_padding_of_a_saved_batch_do_not_change_a_prompt(tmp_path):
    before = Tokenizer(save_byte_level_tokenizer(tmp_path)).encode("the lazy dog sleeps")
    saved_after_a_batch(tmp_path)
    after = Tokenizer(tmp_path)
    assert len(before) > 8
    assert after.encode("the lazy dog sleeps") == before
    assert len(after.encode("e")) == 1
    from_file = Tokenizer(tmp_path / "tokenizer.json")
    assert from_file.encode("the lazy dog sleeps") == before


def test_dropout_of_merges_is_refused_by_name(tmp_path):
    path = save_byte_level_tokenizer(tmp_path) / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    change_json(path, model={**model, "dropout": 0.5})
    with pytest.raises(ValueError, match=r"has a dropout of 0\.5"):
        Tokenizer(tmp_path)


def test_missing_or_broken_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        Tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no such file"):
        Tokenizer(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="cannot load a tokenizer"):
        Tokenizer(tmp_path)
    broken = tmp_path / "tokenizer.json"
    broken.write_text(json.dumps({"model": 1}))
    with pytest.raises(ValueError, match="cannot load a tokenizer"):
        Tokenizer(broken)


def test_tokenizer_with_no_plain_word_names_itself(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    backend = Backend(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="no token that is a plain word"):
        Tokenizer(tmp_path / "tokenizer.json").token_bytes(0)


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, folovllm; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.skipif(not MODEL.is_dir(), reason="the embedded model is not fetched")
def test_embedded_model_formats_a_conversation_as_it_was_trained():
    tokenizer = Tokenizer(MODEL)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi 世界"}])
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nHi 世界<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.vocab_size == 49152
