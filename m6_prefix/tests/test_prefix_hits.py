"""Prompts that start from cached blocks get the tokens that they get alone, and Transformers'.

Every cache is full of NaN at the start, so that reading what nobody computed shows.
"""

from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch

from folovllm.model.loader import load_model
from folovllm.request import Request, SamplingParams
from folovllm.testing.driver import check_idle, check_step, drain, make_requests, random_prompts
from folovllm.testing.line_interrupts import LineInterrupt
from folovllm.testing.toy_models import reference_greedy, toy_families, write_toy_model
from m6_prefix import LLM, kv_cache_manager, prefix_cache
from m6_prefix.config import PreemptionMode
from m6_prefix.engine import LLMEngine
from m6_prefix.tests.invariants import check_blocks
from m6_prefix.tests.test_chunks import ASYNC, CHUNKS, chunked_engine
from m6_prefix.tests.test_prefix_sharing import noting

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def toy_directory(tmp_path_factory) -> Path:
    return write_toy_model(toy_families()[3], tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def model(toy_directory):
    return load_model(toy_directory, dtype="float32")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Around 1, 2 and 3 blocks of 16 that begin alike, and some that part from them on the way."""
    base, other = random_prompts(seed=1, count=2, vocab_size=199, min_len=60, max_len=60)
    lens = [k * 16 + offset for k in (1, 2, 3) for offset in (-1, 0, 1)]
    return [base[:n] for n in lens] + [base[:n] + other[: 50 - n] for n in (5, 16, 31, 40)]


@pytest.fixture(scope="module")
def expected(toy_directory, prompts) -> list[list[int]]:
    """Transformers' greedy tokens in float32."""
    return reference_greedy(toy_directory, prompts, max_tokens=12)


def serve(engine: LLMEngine, prompts: list[list[int]], name: str) -> list[list[int]]:
    """Every prompt twice, some of them later than others, all of it checked after every step."""
    ids = [f"{name}{number}" for number in range(2 * len(prompts))]
    requests = make_requests(prompts + prompts, GREEDY, ids=ids)
    drain(engine, requests[:9], later={2: requests[9:14], 5: requests[14:]})
    check_blocks(engine)
    outputs = [request.output_token_ids for request in requests]
    assert outputs[: len(prompts)] == outputs[len(prompts) :]
    return outputs[: len(prompts)]


@ASYNC
@pytest.mark.parametrize("chunk", CHUNKS)
def test_cold_and_warm_prompts_get_transformers_tokens(
    model, prompts, expected, chunk, is_async
) -> None:
    engine = chunked_engine(model, max_chunk_tokens=chunk, async_scheduling=is_async)
    assert serve(engine, prompts, "cold") == expected
    assert serve(engine, prompts, "warm") == expected
    assert serve(engine, prompts[::-1], "back") == expected[::-1]


@ASYNC
@pytest.mark.parametrize("mode", PreemptionMode)
@pytest.mark.parametrize(("num_blocks", "block_size"), [(10, 16), (40, 4), (160, 1), (18, 9)])
def test_cache_that_is_evicted_all_the_time_gives_transformers_tokens(
    model, prompts, expected, mode, num_blocks, block_size, is_async, monkeypatch
) -> None:
    engine = chunked_engine(
        model,
        num_blocks,
        block_size=block_size,
        preemption_mode=mode,
        max_chunk_tokens=20,
        async_scheduling=is_async,
    )
    evicted: list[tuple] = []
    cache = engine.kv_cache_manager.prefix_cache
    monkeypatch.setattr(cache, "evict", noting(evicted, cache.evict))
    assert serve(engine, prompts, "cold") == expected
    assert serve(engine, prompts[::-1], "back") == expected[::-1]
    assert len(evicted) > 20


@ASYNC
def test_prompts_find_what_they_have_in_common(model, prompts, is_async) -> None:
    engine = chunked_engine(model, async_scheduling=is_async)
    longest = max(prompts, key=len)
    drain(engine, make_requests([longest], GREEDY, ids=["first"]))
    for number, prompt in enumerate(prompts):
        (request,) = make_requests([prompt], GREEDY, ids=[f"r{number}"])
        drain(engine, [request])
        assert request.num_cached_tokens is not None
        num_common = next(
            (i for i, (a, b) in enumerate(zip(prompt, longest, strict=False)) if a != b),
            len(prompt),
        )
        assert request.num_cached_tokens >= min(num_common // 16 * 16, len(prompt) - 1)


def test_block_that_is_shared_in_part_stays_as_it_is_to_the_bit(model) -> None:
    engine = chunked_engine(model)
    prompt = list(range(1, 40))
    drain(engine, make_requests([prompt], GREEDY, ids=["first"]))
    *cached, _ = engine.kv_cache_manager.prefix_cache.nodes
    assert len(cached) == 3, "full ones, and behind them an end"
    before = engine.model_runner.kv_cache.kv[:, :, cached].clone()
    (request,) = make_requests([[*prompt[:21], 7, 7, 7]], GREEDY, ids=["second"])
    engine.add_request(request)
    check_step(engine, engine.step())
    assert request.num_cached_tokens == 21
    table = engine.kv_cache_manager.block_tables["second"]
    assert table[0] == cached[0]
    assert table[1] not in cached
    drain(engine, [])
    assert torch.equal(engine.model_runner.kv_cache.kv[:, :, cached], before)
    own = engine.model_runner.kv_cache.kv[:, :, table[1]]
    assert torch.equal(own[:, :, :5], before[:, :, 1, :5])


@ASYNC
def test_conversation_finds_its_own_answers(model, is_async) -> None:
    engine = chunked_engine(model, async_scheduling=is_async)
    history, question = list(range(1, 20)), [5, 6, 7]
    alone = chunked_engine(model, enable_prefix_caching=False)
    for turn in range(4):
        prompt = [*history, *question]
        (request,) = make_requests([prompt], GREEDY, ids=[f"turn {turn}"])
        (same,) = make_requests([prompt], GREEDY)
        drain(engine, [request])
        drain(alone, [same])
        assert request.output_token_ids == same.output_token_ids
        assert request.num_cached_tokens == (len(history) - 1 if turn else 0)
        history = [*prompt, *request.output_token_ids]


@ASYNC
def test_forks_of_a_cached_prompt_get_the_tokens_of_a_cold_one(model, is_async) -> None:
    prompt, params = list(range(1, 50)), SamplingParams(temperature=1.0, max_tokens=20, seed=3)

    def family(engine: LLMEngine, name: str) -> list[list[int]]:
        requests: list[Request] = []
        for seed in range(4):
            requests.append(
                Request(
                    request_id=f"{name}{seed}",
                    prompt_token_ids=prompt,
                    sampling_params=params,
                    seed=seed,
                    fork_of=requests[0] if requests else None,
                )
            )
        drain(engine, requests)
        return [request.output_token_ids for request in requests]

    cold = family(chunked_engine(model, enable_prefix_caching=False), "r")
    engine = chunked_engine(model, num_blocks=14, async_scheduling=is_async)
    assert family(engine, "first") == family(engine, "second") == cold


# LLM


def test_outputs_say_how_many_tokens_were_cached(toy_directory) -> None:
    llm = make_llm(toy_directory)
    prompt = list(range(1, 40))
    cold, warm = (llm.generate(prompt, GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 38)
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids
    several = SamplingParams(n=3, temperature=1.0, max_tokens=3, seed=1)
    assert llm.generate(prompt, several, use_tqdm=False)[0].num_cached_tokens == 38


def test_llm_forgets_what_it_has_cached(toy_directory) -> None:
    llm = make_llm(toy_directory)
    prompt = list(range(1, 40))
    for _ in range(2):
        assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0
        assert llm.reset_prefix_cache() is True
        check_idle(llm.engine)


def test_prompts_with_another_salt_find_nothing(toy_directory) -> None:
    llm = make_llm(toy_directory)
    ids = list(range(1, 40))
    found = []
    for salt in ("a", "b", "a", None, None):
        prompt = {"prompt_token_ids": ids, "cache_salt": salt}
        found.append(llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens)
    assert found == [0, 0, 38, 0, 38]
    assert llm.generate(ids, GREEDY, use_tqdm=False)[0].num_cached_tokens == 38


def test_reset_that_is_interrupted_at_any_line_loses_no_block_and_no_token(model) -> None:
    files = [str(module.__file__) for module in (kv_cache_manager, prefix_cache)]
    prompt = list(range(1, 40))
    for line_number in count(1):
        engine = chunked_engine(model, async_scheduling=False)
        first, second = make_requests([prompt, prompt], GREEDY)
        drain(engine, [first])
        engine.add_request(second)
        engine.step()
        interrupt = LineInterrupt(files, line_number)
        with suppress(KeyboardInterrupt), interrupt:
            engine.reset_prefix_cache()
        check_blocks(engine)
        drain(engine, [])
        check_blocks(engine)
        assert engine.kv_cache_manager.num_free_blocks == 80
        assert second.output_token_ids == first.output_token_ids
        if not interrupt.has_fired:
            assert line_number > 5
            break


def test_cache_takes_all_the_memory_that_it_may_have(model) -> None:
    for is_caching, num_blocks in ((True, 80), (False, 10)):
        engine = chunked_engine(
            model, 80, max_num_seqs=1, enable_prefix_caching=is_caching, max_model_len=160
        )
        assert engine.kv_cache_manager.pool.num_blocks == num_blocks


def make_llm(toy_directory: Path) -> LLM:
    return LLM(toy_directory, device="cpu", max_model_len=160, kv_cache_bytes=1 << 22)
