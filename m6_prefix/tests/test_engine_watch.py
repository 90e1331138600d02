"""An engine that is watched, paused and stepped, as its process does it."""

import pytest

from folovllm.model.loader import load_model
from folovllm.request import SamplingParams
from folovllm.testing.async_contract import write_model_with_tokenizer
from folovllm.testing.driver import make_requests

pytest.importorskip("zmq")
pytest.importorskip("msgspec")

from folovllm.entrypoints.core_messages import Pause, Resume, StepOnce, Unwatch, Watch
from folovllm.entrypoints.live.engine_watch import INTERVAL_S, EngineWatch
from folovllm.entrypoints.live.roofline import Roofline, step_work
from folovllm.hardware import Ceilings
from folovllm.model.cost import model_cost
from m6_prefix.config import EngineConfig
from m6_prefix.engine import LLMEngine

OPTIONS = {"max_model_len": 128, "kv_cache_bytes": 1 << 20, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model_with_tokenizer(tmp_path_factory.mktemp("model"))


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def watch(directory):
    engine = LLMEngine(EngineConfig(**OPTIONS), load_model(directory))
    watch = EngineWatch(engine, Clock())
    for request in make_requests([[5] * 20, [6] * 9], SamplingParams(max_tokens=6)):
        engine.add_request(request)
    return watch


def test_unwatched_engine_is_stepped_as_it_is(watch):
    scheduler, manager = watch._engine.scheduler, watch._engine.kv_cache_manager
    before = vars(scheduler).keys() | vars(manager).keys()
    watch.step()
    assert vars(scheduler).keys() | vars(manager).keys() == before
    assert not watch.has_story and not watch.has_news


def test_running_engine_tells_of_steps_that_are_far_enough_apart(watch):
    watch.act_on(Watch())
    told = []
    while watch._engine.has_unfinished_requests():
        watch._clock.now += INTERVAL_S * 0.4
        watch.step()
        if watch.has_story:
            told.append(watch.take_snapshot())
    assert [snapshot.num_steps for snapshot in told] == [1, 4]
    # The first step of an engine that plans ahead launches two.
    assert [planned.number for planned in told[0].planned] == [1, 2]
    assert told[0].story[0].startswith("Step 1: request r0 gets all of its 20 prompt tokens")
    assert told[0].story[-1] == "Of step 1, 2 tokens come out."
    assert [planned.number for planned in told[1].planned] == [5]
    assert told[1].story[-1] == "Of step 4, 2 tokens come out."
    assert watch.has_news, "the last steps have not been told"
    last = watch.take_snapshot()
    assert last.view.requests == [] and not watch.has_news
    assert last.view.memory.num_free == last.view.memory.num_units > 0
    watch.act_on(Unwatch())
    watch.note_change()
    assert not watch.has_news


def test_paused_engine_owes_a_step_per_click_and_tells_of_each(watch):
    watch.act_on(StepOnce())
    assert watch.may_step  # as it is not paused: the click is not kept
    for message in (Watch(), Pause()):
        watch.act_on(message)
    assert not watch.may_step
    for number in range(1, 4):
        watch.act_on(StepOnce())
        assert watch.may_step
        watch.step()
        assert not watch.may_step and watch.has_story
        assert watch.take_snapshot().num_steps == number
    watch.act_on(Resume())
    while watch._engine.has_unfinished_requests():
        assert watch.may_step
        watch.step()
    watch.act_on(Pause())
    watch.act_on(StepOnce())
    assert not watch.may_step
    assert watch.take_snapshot().story == ["Nothing to do: no request is unfinished."]


def test_roofline_of_a_step_counts_every_byte_and_operation_once(watch):
    cost = model_cost(watch._engine.model_runner.model)
    ceilings = Ceilings(copy_bytes_per_s=1e3, matmul_flops_per_s=1e30, dtype="float32")
    watch._roofline = Roofline(cost, ceilings)
    for message in (Watch(), Pause()):
        watch.act_on(message)
    watch.step()
    assert watch.take_snapshot().least_s is None  # two were planned in it
    watch.step()
    # Step 3: two decodes, behind prompts of 20 and 9 tokens and one token each.
    num_kv_tokens = (20 + 1) + (9 + 1) + 2
    num_bytes = cost.weight_bytes_read + num_kv_tokens * cost.kv_bytes_per_token
    (plan,) = watch._watch.take()[0]
    assert watch.take_snapshot().least_s == pytest.approx(num_bytes / 1e3)
    assert step_work(plan).num_attention_pairs == 22 + 11
    slow = Ceilings(copy_bytes_per_s=1e30, matmul_flops_per_s=1.0, dtype="float32")
    assert Roofline(cost, slow).least_s(plan) == cost.step_flops(step_work(plan))
