"""Sizes of chunks: a fixed limit, or what a time allows by measured steps."""

import pytest

from folovllm.model.loader import load_model
from folovllm.request import Request, SamplingParams
from folovllm.testing.driver import drain, make_requests
from folovllm.testing.toy_models import toy_families, write_toy_model
from m6_prefix import step_costs
from m6_prefix.chunk_policy import LEAST_CHUNK, FixedChunks, StepCost, TimedChunks
from m6_prefix.config import ChunkPolicy
from m6_prefix.tests.test_preemption import make_engine

COSTS = [
    StepCost(num_tokens=64, step_s=1.0, key_s=0.001),
    StepCost(num_tokens=128, step_s=2.0, key_s=0.002),
    StepCost(num_tokens=256, step_s=4.0, key_s=0.004),
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


def running(*lengths: tuple[int, int]) -> list[Request]:
    """Requests of (computed tokens, tokens)."""
    return [
        Request(
            request_id=f"r{i}",
            prompt_token_ids=[0] * num_tokens,
            sampling_params=GREEDY,
            num_computed_tokens=num_computed,
        )
        for i, (num_computed, num_tokens) in enumerate(lengths)
    ]


def timed(target_s: float, max_chunk_tokens: int | None = None) -> TimedChunks:
    return TimedChunks(COSTS, 0.01, target_s, max_chunk_tokens)


def test_fixed_chunks_have_one_limit_or_none() -> None:
    assert FixedChunks(None).take(10, 5000) == 5000
    assert [FixedChunks(100).take(10, wanted) for wanted in (5000, 100, 7)] == [100, 100, 7]


def test_chunk_fills_the_longest_step_that_is_within_the_time() -> None:
    chunks = timed(target_s=4.0)
    chunks.start_step([])
    assert chunks.take(0, 5000) == 256
    chunks.start_step(running((9, 10)) * 3)
    assert chunks.take(0, 5000) == 128 - 3, "with the keys of three decodes 256 take too long"


def test_chunks_shrink_as_their_context_grows() -> None:
    def chunk_behind(num_computed_tokens: int) -> int:
        chunks = timed(target_s=4.0)
        chunks.start_step([])
        return chunks.take(num_computed_tokens, 5000)

    contexts = [0, 1, 1000, 1001, 3000, 3001]
    assert [*map(chunk_behind, contexts)] == [256, 128, 128, 64, 64, LEAST_CHUNK]


def test_second_chunk_gets_what_the_first_left() -> None:
    chunks = timed(target_s=4.0)
    chunks.start_step([])
    assert chunks.take(500, 100) == 100
    # 0.002 s a key are paid: 3 s are left, in which no step takes 256 tokens.
    assert chunks.take(0, 5000) == 28
    assert chunks.take(0, 5000) == 1, "whoever is behind gets a token"


def test_prompts_advance_when_the_time_is_used_up() -> None:
    chunks = timed(target_s=0.5)
    chunks.start_step([])
    assert chunks.take(0, 5000) == LEAST_CHUNK
    assert chunks.take(0, 3) == 1
    chunks.start_step([])
    assert chunks.take(0, 3) == 3


def test_chunk_is_never_longer_than_asked_for_or_allowed() -> None:
    chunks = timed(target_s=4.0, max_chunk_tokens=50)
    chunks.start_step([])
    assert chunks.take(0, 5000) == 50
    assert chunks.take(0, 20) == 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = write_toy_model(toy_families()[3], tmp_path_factory.mktemp("toy"))
    return load_model(directory, dtype="float32")


def dynamic_engine(model, **options):
    options = {"block_size": 16, "max_model_len": 512, "max_num_batched_tokens": 300, **options}
    return make_engine(model, 40, chunk_policy=ChunkPolicy.DYNAMIC, **options)


def test_steps_are_timed_with_and_without_context_until_one_is_too_slow(model, monkeypatch) -> None:
    steps: list[list[tuple[int, int]]] = []

    def time_step(runner, shares):
        steps.append(shares)
        return sum(0.001 * new + 0.00001 * new * cached for cached, new in shares)

    monkeypatch.setattr(step_costs, "_time_step", time_step)
    engine = dynamic_engine(model, target_step_ms=200.0, max_num_seqs=4)
    chunks = engine.scheduler.chunk_sizes
    assert isinstance(chunks, TimedChunks)
    assert [cost.num_tokens for cost in chunks.costs] == [64, 128, 256]
    assert chunks.costs[0] == pytest.approx((64, 0.064, 0.00061))
    assert chunks.costs[1] == pytest.approx((128, 0.128, 0.00125))
    assert chunks.decode_key_s == pytest.approx(0.00001)
    beside = [(0, 1)] * 3
    assert steps[:2] == [[*beside, (0, 61)], [*beside, (451, 61)]]
    assert steps[-1] == [(511, 1)], "the cache has room for one request of full length"
    for shares in steps:
        assert sum(-(-(cached + new) // 16) for cached, new in shares) <= 40


@pytest.mark.parametrize("target_step_ms", [0.001, 1000.0])
def test_dynamic_chunks_give_the_tokens_of_whole_prompts(model, target_step_ms) -> None:
    prompts = [list(range(1, 190)), [5] * 100, [7, 8, 9]]
    tokens = []
    for engine in (
        dynamic_engine(model, target_step_ms=target_step_ms),
        make_engine(model, 40, block_size=16, max_model_len=512),
    ):
        requests = make_requests(prompts, GREEDY)
        drain(engine, requests)
        tokens.append([request.output_token_ids for request in requests])
    assert tokens[0] == tokens[1]
