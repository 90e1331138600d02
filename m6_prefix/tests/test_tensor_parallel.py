"""Models that two or four processes hold together answer as one process does."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from folovllm.entrypoints.async_llm import AsyncLLM
from folovllm.interfaces import StepOutput, StepStats
from folovllm.request import SamplingParams, StructuredOutputsParams
from folovllm.testing.toy_models import ToyFamily, toy_families, write_toy_model
from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer
from m6_prefix.llm import LLM
from m6_prefix.tests.graphed_llm import GraphedLLM

BIASED = ToyFamily("biased", "llama", {"attention_bias": True, "mlp_bias": True})
FAMILIES = (*toy_families(), BIASED)
PROMPTS = [{"prompt_token_ids": ids} for ids in ([1, 5, 9, 2], [7] * 20, [3, 4], [7] * 18)]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PARAMS = [
    GREEDY,
    SamplingParams(max_tokens=16, temperature=0.8, top_p=0.9, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=0.0, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=8, temperature=0.0, repetition_penalty=1.3, ignore_eos=True),
]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("toys")
    return {family.name: write_toy_model(family, folder / family.name) for family in FAMILIES}


PLAIN = [
    GREEDY,
    *(
        SamplingParams(max_tokens=12, temperature=temperature, seed=5, ignore_eos=True)
        for temperature in (0.7, 1.0, 1.5)
    ),
]
"""Greedy and by temperature alone: one number of each request travels, and no logits."""


def make(model: Path, size: int, llm_class: type[LLM] = LLM, **options: Any) -> LLM:
    options = {"max_model_len": 64, "kv_cache_bytes": 1 << 22, "dtype": "float32", **options}
    return llm_class(model, device="cpu", tensor_parallel_size=size, **options)


def answers(llm: LLM, params: Sequence[SamplingParams] = PARAMS) -> list[tuple[list[int], Any]]:
    """Twice the same prompts: the second time a stage that keeps prefixes finds them."""
    runs = [llm.generate(PROMPTS, params, use_tqdm=False) for _ in range(2)]
    llm.close()
    return [
        (list(output.outputs[0].token_ids), output.num_cached_tokens)
        for run in runs
        for output in run
    ]


@pytest.mark.parametrize("family", ["mistral", "qwen2", "biased"])
def test_two_processes_give_the_tokens_of_one(family: str, toys) -> None:
    """Of the fourth family in every stage's test_engine_contract.py."""
    expected = answers(make(toys[family], 1))
    assert answers(make(toys[family], 2)) == expected
    assert any(num_cached for _, num_cached in expected)


def test_a_pool_that_is_too_small_preempts_alike(toys, monkeypatch) -> None:
    """2 layers, 2 heads of 16, keys and values, 4 bytes: 512 bytes per token of one process."""
    options = {"kv_cache_bytes": 9 * 8 * 512, "block_size": 8, "enable_prefix_caching": False}
    params = [SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)] * len(PROMPTS)
    expected = answers(make(toys["llama"], 1, **options), params)
    options["kv_cache_bytes"] //= 2  # each process holds half of the heads
    llm = make(toys["llama"], 2, **options)
    stats: list[StepStats] = []
    monkeypatch.setattr(llm.engine, "step", recorded(llm.engine.step, stats))
    assert answers(llm, params) == expected
    assert sum(step.num_preemptions for step in stats) > 0


def recorded(step: Callable[[], StepOutput], stats: list[StepStats]) -> Callable[[], StepOutput]:
    def run() -> StepOutput:
        output = step()
        stats.append(output.stats)
        return output

    return run


@pytest.mark.parametrize("llm_class", [LLM, GraphedLLM])
def test_all_logits_travel_for_rules_that_look_at_them_alone(llm_class, toys, monkeypatch) -> None:
    """Inside a captured step each process chooses among its tokens; other rules run behind it."""
    alone = make(toys["qwen2"], 1)
    expected = [alone.generate(PROMPTS, params, use_tqdm=False) for params in (PLAIN, PARAMS)]
    llm = make(toys["qwen2"], 2, llm_class, enable_prefix_caching=False)
    parts: Any = llm.model.logits_parts
    gather, gathers = parts.gather, list[tuple[int, ...]]()

    def recorded_gather(part: torch.Tensor) -> torch.Tensor:
        gathers.append(tuple(part.shape))
        return gather(part)

    monkeypatch.setattr(parts, "gather", recorded_gather)
    graphs = llm.engine.model_runner.graphs  # type: ignore[attr-defined]
    outputs = llm.generate(PROMPTS, PLAIN, use_tqdm=False)
    assert not gathers
    outputs += llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    # Until the longest request with other rules is done; 128 columns of 199 for each of two.
    assert len(gathers) >= 16
    assert {shape[1] for shape in gathers} == {128}
    if llm_class is GraphedLLM:
        assert sum(graph.graph.num_replays for graph in graphs.graphs.values()) >= 12 + 16
    llm.close()
    for output, other in zip(outputs, [*expected[0], *expected[1]], strict=True):
        assert output.outputs[0].token_ids == other.outputs[0].token_ids
        assert_close_logprobs(output.outputs[0].logprobs, other.outputs[0].logprobs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_two_devices_give_the_tokens_of_one(enforce_eager, toys) -> None:
    def tokens(size: int) -> list[list[int]]:
        options = {"max_model_len": 64, "kv_cache_bytes": 1 << 22, "dtype": "float32"}
        llm = LLM(
            toys["qwen3"],
            device="cuda",
            tensor_parallel_size=size,
            enforce_eager=enforce_eager,
            **options,
        )
        outputs = llm.generate([*PROMPTS, *PROMPTS], [*PLAIN, *PARAMS], use_tqdm=False)
        outputs += llm.generate(PROMPTS, PLAIN, use_tqdm=False)
        llm.close()
        return [list(output.outputs[0].token_ids) for output in outputs]

    assert tokens(2) == tokens(1)


def assert_close_logprobs(actual: Any, expected: Any) -> None:
    assert (actual is None) == (expected is None)
    for ours, theirs in zip(actual or (), expected or (), strict=True):
        assert (ours is None) == (theirs is None)
        assert list(ours or ()) == list(theirs or ())
        for token_id in ours or ():
            assert ours[token_id].logprob == pytest.approx(theirs[token_id].logprob, abs=1e-4)


def test_prompt_logprobs_are_of_the_whole_vocabulary(toys) -> None:
    params = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=3, ignore_eos=True)
    alone = make(toys["llama"], 1).generate(PROMPTS, params, use_tqdm=False)
    llm = make(toys["llama"], 2)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    llm.close()
    for output, expected in zip(outputs, alone, strict=True):
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert_close_logprobs(output.prompt_logprobs, expected.prompt_logprobs)


@pytest.mark.parametrize("llm_class", [LLM, GraphedLLM])
def test_structured_outputs_are_followed_by_every_process(llm_class, tmp_path) -> None:
    """Each compiles the grammars for itself, and masks the same tokens."""
    pytest.importorskip("llguidance")
    overrides = {"vocab_size": 373, "tie_word_embeddings": False}
    write_toy_model(ToyFamily("llama", "llama", overrides), tmp_path)
    save_byte_level_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    schema = {"type": "object", "properties": {"a": {"enum": [7, 42]}}, "required": ["a"]}
    structures = [
        StructuredOutputsParams(json=schema, disable_any_whitespace=True),
        StructuredOutputsParams(regex="(ab|cd){2,5}"),
        StructuredOutputsParams(choice=["yes", "no"]),
        None,
    ]
    params = [
        SamplingParams(temperature=2.0, seed=3, n=2, max_tokens=30, structured_outputs=structure)
        for structure in structures
    ]
    outputs = []
    for size in (1, 2):
        llm = make(tmp_path, size, LLM if size == 1 else llm_class, max_num_seqs=5)
        outputs.append(
            [
                (completion.text, list(completion.token_ids), completion.finish_reason)
                for output in llm.generate(PROMPTS, params, use_tqdm=False)
                for completion in output.outputs
            ]
        )
        llm.close()
    assert outputs[0] == outputs[1]
    assert [text for text, _, _ in outputs[1][4:6] if text not in ("yes", "no")] == []
    assert sum(reason == "stop" for _, _, reason in outputs[1]) >= 4


def test_equal_tokens_of_two_processes_go_to_the_lowest_id(toys, tmp_path) -> None:
    """Token 128 + i, of rank 1, has the logits of token i, of rank 0."""
    model = tmp_path / "ties"
    shutil.copytree(toys["mistral"], model)
    tensors = load_file(model / "model.safetensors")
    head = tensors["lm_head.weight"]
    head[128:] = head[: len(head) - 128]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    params = [GREEDY, GREEDY, *PLAIN[1:3]]
    expected = answers(make(model, 1), params)
    assert answers(make(model, 2), params) == expected
    first, second, *random = [tokens for tokens, _ in expected[:4]]
    assert min(*first, *second) < len(head) - 128, "no token had an equal"
    assert max(*first, *second) < 128 <= max(map(max, random))


def test_random_weights_are_those_of_one_process(toys) -> None:
    options = {"load_format": "dummy", "seed": 5}
    expected = answers(make(toys["mistral"], 1, **options))
    assert answers(make(toys["mistral"], 2, **options)) == expected


def test_a_dropped_stream_ends_in_every_process_and_there_is_one_model_at_a_time(toys) -> None:
    llm = make(toys["llama"], 2)
    with pytest.raises(RuntimeError, match=r"call `close\(\)` of the other LLM first"):
        make(toys["llama"], 2)
    stream = llm.stream(PROMPTS[1], SamplingParams(max_tokens=40, ignore_eos=True))
    next(stream)
    stream.close()
    expected = answers(make(toys["llama"], 1))
    assert [tokens for tokens, _ in answers(llm)] == [tokens for tokens, _ in expected]


def test_four_processes_share_two_key_heads_and_end_when_one_dies(toys) -> None:
    llm = make(toys["llama"], 4)
    (expected,) = make(toys["llama"], 1).generate(PROMPTS[1], GREEDY, use_tqdm=False)
    (output,) = llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    engine: Any = llm.engine
    processes = engine.followers.processes
    os.kill(processes[1].pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 2 of 4 \(exit status -9\).*make a new LLM"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert time.monotonic() - start < 10
    assert all(process.poll() is not None for process in processes)
    with pytest.raises(RuntimeError, match="make a new LLM"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)


def test_an_engine_behind_a_server_has_its_processes_too(toys) -> None:
    async def ask() -> list[int]:
        options = {"max_model_len": 64, "kv_cache_bytes": 1 << 22, "tensor_parallel_size": 2}
        async with AsyncLLM(LLM, str(toys["llama"]), device="cpu", **options) as llm:
            outputs = [o async for o in llm.generate(PROMPTS[0], GREEDY, "request")]
        return list(outputs[-1].outputs[0].token_ids)

    llm = make(toys["llama"], 1)
    (expected,) = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    assert asyncio.run(ask()) == list(expected.outputs[0].token_ids)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (0, {}, "must be a whole number of at least 1, got 0"),
        (3, {}, "does not divide this model's 4 attention heads"),
        (2, {"chunk_policy": "dynamic", "target_step_ms": 9.0}, "target_step_ms measures steps"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_before_a_process_starts(
    size, options, message, toys
) -> None:
    with pytest.raises(ValueError, match=message):
        make(toys["llama"], size, **options)
