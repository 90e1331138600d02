"""A head at fewer bits, beside an embedding as it is."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from folovllm.model.loader import load_model
from folovllm.model.weights import load_file
from folovllm.request import SamplingParams
from folovllm.testing.toy_models import ToyFamily, write_toy_model
from m7_gptq.gptq import QuantizationConfig
from m7_gptq.llm import LLM
from m7_gptq.packing import V1, V2
from m7_gptq.quantize_model import Job, dequantize_checkpoint, quantize_checkpoint
from m7_gptq.quantized_linear import (
    QuantizedLinear,
    WrittenOutProduct,
    linears_of,
    random_linears_of,
)

VOCAB_SIZE = 192
CPU = torch.device("cpu")


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (6, 32), generator=torch.Generator().manual_seed(0))


def toy(folder: Path, *, is_tied: bool) -> Path:
    shape = {"vocab_size": VOCAB_SIZE, "tie_word_embeddings": is_tied}
    return write_toy_model(ToyFamily("toy", "qwen3", {"head_dim": 16, **shape}), folder)


def quantised(source: Path, target: Path, **options) -> Path:
    job = Job(
        source=source,
        target=target,
        config=QuantizationConfig(group_size=32, **options),
        checkpoint_format=V1 if options.get("sym", True) else V2,
        quantize_lm_head=True,
        device=CPU,
        dtype=torch.float32,
    )
    quantize_checkpoint(job, tokens(), lambda report: None)
    return target


def answer(model: Path) -> list[int]:
    llm = LLM(model, dtype="float32", device="cpu", max_model_len=64, kv_cache_bytes=1 << 22)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"desc_act": True}, {"sym": False, "bits": 8}])
def test_model_answers_like_the_checkpoint_it_stands_for(tmp_path, is_tied, options) -> None:
    source = toy(tmp_path / "s", is_tied=is_tied)
    folder = quantised(source, tmp_path / "q", **options)
    dequantize_checkpoint(folder, tmp_path / "d", torch.float32)
    assert answer(folder) == answer(tmp_path / "d")
    model = load_model(folder, dtype="float32", device="cpu", linears=linears_of)
    plain = load_model(tmp_path / "d", dtype="float32", device="cpu")
    original = load_model(source, dtype="float32", device="cpu")
    assert isinstance(model.lm_head, QuantizedLinear)
    assert not model.config.tie_word_embeddings
    assert not plain.config.tie_word_embeddings
    assert model.num_parameters == plain.num_parameters
    assert torch.equal(model.embed_tokens, original.embed_tokens), "kept as it was"
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    logits, out = model.compute_logits(hidden), torch.empty(3, VOCAB_SIZE)
    assert model.compute_logits(hidden, out) is out
    assert torch.equal(out, logits)
    torch.testing.assert_close(logits, plain.compute_logits(hidden), atol=1e-4, rtol=0)
    error = (logits - original.compute_logits(hidden)).norm() / logits.norm()
    assert 0 < error < 0.15


def test_names_are_those_of_other_programs(tmp_path) -> None:
    folder = quantised(toy(tmp_path / "s", is_tied=True), tmp_path / "q")
    names = {name for name in load_file(folder / "rest.safetensors") if "layers" not in name}
    assert names == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.qweight",
        "lm_head.qzeros",
        "lm_head.scales",
        "lm_head.g_idx",
    }
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["lm_head"] is True
    assert config["tie_word_embeddings"] is False


def test_random_weights_have_the_head_that_the_config_names(tmp_path) -> None:
    folder = quantised(toy(tmp_path / "s", is_tied=True), tmp_path / "q")
    shutil.rmtree(tmp_path / "s")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model = load_model(folder, load_format="dummy", device="cpu", linears=random_linears_of)
    assert isinstance(model.lm_head, QuantizedLinear)
    product = model.lm_head.product
    assert isinstance(product, WrittenOutProduct)
    weight = product.weight
    assert weight.shape == (VOCAB_SIZE, 64)
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_tied_config_with_a_quantised_head_has_two_tables(tmp_path) -> None:
    folder = quantised(toy(tmp_path / "s", is_tied=True), tmp_path / "q")
    expected = answer(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert answer(folder) == expected


def test_vocabulary_that_does_not_fill_words_is_refused_before_any_layer_is_quantised(
    tmp_path,
) -> None:
    source = write_toy_model(ToyFamily("toy", "qwen3", {"head_dim": 16}), tmp_path / "s")
    with pytest.raises(ValueError, match=r"199 outputs, .* quantise without quantize_lm_head"):
        quantised(source, tmp_path / "q")
    assert not (tmp_path / "q").exists()
