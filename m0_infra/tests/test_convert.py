"""A converted GGUF file is the model and the tokenizer that went into it."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from m0_infra.tests.conftest import write_metadata

gguf = pytest.importorskip("gguf")

convert_gguf = pytest.importorskip("m0_infra.convert").convert_gguf


@pytest.fixture(scope="module")
def tokenizer(converted):
    return AutoTokenizer.from_pretrained(converted)


def test_transformers_loads_the_weights_that_were_stored(converted, tiny_model):
    loaded = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    stored = tiny_model.state_dict()
    assert loaded.state_dict().keys() == stored.keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, stored[name]), name


def test_loaded_model_computes_the_same_logits(converted, tiny_model):
    # Also proves what weights cannot show: rope base, norm epsilon, head counts.
    loaded = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()
    token_ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(token_ids).logits, tiny_model(token_ids).logits)


def test_weights_are_stored_in_bfloat16_without_the_tied_projection(converted):
    with safe_open(converted / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (not a dict)
        assert file.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16


def test_end_token_of_generation_config_is_the_file_s(converted):
    loaded = AutoModelForCausalLM.from_pretrained(converted)
    assert (loaded.config.bos_token_id, loaded.generation_config.eos_token_id) == (1, 2)


@pytest.mark.parametrize(
    "text", ["hello world", "naïve 日本 🙂", "a  b\n\n c 12", "<|im_start|>he<|im_end|>\n"]
)
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_merges_apply_and_control_tokens_stay_whole(tokenizer):
    found = tokenizer.convert_ids_to_tokens(tokenizer("<|im_start|>he w")["input_ids"])
    assert found == ["<|im_start|>", "he", "Ġw"]


def test_text_is_cut_at_digits_before_merging(tokenizer):
    # GPT-2's rule alone would keep the last newline with what follows it.
    found = tokenizer.convert_ids_to_tokens(tokenizer("\n\n12")["input_ids"])
    assert found == ["ĊĊ", "1", "2"]


def test_chat_template_and_special_tokens_are_kept(tokenizer):
    text = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
    assert text == "<|im_start|>he<|im_end|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""


def write_gguf(path, tokens, architecture="llama", rule="smollm", extra=None):
    writer = gguf.GGUFWriter(path, architecture)
    write_metadata(writer, tokens, rule)
    if extra:
        writer.add_tensor(extra, torch.zeros(2, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "gemma"}, "'gemma'"),
        ({"rule": "deepseek"}, "'deepseek'"),
        ({"extra": "blk.0.mystery.weight"}, r"missing tensors.*blk\.1\.ffn_up.*blk\.0\.mystery"),
    ],
)
def test_file_that_is_not_understood_is_refused_by_name(tmp_path, tokens, settings, message):
    path = write_gguf(tmp_path / "other.gguf", tokens, **settings)
    with pytest.raises(ValueError, match=message):
        convert_gguf(path, tmp_path)


def test_file_that_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "not.gguf"
    path.write_bytes(b"no magic here" * 10)
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        convert_gguf(path, tmp_path)
