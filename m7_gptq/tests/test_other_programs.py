"""Checkpoints that GPTQModel and AutoGPTQ wrote, against what those programs computed with them.

docs/dev/trials/m7_fixtures.py made the fixtures; each says in its config.json how it is quantised.
"""

import shutil
from pathlib import Path

import pytest
import torch

from folovllm.interfaces import AttendFn
from folovllm.model.loader import load_model
from folovllm.model.weights import load_file, save_safetensors
from folovllm.request import SamplingParams
from m7_gptq.llm import LLM
from m7_gptq.quantized_linear import linears_of

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
PROMPT_LEN = 10
TOLERANCE = 1e-4
"""Of logits up to 40, float32 on both sides; the largest difference is 2.5e-5."""


def attend_causally(model) -> AttendFn:
    """Attention over one whole sequence."""
    groups = model.config.num_heads // model.config.num_kv_heads

    def attend(layer_idx, q, k, v):
        q, k, v = (
            x.transpose(0, 1) for x in (q, *(x.repeat_interleave(groups, dim=1) for x in (k, v)))
        )
        result = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return result.transpose(0, 1)

    return attend


def logits_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = load_model(folder, dtype="float32", device="cpu", linears=linears_of)
    hidden = model(tokens, torch.arange(len(tokens)), attend_causally(model))
    return model.compute_logits(hidden)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_program_that_wrote_the_checkpoint(name) -> None:
    reference = load_file(FIXTURES / name / "reference.safetensors")
    logits = logits_of(FIXTURES / name, reference["tokens"])
    torch.testing.assert_close(logits, reference["logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_program_that_wrote_the_checkpoint(name) -> None:
    tokens = load_file(FIXTURES / name / "reference.safetensors")["tokens"].tolist()
    llm = LLM(
        FIXTURES / name,
        dtype="float32",
        device="cpu",
        max_model_len=64,
        kv_cache_bytes=1 << 22,
    )
    params = SamplingParams(temperature=0.0, max_tokens=len(tokens) - PROMPT_LEN, ignore_eos=True)
    prompt = {"prompt_token_ids": tokens[:PROMPT_LEN]}
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == tokens[PROMPT_LEN:]


def changed(name: str, target: Path, change) -> Path:
    """A copy of a fixture with other tensors."""
    folder = shutil.copytree(FIXTURES / name, target)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_safetensors(tensors, folder / "model.safetensors")
    return folder


def without_groups(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("g_idx")]:
        del tensors[name]


def test_columns_without_act_order_need_no_g_idx(tmp_path) -> None:
    name = "gptqmodel-qwen3-v2-asymmetric"
    reference = load_file(FIXTURES / name / "reference.safetensors")
    folder = changed(name, tmp_path / "m", without_groups)
    logits = logits_of(folder, reference["tokens"])
    torch.testing.assert_close(logits, reference["logits"], atol=TOLERANCE, rtol=0)


def test_act_order_without_g_idx_is_refused(tmp_path) -> None:
    folder = changed("gptqmodel-qwen2-act-order", tmp_path / "m", without_groups)
    with pytest.raises(ValueError, match=r"missing: .*q_proj\.g_idx"):
        load_model(folder, dtype="float32", device="cpu", linears=linears_of)


@pytest.mark.parametrize("name", [name for name in NAMES if "act-order" in name])
def test_programs_give_q_k_and_v_one_order_of_columns(name) -> None:
    """They are quantised with the same inputs, so that they can be one matrix."""
    tensors = load_file(FIXTURES / name / "model.safetensors")
    for layer in ("model.layers.0", "model.layers.1"):
        q, k, v = (tensors[f"{layer}.self_attn.{part}_proj.g_idx"] for part in "qkv")
        assert torch.equal(q, k)
        assert torch.equal(q, v)
        assert (q.diff() < 0).any()
        gate, up = (tensors[f"{layer}.mlp.{part}_proj.g_idx"] for part in ("gate", "up"))
        assert torch.equal(gate, up)


def test_biases_that_the_config_does_not_have_must_be_zero(tmp_path) -> None:
    """AutoGPTQ writes zeros for every matrix without a bias."""
    bias = "model.layers.1.mlp.up_proj.bias"
    assert not load_file(FIXTURES / "autogptq-llama" / "model.safetensors")[bias].any()
    folder = changed("autogptq-llama", tmp_path / "m", lambda t: t[bias][3:4].fill_(1.0))
    with pytest.raises(ValueError, match="biases where its config.json says that there are none"):
        load_model(folder, dtype="float32", device="cpu", linears=linears_of)


def test_biases_of_qwen2_must_be_there(tmp_path) -> None:
    bias = "model.layers.0.self_attn.k_proj.bias"
    folder = changed("gptqmodel-qwen2-act-order", tmp_path / "m", lambda t: t.pop(bias))
    with pytest.raises(ValueError, match="missing: model.layers.0.self_attn.k_proj.bias"):
        load_model(folder, dtype="float32", device="cpu", linears=linears_of)
