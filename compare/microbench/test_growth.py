"""How the host's work grows with what waits, what runs and how long requests already are.

What a step costs should follow its requests and their new tokens. The points differ in one thing at
a time, so that the table shows what follows the history or the queue instead.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
import torch

from folovllm.model.config import kv_bytes_per_token
from folovllm.request import Request, SamplingParams
from folovllm.sampling.sampler import Sampler

from .conftest import record, stage_names

NUM_WAITING = (1_000, 100_000)
RUNNING_AND_HISTORY = ((64, 100), (1024, 100), (256, 2_000), (64, 8_000))
"""Requests at once and tokens of each."""
ROUNDS = 20
MAX_TOKENS = 200
"""Of output; more than all rounds of all benchmarks of one engine take."""
VOCAB_SIZE = 512
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
PENALTIES = SamplingParams(
    max_tokens=MAX_TOKENS, repetition_penalty=1.1, presence_penalty=0.5, ignore_eos=True
)


@dataclass
class Load:
    """An engine under load, and the numbers of its requests."""

    engine: Any
    num_waiting: int
    num_running: int
    history: int
    names: Iterator[str] = field(default_factory=lambda: (f"r{n}" for n in count()))
    added: list[Request] = field(default_factory=list)

    def add(self, params: SamplingParams = GREEDY) -> Request:
        name = next(self.names)
        first = len(self.added)
        prompt = [(first + position) % VOCAB_SIZE for position in range(self.history)]
        request = Request(request_id=name, prompt_token_ids=prompt, sampling_params=params)
        self.engine.add_request(request)
        self.added.append(request)
        return request

    def update(self, scheduled: Any) -> Any:
        """As if the forward pass between schedule() and update() had taken place."""
        return record(self.engine.scheduler, scheduled)

    def describe(self, benchmark: Any) -> None:
        benchmark.extra_info["num_waiting"] = self.num_waiting
        benchmark.extra_info["num_running"] = self.num_running
        benchmark.extra_info["history"] = self.history


def make_load(name: str, model: Any, num_waiting: int, num_running: int, history: int) -> Load:
    """An engine with this many requests past their prompts, and this many behind them."""
    stage = importlib.import_module(name)
    max_model_len = history + MAX_TOKENS
    num_kv_tokens = num_running * (max_model_len + 16)
    options = {"kv_cache_bytes": num_kv_tokens * kv_bytes_per_token(model.config, model.dtype)}
    if name != "m1_baseline":
        options |= {"max_num_seqs": num_running, "max_num_batched_tokens": num_kv_tokens}
    engine = stage.LLMEngine(stage.EngineConfig(max_model_len=max_model_len, **options), model)
    load = Load(engine, num_waiting, num_running, history)
    for _ in range(num_running):
        load.add()
    while any(request.num_output_tokens == 0 for request in load.added):
        load.update(engine.scheduler.schedule())
    for _ in range(num_waiting):
        load.add()
    return load


@pytest.fixture(
    scope="module",
    params=[(name, n) for n in NUM_WAITING for name in stage_names()],
    ids=lambda param: f"{param[0]}-{param[1]}-waiting",
)
def waiting(request: pytest.FixtureRequest, long_model: Any) -> Load:
    """A stage with 64 short requests running (the first one: 1) and very many waiting."""
    name, num_waiting = request.param
    if not request.config.getoption("--benchmark-only"):
        num_waiting = min(num_waiting, 1_000)  # nothing is timed, only tried
    return make_load(name, long_model, num_waiting, 1 if name == "m1_baseline" else 64, 8)


@pytest.fixture(
    scope="module",
    params=[
        (name, *point)
        for point in RUNNING_AND_HISTORY
        for name in stage_names()
        if name != "m1_baseline"
    ],
    ids=lambda param: f"{param[0]}-{param[1]}x{param[2]}",
)
def running(request: pytest.FixtureRequest, long_model: Any) -> Load:
    """A batching stage, full, and nothing waits."""
    name, num_running, history = request.param
    return make_load(name, long_model, 0, num_running, history)


def test_add(benchmark: Any, waiting: Load) -> None:
    waiting.describe(benchmark)
    benchmark.pedantic(waiting.add, rounds=ROUNDS)


def test_step_before_a_queue(benchmark: Any, waiting: Load) -> None:
    """schedule() and update() when nobody can be admitted."""
    waiting.describe(benchmark)
    scheduler = waiting.engine.scheduler
    output = benchmark.pedantic(lambda: waiting.update(scheduler.schedule()), rounds=ROUNDS)
    assert len(output.tokens) == waiting.num_running


def test_abort_waiting(benchmark: Any, waiting: Load) -> None:
    """One of the middle of the queue, at every round another."""
    waiting.describe(benchmark)
    middle = iter(waiting.added[len(waiting.added) // 2 :])
    num_before = len(waiting.engine.scheduler.requests)
    benchmark.pedantic(lambda: waiting.engine.abort_request(next(middle).request_id), rounds=ROUNDS)
    assert len(waiting.engine.scheduler.requests) < num_before


def test_schedule(benchmark: Any, running: Load) -> None:
    running.describe(benchmark)
    scheduled: list[Any] = []

    def finish_step() -> None:
        if scheduled:
            running.update(scheduled.pop())

    def schedule() -> None:
        scheduled.append(running.engine.scheduler.schedule())

    benchmark.pedantic(schedule, setup=finish_step, rounds=ROUNDS)
    assert len(scheduled[0].scheduled) == running.num_running
    finish_step()


def test_update(benchmark: Any, running: Load) -> None:
    running.describe(benchmark)

    def schedule() -> tuple[tuple[Any], dict[str, Any]]:
        return (running.engine.scheduler.schedule(),), {}

    output = benchmark.pedantic(running.update, setup=schedule, rounds=ROUNDS)
    assert len(output.tokens) == running.num_running


@torch.inference_mode()
def test_prepare(benchmark: Any, running: Load) -> None:
    """prepare_inputs(); at every round all requests are a token longer."""
    running.describe(benchmark)
    scheduled: list[Any] = []

    def next_step() -> tuple[tuple[Any], dict[str, Any]]:
        if scheduled:
            running.update(scheduled.pop())
        scheduled.append(running.engine.scheduler.schedule())
        return (scheduled[0],), {}

    benchmark.pedantic(
        running.engine.model_runner.prepare_inputs, setup=next_step, rounds=ROUNDS, warmup_rounds=2
    )
    running.update(scheduled.pop())


def test_abort_running(benchmark: Any, running: Load) -> None:
    """One of the middle of those that run, at every round another."""
    running.describe(benchmark)
    middle = iter(running.added[len(running.added) // 4 :])
    benchmark.pedantic(lambda: running.engine.abort_request(next(middle).request_id), rounds=ROUNDS)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("num_running", "history"), [(256, 100), (256, 2_000), (256, 8_000), (1024, 500)]
)
def test_prepare_penalties(
    benchmark: Any, device: torch.device, num_running: int, history: int
) -> None:
    """Sampler.prepare() where rules look at all tokens; every round brings one per request."""
    requests = [
        Request(
            request_id=f"r{index}",
            prompt_token_ids=[(index + position) % VOCAB_SIZE for position in range(history)],
            sampling_params=PENALTIES,
            seed=index,
        )
        for index in range(num_running)
    ]
    sampler = Sampler(VOCAB_SIZE, device)

    def next_step() -> tuple[tuple[Any], dict[str, Any]]:
        for request in requests:
            request.append_output_token(7)
        return (requests,), {}

    benchmark.pedantic(sampler.prepare, setup=next_step, rounds=ROUNDS, warmup_rounds=1)
