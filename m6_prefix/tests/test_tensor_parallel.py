"""Models that two or four processes hold together answer as one process does."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from folovllm.entrypoints.async_llm import AsyncLLM
from folovllm.interfaces import StepOutput, StepStats
from folovllm.request import SamplingParams
from folovllm.testing.toy_models import ToyFamily, toy_families, write_toy_model
from m6_prefix.llm import LLM

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


def make(model: Path, size: int, **options: Any) -> LLM:
    options = {"max_model_len": 64, "kv_cache_bytes": 1 << 22, "dtype": "float32", **options}
    return LLM(model, device="cpu", tensor_parallel_size=size, **options)


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
