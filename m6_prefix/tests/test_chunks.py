"""Prompts in chunks under one token budget: the same tokens, and nobody waits for a long prompt.

Every cache is full of NaN at the start, so that reading what nobody computed shows.
"""

from pathlib import Path

import pytest

from folovllm.entrypoints.beam_search import BeamSearchParams
from folovllm.model.loader import load_model
from folovllm.request import FinishReason, SamplingParams
from folovllm.testing.driver import check_idle, check_step, drain, make_requests, random_prompts
from folovllm.testing.toy_models import reference_greedy, toy_families, write_toy_model
from m6_prefix import LLM
from m6_prefix.config import EngineConfig, PreemptionMode, SchedulingPolicy
from m6_prefix.engine import LLMEngine
from m6_prefix.tests.invariants import check_blocks
from m6_prefix.tests.test_preemption import forks, make_engine, run

CHUNKS = [1, 7, 15, 16, 17, 2048]
"""Around a block of 16 tokens, far below it and far above."""
SHORT = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
ASYNC = pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])


@pytest.fixture(scope="module")
def toy_directory(tmp_path_factory) -> Path:
    return write_toy_model(toy_families()[3], tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def model(toy_directory):
    return load_model(toy_directory, dtype="float32")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts(seed=1, count=8, vocab_size=199, max_len=100)


@pytest.fixture(scope="module")
def expected(toy_directory, prompts) -> list[list[int]]:
    """Transformers' greedy tokens in float32."""
    return reference_greedy(toy_directory, prompts, max_tokens=12)


def chunked_engine(model, num_blocks: int = 80, **options) -> LLMEngine:
    options = {"block_size": 16, "max_model_len": 160, **options}
    return make_engine(model, num_blocks, **options)


# Tokens


@ASYNC
@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_of_any_size_give_transformers_tokens(
    model, prompts, expected, chunk, is_async
) -> None:
    engine = chunked_engine(model, max_chunk_tokens=chunk, async_scheduling=is_async)
    requests = make_requests(prompts, SHORT)
    drain(engine, requests[:4], later={2: requests[4:6], 9: requests[6:]})
    assert [request.output_token_ids for request in requests] == expected


@ASYNC
@pytest.mark.parametrize("budget", [8, 9, 16, 17, 33])
def test_budgets_below_the_longest_prompt_give_transformers_tokens(
    model, prompts, expected, budget, is_async
) -> None:
    engine = chunked_engine(model, max_num_batched_tokens=budget, async_scheduling=is_async)
    requests = make_requests(prompts, SHORT)
    drain(engine, requests[:4], later={2: requests[4:6], 9: requests[6:]})
    assert [request.output_token_ids for request in requests] == expected


@ASYNC
@pytest.mark.parametrize("mode", PreemptionMode)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_preempted_requests_give_transformers_tokens(
    model, prompts, expected, chunk, mode, is_async
) -> None:
    engine = chunked_engine(
        model,
        num_blocks=40,
        block_size=4,
        max_chunk_tokens=chunk,
        preemption_mode=mode,
        async_scheduling=is_async,
        swap_cache_tokens=400,
    )
    requests = make_requests(prompts, SHORT)
    preemptions = run(engine, requests)
    assert [request.output_token_ids for request in requests] == expected
    assert sum(preemptions.values()) >= 1


@ASYNC
@pytest.mark.parametrize("chunk", [3, 2048])
def test_beam_search_gives_the_beams_of_prompts_computed_in_one_step(
    toy_directory, prompts, chunk, is_async
) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=8)
    whole = {"max_model_len": 160, "kv_cache_bytes": 1 << 23, "async_scheduling": False}
    parts = {**whole, "async_scheduling": is_async, "max_chunk_tokens": chunk}
    found = []
    for options in (whole, {**parts, "max_num_seqs": 8, "max_num_batched_tokens": 20}):
        llm = LLM(toy_directory, device="cpu", **options)
        outputs = llm.beam_search(prompts[:4], params)
        found.append([[s.tokens for s in output.sequences] for output in outputs])
        check_idle(llm.engine)
    assert found[0] == found[1]


# Steps


class Launches:
    """What an engine launched: per step {request: (tokens computed before, tokens computed)}."""

    def __init__(self, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[dict[str, tuple[int, int]]] = []
        launch = engine.model_runner.launch

        def noted(scheduler_output):
            self.steps.append(
                {
                    s.request.request_id: (s.request.num_computed_tokens, s.num_scheduled_tokens)
                    for s in scheduler_output.scheduled
                }
            )
            return launch(scheduler_output)

        monkeypatch.setattr(engine.model_runner, "launch", noted)


@ASYNC
def test_prompt_brings_no_token_before_its_end(model, monkeypatch, is_async) -> None:
    engine = chunked_engine(model, max_chunk_tokens=7, async_scheduling=is_async)
    launches = Launches(engine, monkeypatch)
    (request,) = make_requests([[5] * 40], SHORT)
    engine.add_request(request)
    num_tokens = []
    while engine.has_unfinished_requests():
        num_tokens.append(len(engine.step().tokens))
    chunks = [(start, min(7, 40 - start)) for start in range(0, 40, 7)]
    assert [step["r0"] for step in launches.steps[:6]] == chunks
    assert num_tokens == [0] * 5 + [1] * 12


@ASYNC
def test_decodes_get_a_token_in_every_step_while_a_long_prompt_is_computed(
    model, monkeypatch, is_async
) -> None:
    engine = chunked_engine(model, max_num_batched_tokens=20, async_scheduling=is_async)
    launches = Launches(engine, monkeypatch)
    *decoders, late = make_requests([[3, 4], [5], [6, 7], [8], [9] * 120], LONG)
    for request in decoders:
        engine.add_request(request)
    for _ in range(3):
        engine.step()
    engine.add_request(late)
    num_launched = len(launches.steps)
    names = {request.request_id for request in decoders}
    num_steps = 0
    while not late.output_token_ids:
        output = engine.step()
        assert output.stats.num_scheduled_tokens <= 20
        assert names <= {token.request_id for token in output.tokens}
        num_steps += 1
    # 16 tokens of the prompt beside four decodes, and one step that was under way when it came.
    assert num_steps == 8 + is_async
    assert [step["r4"][1] for step in launches.steps[num_launched:][:8]] == [16] * 7 + [8]
    drain(engine, [])


@ASYNC
@pytest.mark.parametrize("seed", range(6))
def test_budget_is_never_exceeded_and_everybody_who_runs_is_served(
    model, monkeypatch, is_async, seed
) -> None:
    budget = [8, 11, 20, 50, 9, 8][seed]
    chunk = [None, 3, 16, None, 1, 5][seed]
    engine = chunked_engine(
        model,
        num_blocks=[10, 14, 12, 80, 11, 10][seed],
        max_num_batched_tokens=budget,
        max_chunk_tokens=chunk,
        async_scheduling=is_async,
    )
    launches = Launches(engine, monkeypatch)
    requests = make_requests(random_prompts(seed=seed, count=9, vocab_size=199, max_len=90), SHORT)
    schedule = engine.scheduler.schedule

    def checked():
        output = schedule()
        served = {s.request for s in output.scheduled}
        # Not who has all its tokens, the last of them on its way.
        waits = {r for r in engine.scheduler.running if r not in served}
        assert all(r.num_output_tokens == r.max_tokens for r in waits)
        return output

    monkeypatch.setattr(engine.scheduler, "schedule", checked)
    drain(engine, requests[:3], later={4: requests[3:6], 11: requests[6:]})
    for step in launches.steps:
        assert 0 < sum(count for _, count in step.values()) <= budget
        assert all(count <= (chunk or budget) for _, count in step.values())


@ASYNC
def test_fork_of_a_parent_whose_prompt_takes_several_steps_blocks_nobody(
    model, monkeypatch, is_async
) -> None:
    prompt = list(range(1, 101))
    engine = chunked_engine(model, max_chunk_tokens=20, async_scheduling=is_async)
    launches = Launches(engine, monkeypatch)
    family = forks(prompt, 3, LONG)
    (other,) = make_requests([[7, 8, 9]], SHORT, ids=["other"])
    for request in (*family, other):
        engine.add_request(request)
    for _ in range(4):
        check_step(engine, engine.step())
        check_blocks(engine)
    assert len(other.output_token_ids) > 0
    assert family[0].output_token_ids == family[1].output_token_ids == []
    drain(engine, [])
    first = {name: step[name] for step in reversed(launches.steps) for name in step}
    assert first["r1"] == first["r2"] == (99, 1), "the forks share the prompt"
    expected = tokens_of_whole_prompts(model, [prompt] * 3, LONG)
    assert [request.output_token_ids for request in family] == expected


def tokens_of_whole_prompts(model, prompts, params) -> list[list[int]]:
    engine = chunked_engine(model, max_num_batched_tokens=1000, async_scheduling=False)
    requests = make_requests(prompts, params, seeds=range(len(prompts)))
    drain(engine, requests)
    return [request.output_token_ids for request in requests]


@ASYNC
def test_important_prompt_passes_one_that_is_being_computed(model, monkeypatch, is_async) -> None:
    engine = chunked_engine(
        model,
        max_num_batched_tokens=20,
        max_chunk_tokens=12,
        scheduling_policy=SchedulingPolicy.PRIORITY,
        async_scheduling=is_async,
    )
    launches = Launches(engine, monkeypatch)
    unimportant, important = make_requests([[1] * 100, [2] * 50], SHORT, ids=["low", "high"])
    unimportant.priority, important.priority = 5, 1
    engine.add_request(unimportant)
    engine.step()
    num_launched = len(launches.steps)
    engine.add_request(important)
    drain(engine, [])
    # Who runs keeps what it needs of this step; from the next on it gets what is left.
    shares = [(step["high"][1], step["low"][1]) for step in launches.steps[num_launched:][:6]]
    assert shares == [(8, 12), (12, 8), (12, 8), (12, 8), (6, 12), (1, 12)]
    assert [important.output_token_ids] == tokens_of_whole_prompts(model, [[2] * 50], SHORT)


# Aborts


@ASYNC
@pytest.mark.parametrize("num_steps", range(8))
def test_abort_in_the_middle_of_a_prompt_frees_its_blocks_and_harms_nobody(
    model, is_async, num_steps
) -> None:
    engine = chunked_engine(model, max_num_batched_tokens=20, async_scheduling=is_async)
    long, other = make_requests([[1] * 100, [2, 3]], SHORT)
    engine.add_request(other)
    engine.add_request(long)
    for _ in range(num_steps):
        check_step(engine, engine.step())
    engine.abort_request(long.request_id)
    held = {*engine.kv_cache_manager.block_tables}
    assert long.request_id not in held
    check_blocks(engine)
    drain(engine, [])
    assert long.finish_reason is FinishReason.ABORT
    assert [other.output_token_ids] == tokens_of_whole_prompts(model, [[2, 3]], SHORT)


@ASYNC
def test_parent_that_is_aborted_in_the_middle_of_its_prompt_leaves_forks_that_compute_their_own(
    model, is_async
) -> None:
    engine = chunked_engine(model, max_num_batched_tokens=20, async_scheduling=is_async)
    family = forks(list(range(1, 81)), 3, SHORT)
    for request in family:
        engine.add_request(request)
    for _ in range(2):
        engine.step()
    engine.abort_request(family[0].request_id)
    drain(engine, [])
    expected = tokens_of_whole_prompts(model, [family[0].prompt_token_ids] * 3, SHORT)
    assert [request.output_token_ids for request in family] == [[], *expected[1:]]


@pytest.mark.parametrize("mode", PreemptionMode)
def test_request_preempted_in_the_middle_of_its_prompt_ends_with_the_same_tokens(
    model, monkeypatch, mode
) -> None:
    prompts = [[3] * 40, [4] * 36]
    engine = chunked_engine(
        model,
        num_blocks=22,
        block_size=4,
        max_model_len=80,
        max_chunk_tokens=2,
        preemption_mode=mode,
    )
    first, late = make_requests(prompts, LONG)
    launches = Launches(engine, monkeypatch)
    engine.add_request(first)
    while not first.output_token_ids:
        engine.step()
    run(engine, [late])
    assert [first.output_token_ids, late.output_token_ids] == tokens_of_whole_prompts(
        model, prompts, LONG
    )
    starts = [step["r1"][0] for step in launches.steps if "r1" in step]
    falls = [a for a, b in zip(starts, starts[1:], strict=False) if b < a]
    if mode is PreemptionMode.RECOMPUTE:
        assert falls
        assert falls[0] < 36, "it had not computed its whole prompt"
    else:
        assert not falls, "it went on where it was"


# Settings


@pytest.mark.parametrize("option", ["max_chunk_tokens", "max_num_batched_tokens"])
def test_chunk_or_budget_that_cannot_work_is_refused(option) -> None:
    with pytest.raises(ValueError, match=f"{option}.* must be at least"):
        EngineConfig(**{option: 0})


def test_budget_below_max_model_len_is_accepted() -> None:
    assert EngineConfig(max_model_len=16384).max_num_batched_tokens == 2048
