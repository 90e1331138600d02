"""Steps launched ahead: the tokens of steps taken one by one, and nothing is left behind."""

from collections.abc import Callable
from itertools import count

import pytest

from folovllm.interfaces import StepOutput, TokenOutput
from folovllm.model.loader import load_model
from folovllm.request import FinishReason, Request, SamplingParams
from folovllm.sampling.sampler import TokensOnTheWay
from folovllm.testing.driver import check_idle, check_step, drain, make_requests, random_prompts
from folovllm.testing.line_interrupts import LineInterrupt
from folovllm.testing.toy_models import toy_families, write_toy_model
from m6_prefix import async_step
from m6_prefix.config import PreemptionMode
from m6_prefix.engine import LLMEngine
from m6_prefix.tests.invariants import check_blocks
from m6_prefix.tests.test_preemption import forks, make_engine

RULES = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0},
    "top-p": {"temperature": 1.2, "top_p": 0.8, "top_k": 30},
    "logprobs": {"temperature": 0.9, "logprobs": 3},
    "penalties": {"temperature": 0.0, "presence_penalty": 1.0, "frequency_penalty": 1.0},
    "repetition": {"temperature": 1.0, "repetition_penalty": 1.4},
    "min-tokens": {"temperature": 0.0, "min_tokens": 6, "stop_token_ids": list(range(120))},
    "bias": {"temperature": 0.0, "logit_bias": {7: 5.0, 8: 4.0}},
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
PENALTY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, repetition_penalty=1.3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = write_toy_model(toy_families()[3], tmp_path_factory.mktemp("toy"))
    return load_model(directory, dtype="float32")


def sync_engine(model, num_blocks: int = 64, **options) -> LLMEngine:
    return make_engine(model, num_blocks, async_scheduling=False, **options)


def reported(engine: LLMEngine, requests: list[Request]) -> dict[str, list[TokenOutput]]:
    """All that was reported of each request, after a run with all invariants."""
    tokens: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    for token in drain(engine, requests):
        tokens[token.request_id].append(token)
    return tokens


# Tokens


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_steps_ahead_report_what_steps_one_by_one_report(model, rules, chunk) -> None:
    """Tokens, log-probabilities and reasons, with plain requests beside those with rules."""
    prompts = random_prompts(seed=3, count=5, vocab_size=199, max_len=20)
    ruled = SamplingParams(max_tokens=12, **rules)
    found = []
    for make in (make_engine, sync_engine):
        requests = make_requests(
            prompts,
            [ruled, GREEDY, ruled, ruled, GREEDY],
            seeds=range(5),
            eos_token_ids=frozenset(range(150, 170)),
        )
        found.append(reported(make(model, num_blocks=64, max_chunk_tokens=chunk), requests))
    assert_same(*found)


def assert_same(
    actual: dict[str, list[TokenOutput]], expected: dict[str, list[TokenOutput]]
) -> None:
    assert actual.keys() == expected.keys()
    for name, tokens in actual.items():
        assert [t[:3] for t in tokens] == [t[:3] for t in expected[name]]
        for token, other in zip(tokens, expected[name], strict=True):
            assert (token.logprobs is None) == (other.logprobs is None)
            if token.logprobs is not None and other.logprobs is not None:
                assert token.logprobs.rank == other.logprobs.rank
                assert token.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-4)
                assert [i for i, _ in token.logprobs.top] == [i for i, _ in other.logprobs.top]


# Who is waited for


def in_flight_after_steps(engine: LLMEngine) -> list[int]:
    """After every step, how many others are under way."""
    counts = []
    while engine.has_unfinished_requests():
        engine.step()
        counts.append(len(engine.pipeline.in_flight))
    return counts


def test_next_step_is_under_way_whenever_a_step_returns(model) -> None:
    engine = make_engine(model, num_blocks=64)
    for request in make_requests([[1, 2, 3], [4]], GREEDY):
        engine.add_request(request)
    assert in_flight_after_steps(engine) == [1] * 9 + [0]


def test_no_step_is_under_way_without_async_scheduling(model) -> None:
    engine = sync_engine(model)
    for request in make_requests([[1, 2, 3], [4]], GREEDY):
        engine.add_request(request)
    assert in_flight_after_steps(engine) == [0] * 10


def test_penalties_wait_for_the_tokens_before_and_chunks_of_their_prompt_do_not(model) -> None:
    engine = make_engine(model, num_blocks=64, max_chunk_tokens=5)
    (request,) = make_requests([[7] * 20], PENALTY)
    engine.add_request(request)
    # Four chunks, of which the last brings the first token: from there on every step waits.
    assert in_flight_after_steps(engine) == [1, 1, 1, 0] + [0] * 9


def test_request_whose_maker_looks_at_every_token_waits_for_it(model) -> None:
    engine = make_engine(model, num_blocks=64)
    steered, other = make_requests([[1, 2], [3]], [GREEDY, GREEDY])
    steered.is_steered = True
    engine.add_request(steered)
    engine.step()
    engine.step()
    assert (steered.num_output_tokens, len(engine.pipeline.in_flight)) == (2, 0)
    engine.abort_request("r0")
    engine.add_request(other)
    assert in_flight_after_steps(engine) == [1] * 9 + [0]


def test_steps_run_ahead_again_when_the_request_with_penalties_is_gone(model) -> None:
    engine = make_engine(model, num_blocks=64)
    short = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, presence_penalty=0.5)
    for request in make_requests([[1, 2], [3]], [GREEDY, short]):
        engine.add_request(request)
    assert in_flight_after_steps(engine) == [0] * 3 + [1] * 6 + [0]


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_only_penalties_wait(model, rules) -> None:
    engine = make_engine(model, num_blocks=64)
    params = SamplingParams(max_tokens=8, ignore_eos=True, **{**rules, "min_tokens": 0})
    (request,) = make_requests([[1, 2, 3]], params)
    request.stop_token_ids = frozenset()
    engine.add_request(request)
    waits = any(name.endswith("penalty") for name in rules)
    assert in_flight_after_steps(engine) == ([0] * 8 if waits else [1] * 7 + [0])


# Ends


class Counted:
    """How often each request was part of a launched step, and the stats of all steps."""

    def __init__(self, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_launches: dict[str, int] = {}
        self.stats: list[object] = []
        launch, advance = engine.model_runner.launch, engine.scheduler.advance

        def counted_launch(scheduler_output):
            for s in scheduler_output.scheduled:
                name = s.request.request_id
                self.num_launches[name] = self.num_launches.get(name, 0) + 1
            return launch(scheduler_output)

        def counted_advance(scheduler_output):
            self.stats.append(advance(scheduler_output))
            return self.stats[-1]

        monkeypatch.setattr(engine.model_runner, "launch", counted_launch)
        monkeypatch.setattr(engine.scheduler, "advance", counted_advance)


def test_request_that_ends_by_length_is_never_computed_again(model, monkeypatch) -> None:
    engine = make_engine(model, num_blocks=64)
    counted = Counted(engine, monkeypatch)
    requests = make_requests([[1, 2], [3], [4]], [GREEDY, PENALTY, SamplingParams(max_tokens=1)])
    drain(engine, requests)
    assert counted.num_launches == {"r0": 10, "r1": 10, "r2": 1}


def test_request_that_ends_by_a_token_is_computed_once_too_often_and_not_told(
    model, monkeypatch
) -> None:
    (plain,) = make_requests([[5, 6, 7]], GREEDY)
    drain(sync_engine(model), [plain])
    stop = plain.output_token_ids[4]
    num_tokens = plain.output_token_ids.index(stop) + 1
    for options, too_often in (({}, 1), ({"async_scheduling": False}, 0)):
        engine = make_engine(model, num_blocks=64, **options)
        counted = Counted(engine, monkeypatch)
        params = SamplingParams(temperature=0.0, max_tokens=10, stop_token_ids=[stop])
        stopped, other = make_requests([[5, 6, 7], [9]], [params, GREEDY])
        tokens = [t for t in drain(engine, [stopped, other]) if t.request_id == "r0"]
        assert [t.token_id for t in tokens] == plain.output_token_ids[:num_tokens]
        assert tokens[-1].finish_reason is FinishReason.STOP
        assert counted.num_launches == {"r0": num_tokens + too_often, "r1": 10}
        assert (stopped.num_tokens, stopped.num_pending_tokens) == (3 + num_tokens, 0)


def test_stats_of_each_step_are_reported_once_and_in_order(model, monkeypatch) -> None:
    """Also of the step that computes nothing but what a stopped request does not need."""
    engine = make_engine(model, num_blocks=64, max_chunk_tokens=3)
    counted = Counted(engine, monkeypatch)
    found: list[object] = []
    stop = SamplingParams(temperature=0.0, max_tokens=10, stop_token_ids=list(range(199)))
    for params in (GREEDY, stop, PENALTY, stop, GREEDY):
        for request in make_requests([[5, 6, 7, 8], [9]], params):
            engine.add_request(request)
        while engine.has_unfinished_requests():
            output = engine.step()
            check_step(engine, output)
            found.append(output.stats)
    left = [step.stats for step in engine.pipeline.in_flight]
    assert [id(stats) for stats in found + left] == [id(stats) for stats in counted.stats]
    assert len({id(stats) for stats in counted.stats}) == len(counted.stats) > 20


# With a step under way


@pytest.mark.parametrize("num_steps", range(1, 9))
def test_abort_with_a_step_under_way_changes_nobodys_tokens(model, num_steps) -> None:
    prompts = random_prompts(seed=5, count=4, vocab_size=199, min_len=9, max_len=15)
    requests = make_requests(prompts, GREEDY)
    drain(sync_engine(model), requests)
    expected = [request.output_token_ids for request in requests]
    engine = make_engine(model, num_blocks=64, max_chunk_tokens=4)
    requests = make_requests(prompts, GREEDY)
    for request in requests:
        engine.add_request(request)
    for _ in range(num_steps):
        check_step(engine, engine.step())
    assert len(engine.pipeline.in_flight) == 1
    engine.abort_request("r1")
    engine.abort_request("r3")
    num_told = len(requests[1].output_token_ids)
    # The id is free at once, while the step of its first owner still runs.
    (heir,) = make_requests([prompts[1]], GREEDY, ids=["r1"])
    tokens = drain(engine, [heir])
    assert [t.token_id for t in tokens if t.request_id == "r1"] == expected[1]
    assert [requests[0].output_token_ids, requests[2].output_token_ids] == expected[::2]
    assert requests[1].output_token_ids == expected[1][:num_told]
    assert requests[1].finish_reason is FinishReason.ABORT


def test_everybody_aborted_leaves_an_engine_that_serves_the_next(model) -> None:
    engine = make_engine(model, num_blocks=64)
    first, second = make_requests([[1, 2, 3]] * 2, GREEDY, ids=["a", "b"])
    engine.add_request(first)
    engine.step()
    engine.abort_request("a")
    check_idle(engine)
    assert engine.step().tokens == ()  # what was under way
    assert engine.step().stats.num_scheduled_tokens == 0
    drain(engine, [second])
    (alone,) = make_requests([[1, 2, 3]], GREEDY)
    drain(sync_engine(model), [alone])
    assert second.output_token_ids == alone.output_token_ids


@pytest.mark.parametrize("mode", PreemptionMode)
@pytest.mark.parametrize("rules", ["greedy", "seeded", "penalties"])
def test_preemption_and_forks_with_a_step_under_way_change_no_token(model, mode, rules) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True, **RULES[rules])
    found, num_preemptions = [], 0
    for options in ({"async_scheduling": True}, {"async_scheduling": False}):
        engine = make_engine(
            model, num_blocks=18, preemption_mode=mode, max_num_batched_tokens=12, **options
        )
        requests = []
        for index, prompt in enumerate(random_prompts(seed=2, count=3, vocab_size=199, max_len=20)):
            for request in forks(prompt, 2, params):
                request.request_id = f"{index}-{request.request_id}"
                requests.append(request)
        for request in requests:
            engine.add_request(request)
        while engine.has_unfinished_requests():
            output = engine.step()
            check_step(engine, output)
            check_blocks(engine)
            num_preemptions += output.stats.num_preemptions
        check_idle(engine)
        found.append([request.output_token_ids for request in requests])
    assert found[0] == found[1]
    assert num_preemptions >= 4


# Errors


def fails_now_and_then(
    function: Callable[..., object], every: int, error: BaseException, *, after: bool
) -> Callable[..., object]:
    calls = count(1)

    def failing(*args):
        is_time = next(calls) % every == 0
        if is_time and not after:
            raise error
        result = function(*args)
        if is_time:
            raise error
        return result

    return failing


@pytest.mark.parametrize("rules", ["greedy", "seeded", "penalties"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("where", ["launch", "wait", "update", "advance", "schedule"])
def test_step_that_fails_loses_and_doubles_no_token(
    model, monkeypatch, where, after, error, rules
) -> None:
    params = SamplingParams(max_tokens=9, ignore_eos=True, **RULES[rules])
    prompts = random_prompts(seed=4, count=4, vocab_size=199, max_len=12)
    requests = make_requests(prompts, params, seeds=range(4))
    expected = reported(sync_engine(model), requests)
    engine = make_engine(model, num_blocks=20, max_chunk_tokens=4)
    owner = {"launch": engine.model_runner, "wait": TokensOnTheWay}.get(where, engine.scheduler)
    failing = fails_now_and_then(getattr(owner, where), 9, error, after=after)
    monkeypatch.setattr(owner, where, failing)
    again = make_requests(prompts, params, seeds=range(4))
    tokens: dict[str, list[TokenOutput]] = {request.request_id: [] for request in again}
    for request in again:
        engine.add_request(request)
    num_errors = 0
    for _ in range(500):
        if not engine.has_unfinished_requests():
            break
        try:
            output: StepOutput = engine.step()
        except type(error):
            num_errors += 1
            assert not engine.pipeline.in_flight
            assert engine.kv_cache_manager.num_used_blocks == 0
            continue
        check_step(engine, output)
        check_blocks(engine)
        for token in output.tokens:
            tokens[token.request_id].append(token)
    check_idle(engine)
    assert_same(tokens, expected)
    assert num_errors >= 1


def test_abort_that_broke_off_brings_no_token_twice(model, monkeypatch) -> None:
    """Ctrl-C where the aborted request is in no queue, with a step of the others under way."""
    expected, _ = make_requests([[1, 2, 3], [4, 5]], GREEDY)
    drain(sync_engine(model), [expected])
    engine = make_engine(model, num_blocks=64)
    survivor, victim = make_requests([[1, 2, 3], [4, 5]], GREEDY)
    engine.add_request(survivor)
    engine.add_request(victim)
    tokens = [*engine.step().tokens, *engine.step().tokens]
    with monkeypatch.context() as patch:
        free = fails_now_and_then(engine.kv_cache_manager.free, 1, KeyboardInterrupt(), after=True)
        patch.setattr(engine.kv_cache_manager, "free", free)
        with pytest.raises(KeyboardInterrupt):
            engine.abort_request("r1")
    tokens += drain(engine, [])
    told = [token.token_id for token in tokens if token.request_id == "r0"]
    assert told == survivor.output_token_ids == expected.output_token_ids
    assert victim.finish_reason is FinishReason.ABORT


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
def test_interrupt_at_any_line_of_the_pipeline_changes_no_token(model, is_async) -> None:
    prompts, params = [[1, 2, 3, 4, 5], [6, 7]], SamplingParams(temperature=0.0, max_tokens=3)
    requests = make_requests(prompts, params)
    expected = reported(sync_engine(model), requests)
    for line_number in count(1):
        engine = make_engine(model, 20, max_chunk_tokens=3, async_scheduling=is_async)
        interrupt = LineInterrupt([async_step.__file__], line_number)
        tokens: dict[str, list[TokenOutput]] = {"r0": [], "r1": []}
        for request in make_requests(prompts, params):
            engine.add_request(request)
        for _ in range(50):
            if not engine.has_unfinished_requests():
                break
            try:
                with interrupt:
                    output = engine.step()
            except KeyboardInterrupt:
                continue
            check_step(engine, output)
            for token in output.tokens:
                tokens[token.request_id].append(token)
        check_idle(engine)
        assert tokens == expected, f"interrupted at line {line_number}"
        if not interrupt.has_fired:
            assert line_number > 40
            break
