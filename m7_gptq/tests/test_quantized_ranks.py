"""Packed weights that two processes share: cut between groups, or refused."""

import json
from pathlib import Path

import pytest
import torch

from folovllm.kernels.selection import select_kernels
from folovllm.model.linear import Slice
from folovllm.request import SamplingParams
from folovllm.testing.toy_models import toy_families, write_toy_model
from m7_gptq.gptq import QuantizationConfig
from m7_gptq.llm import LLM
from m7_gptq.packing import V1
from m7_gptq.quantize_model import Job, quantize_checkpoint
from m7_gptq.quantized_linear import QuantizedLinear, Scheme

PROMPTS = [{"prompt_token_ids": ids} for ids in ([1, 2, 3, 4, 5], [7] * 9, [11, 12])]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def quantized(folder: Path, **options) -> Path:
    tokens = torch.randint(0, 199, (6, 32), generator=torch.Generator().manual_seed(0))
    job = Job(
        source=write_toy_model(toy_families()[2], folder / "source"),
        target=folder / "quantized",
        config=QuantizationConfig(**options),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    quantize_checkpoint(job, tokens, lambda report: None)
    return job.target


def make(model: Path, size: int, **more) -> LLM:
    options = {"max_model_len": 64, "kv_cache_bytes": 1 << 22, "dtype": "float32", **more}
    return LLM(model, device="cpu", tensor_parallel_size=size, **options)


def answers(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    llm.close()
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_packed_weights_are_cut_between_groups(tmp_path) -> None:
    model = quantized(tmp_path, group_size=8)
    assert answers(make(model, 2)) == answers(make(model, 1))


def test_random_integers_are_drawn_by_each_process(tmp_path) -> None:
    model = write_toy_model(toy_families()[0], tmp_path)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 8}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    first, again = (answers(make(model, 2, load_format="dummy")) for _ in range(2))
    assert first == again
    assert all(len(tokens) == GREEDY.max_tokens for tokens in first)


def part(num_inputs: int, **options) -> QuantizedLinear:
    scheme = Scheme(QuantizationConfig(**options), V1)
    like = torch.empty(0)
    linear = QuantizedLinear(scheme, num_inputs, 16, False, select_kernels(like.device), like)
    for target in linear.targets((Slice("o_proj", 16),)).values():
        target.zero_()
    return linear


def test_one_group_per_row_is_whole_in_every_part() -> None:
    linear = part(48, group_size=-1)
    linear.finish_part(first_input=48)
    assert linear(torch.ones(1, 48)).shape == (1, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 8, "desc_act": True}, "desc_act has the inputs of a group in several proc"),
        ({"group_size": 32}, r"48 inputs of a matrix, which are no whole groups of 32"),
    ],
)
def test_what_cannot_be_cut_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        part(48, **options).finish_part(first_input=48)
