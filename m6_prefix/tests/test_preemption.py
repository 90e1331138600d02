"""Pools so small that requests give way to each other, forks, and both at once."""

import random
from itertools import count

import pytest
import torch

from folovllm.request import Request, RequestStatus, SamplingParams
from folovllm.testing.driver import check_idle, check_step, drain, make_requests, random_prompts
from folovllm.testing.engine_contract import toy_model
from m6_prefix.config import EngineConfig, PreemptionMode, SchedulingPolicy
from m6_prefix.engine import LLMEngine
from m6_prefix.tests.invariants import check_blocks
from m6_prefix.tests.test_engine_contract import BYTES_PER_TOKEN

__all__ = ["toy_model"]

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
RANDOM = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True, repetition_penalty=1.2)
PENALTIES = SamplingParams(
    temperature=0.0,
    max_tokens=40,
    ignore_eos=True,
    presence_penalty=2.0,
    frequency_penalty=2.0,
    logit_bias=dict.fromkeys(range(10), 8.0),
)
"""Greedy among a few tokens, so that what was produced before the preemption decides."""


def make_engine(model, num_blocks: int, block_size: int = 4, **options) -> LLMEngine:
    """An engine whose cache is full of NaN, so that reading what nobody wrote shows."""
    config = EngineConfig(
        **{
            "max_model_len": 64,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 256,
            "block_size": block_size,
            "kv_cache_bytes": num_blocks * block_size * BYTES_PER_TOKEN,
            "swap_cache_tokens": 400,
            **options,
        }
    )
    engine = LLMEngine(config, model)
    engine.model_runner.kv_cache.keys.fill_(float("nan"))
    engine.model_runner.kv_cache.values.fill_(float("nan"))
    return engine


def run(engine: LLMEngine, requests: list[Request]) -> dict[str, int]:
    """Run to the end with all invariants; return how often each request lost its place."""
    preemptions = dict.fromkeys((r.request_id for r in requests), 0)
    for request in requests:
        engine.add_request(request)
    for _ in range(5000):
        if not engine.has_unfinished_requests():
            check_idle(engine)
            return preemptions
        before = {r.request_id for r in engine.scheduler.running}
        output = engine.step()
        check_step(engine, output)
        check_blocks(engine)
        unfinished = {r.request_id for r in engine.scheduler.requests.values()}
        after = {r.request_id for r in engine.scheduler.running}
        for request_id in (before - after) & unfinished:
            preemptions[request_id] += 1
    raise AssertionError("no end after 5000 steps")


def tokens_with_room(model, prompts, params) -> list[list[int]]:
    """What they get where nobody shares or gives way: that each would alone, by the contract."""
    requests = make_requests(prompts, params, seeds=range(len(prompts)))
    preemptions = run(make_engine(model, num_blocks=16 * len(prompts)), requests)
    assert not any(preemptions.values())
    return [request.output_token_ids for request in requests]


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "params", [GREEDY, RANDOM, PENALTIES], ids=["greedy", "random", "penalties"]
)
@pytest.mark.parametrize("mode", PreemptionMode)
def test_requests_preempted_several_times_end_with_the_same_tokens(toy_model, mode, params) -> None:
    prompts = random_prompts(seed=1, count=6, vocab_size=199, min_len=12, max_len=20)
    expected = tokens_with_room(toy_model, prompts, params)
    engine = make_engine(toy_model, num_blocks=16, preemption_mode=mode)
    requests = make_requests(prompts, params, seeds=range(6))
    preemptions = run(engine, requests)
    assert [request.output_token_ids for request in requests] == expected
    assert sum(preemptions.values()) >= 6
    assert preemptions["r0"] == 0, "the first in order never gives way"
    # Each return computes at least one token before the next preemption.
    assert max(preemptions.values()) <= 40


@pytest.mark.parametrize("mode", PreemptionMode)
def test_preempted_request_comes_back_before_newer_ones(toy_model, mode) -> None:
    prompts = random_prompts(seed=2, count=5, vocab_size=199, min_len=16, max_len=16)
    engine = make_engine(toy_model, num_blocks=16, preemption_mode=mode)
    requests = make_requests(prompts, GREEDY)
    for request in requests:
        engine.add_request(request)
    order = []
    while engine.has_unfinished_requests():
        output = engine.step()
        order += [t.request_id for t in output.tokens if t.finish_reason is not None]
    assert order == ["r0", "r1", "r2", "r3", "r4"]


def test_lowest_priority_gives_way(toy_model) -> None:
    prompts = random_prompts(seed=3, count=2, vocab_size=199, min_len=20, max_len=20)
    engine = make_engine(toy_model, 16, scheduling_policy=SchedulingPolicy.PRIORITY)
    unimportant, important = make_requests(prompts, GREEDY)
    unimportant.priority, important.priority = 9, 1
    preemptions = run(engine, [unimportant, important])
    assert preemptions["r1"] == 0
    assert preemptions["r0"] > 0


def test_swap_space_that_is_full_falls_back_to_recomputation(toy_model) -> None:
    prompts = random_prompts(seed=1, count=6, vocab_size=199, min_len=12, max_len=20)
    expected = tokens_with_room(toy_model, prompts, GREEDY)
    engine = make_engine(toy_model, 16, preemption_mode=PreemptionMode.SWAP, swap_cache_tokens=24)
    requests = make_requests(prompts, GREEDY)
    seen = set()
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished_requests():
        stats = engine.step().stats
        check_blocks(engine)
        if stats.num_preemptions:
            seen.add(stats.num_swapped_tokens > 0)
    assert [request.output_token_ids for request in requests] == expected
    assert seen == {True, False}


@pytest.mark.parametrize("mode", PreemptionMode)
def test_abort_of_a_preempted_request_frees_everything(toy_model, mode) -> None:
    prompts = random_prompts(seed=4, count=6, vocab_size=199, min_len=12, max_len=20)
    engine = make_engine(toy_model, num_blocks=16, preemption_mode=mode)
    requests = make_requests(prompts, GREEDY)
    for request in requests:
        engine.add_request(request)
    victim = None
    while victim is None:
        before = {r.request_id for r in engine.scheduler.running}
        engine.step()
        after = {r.request_id for r in engine.scheduler.running}
        victim = next(iter(before - after & engine.scheduler.requests.keys()), None)
    engine.abort_request(victim)
    engine.abort_request(victim)
    check_blocks(engine)
    drain(engine, [])


def forks(prompt: list[int], count: int, params: SamplingParams) -> list[Request]:
    requests = make_requests([prompt] * count, params, seeds=range(count))
    for request in requests[1:]:
        request.fork_of = requests[0]
    return requests


@pytest.mark.no_cover
@pytest.mark.parametrize("prompt_len", [1, 3, 4, 5, 8, 17])
def test_forks_share_the_prompt_and_sample_their_own_tokens(toy_model, prompt_len) -> None:
    (prompt,) = random_prompts(
        seed=5, count=1, vocab_size=199, min_len=prompt_len, max_len=prompt_len
    )
    expected = tokens_with_room(toy_model, [prompt] * 4, RANDOM)
    engine = make_engine(toy_model, num_blocks=64)
    requests = forks(prompt, 4, RANDOM)
    for request in requests:
        engine.add_request(request)
    computed = engine.step().stats.num_scheduled_tokens
    stats = engine.step().stats
    tables = engine.kv_cache_manager.block_tables
    check_blocks(engine)
    # A prompt of one token leaves nothing to share: all four compute it in the first step.
    # Otherwise the forks come when the parent takes its second token.
    expected_work = (4 if prompt_len == 1 else prompt_len, 4)
    assert (computed, stats.num_scheduled_tokens) == expected_work
    assert stats.num_kv_tokens_live < 4 * prompt_len or prompt_len <= 4
    num_blocks = len({block_id for table in tables.values() for block_id in table})
    assert (stats.num_used_blocks, stats.num_free_blocks) == (num_blocks, 64 - num_blocks)
    drain(engine, [])
    assert [request.output_token_ids for request in requests] == expected


def test_copy_on_write_leaves_the_parents_blocks_bitwise_alone(toy_model) -> None:
    prompt = list(range(1, 11))
    engine = make_engine(toy_model, num_blocks=64)
    requests = forks(prompt, 3, RANDOM)
    for request in requests:
        engine.add_request(request)
    engine.step()
    cache = engine.model_runner.kv_cache
    table = list(engine.kv_cache_manager.block_tables["r0"])
    before = torch.stack((cache.keys[:, table], cache.values[:, table])).clone()
    engine.step()
    after = torch.stack((cache.keys[:, table], cache.values[:, table]))
    assert torch.equal(after[:, :, :2], before[:, :, :2])
    assert torch.equal(after[:, :, 2, :2], before[:, :, 2, :2])


def test_fork_of_a_parent_that_is_gone_finds_its_prompt_in_the_cache(toy_model) -> None:
    prompt = list(range(1, 11))
    engine = make_engine(toy_model, num_blocks=64)
    parent, child = forks(prompt, 2, GREEDY)
    drain(engine, [parent])
    engine.add_request(child)
    assert engine.step().stats.num_scheduled_tokens == 1
    drain(engine, [])
    assert child.output_token_ids == parent.output_token_ids
    assert parent.status is RequestStatus.FINISHED


@pytest.mark.no_cover
@pytest.mark.parametrize("where", ["copy_blocks", "prepare_inputs"])
@pytest.mark.parametrize("mode", PreemptionMode)
def test_step_that_breaks_off_loses_no_copies_and_no_tokens(
    toy_model, monkeypatch, mode, where
) -> None:
    prompts = random_prompts(seed=6, count=3, vocab_size=199, min_len=9, max_len=14)
    engine = make_engine(toy_model, num_blocks=18, preemption_mode=mode)
    requests, expected = [], []
    for index, prompt in enumerate(prompts):
        family = forks(prompt, 2, RANDOM)
        for request in family:
            request.request_id = f"{index}-{request.request_id}"
        requests += family
        expected += tokens_with_room(toy_model, [prompt] * 2, RANDOM)
    runner = engine.model_runner
    owner = runner.kv_cache if where == "copy_blocks" else runner
    original, calls = getattr(owner, where), count()

    def breaks_off_now_and_then(argument):
        if next(calls) % 7 == 3:
            raise KeyboardInterrupt
        return original(argument)

    monkeypatch.setattr(owner, where, breaks_off_now_and_then)
    for request in requests:
        engine.add_request(request)
    num_interrupts = 0
    while engine.has_unfinished_requests():
        try:
            check_step(engine, engine.step())
            check_blocks(engine)
        except KeyboardInterrupt:
            num_interrupts += 1
    assert num_interrupts > 5
    assert [request.output_token_ids for request in requests] == expected


def test_cache_one_block_short_of_a_request_is_refused(toy_model) -> None:
    make_engine(toy_model, num_blocks=16)  # 64 tokens, a request of max_model_len
    with pytest.raises(ValueError, match="one request of max_model_len 64 takes 16 blocks"):
        make_engine(toy_model, num_blocks=15)
    make_engine(toy_model, num_blocks=13, block_size=5)
    with pytest.raises(ValueError, match="lower max_model_len or raise kv_cache_bytes"):
        make_engine(toy_model, num_blocks=12, block_size=5)


def test_request_one_token_too_long_is_refused_and_the_longest_uses_the_whole_cache(
    toy_model,
) -> None:
    engine = make_engine(toy_model, num_blocks=16)
    longest, other, too_long = make_requests([[7] * 24, [3] * 8, [7] * 25], GREEDY)
    engine.add_request(longest)
    engine.add_request(other)
    with pytest.raises(ValueError, match="needs 65 tokens of context"):
        engine.add_request(too_long)
    drain(engine, [])
    assert (longest.num_output_tokens, other.num_output_tokens) == (40, 40)


@pytest.mark.no_cover
@pytest.mark.parametrize("seed", range(6))
def test_fuzz_of_forks_in_pools_that_are_too_small(toy_model, seed) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4, 7, 16])
    params = rng.choice([GREEDY, RANDOM])
    prompts = random_prompts(seed=seed, count=4, vocab_size=199, max_len=24)
    engine = make_engine(
        toy_model,
        num_blocks=-(-64 // block_size) + rng.randrange(6),
        block_size=block_size,
        max_num_seqs=rng.choice([1, 3, 8]),
        max_num_batched_tokens=rng.choice([64, 200]),
        preemption_mode=rng.choice(list(PreemptionMode)),
        swap_cache_tokens=rng.choice([0, 40, 400]),
    )
    requests, expected = [], []
    for index, prompt in enumerate(prompts):
        family = forks(prompt, 3, params)
        for request in family:
            request.request_id = f"{index}-{request.request_id}"
        requests += family
        expected += tokens_with_room(toy_model, [prompt] * 3, params)
    run(engine, requests)
    assert [request.output_token_ids for request in requests] == expected
