"""Those who watch an engine: what they are sent, and how a pause ends."""

import asyncio
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("msgspec")
pytest.importorskip("starlette")

from folovllm.entrypoints.live.engine_view import EngineView
from folovllm.entrypoints.server.page import live_view
from folovllm.entrypoints.server.page.live_view import LiveView, Rates
from folovllm.entrypoints.server.page.routes import lets_pause
from folovllm.entrypoints.server.page.stage_facts import stage_facts
from folovllm.entrypoints.server.settings import ServerSettings
from folovllm.request import SamplingParams
from folovllm.testing.driver import make_requests


class FakeLLM:
    """Writes down what it is asked to do."""

    death = None
    num_unfinished = 0

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        return lambda *_: self.asked.append(name)


def make_view(**options):
    llm = FakeLLM()
    arguments = {"is_draining": lambda: False, "pause_timeout_s": 60.0, **options}
    return LiveView(llm, {"stage": "m9"}, **arguments), llm


async def read(events):
    return json.loads((await anext(events)).removeprefix(b"data: "))


def test_first_reader_starts_the_watch_and_the_last_one_ends_it_and_the_pause():
    async def run():
        view, llm = make_view()
        first, second = view.events(), view.events()
        assert await read(first) == {"type": "facts", "stage": "m9"}
        assert (await read(first))["type"] == "rates"
        await read(second)
        view.pause()
        await second.aclose()
        assert llm.asked == ["watch", "watch", "pause"] and view.is_paused
        await first.aclose()
        assert llm.asked[3:] == ["unwatch", "resume"] and not view.is_paused

    asyncio.run(run())


@pytest.mark.parametrize("options", [{"pause_timeout_s": 0.0}, {"is_draining": lambda: True}])
def test_pause_ends_by_itself(monkeypatch, options):
    monkeypatch.setattr(live_view, "TICK_S", 0.01)

    async def run():
        view, llm = make_view(**options)
        events = view.events()
        await read(events)
        view.pause()
        assert (await read(events))["is_paused"] is False
        assert llm.asked[-1] == "resume"
        async with asyncio.timeout(5):  # a server that ends lets its readers go
            number = 0
            while not view._is_draining() and number < 3:
                number += await read(events) is not None
        await events.aclose()

    asyncio.run(run())


def test_slow_reader_loses_the_oldest_events_and_no_memory_grows(monkeypatch):
    async def run():
        view, _ = make_view()
        events = view.events()
        await read(events)
        empty = EngineView(requests=[], num_left_out=0, memory=None)
        for number in range(1000):
            told = {"num_steps": number, "is_paused": False, "view": empty, "planned": []}
            view._on_snapshot(SimpleNamespace(**told, story=[], step_s=None, least_s=None))
        numbers = [(await read(events))["num_steps"] for _ in range(live_view._MAX_UNREAD)]
        assert numbers == list(range(1000 - live_view._MAX_UNREAD, 1000))
        await events.aclose()

    asyncio.run(run())


def test_rates_are_of_the_window_and_ttft_of_first_tokens():
    rates = Rates()
    rates._began_s = 0.0
    (request,) = make_requests([[1]], SamplingParams())
    request.arrival_time = 100.0
    rates.on_added([request])
    for time_s in (100.5, 101.0, 101.5):
        stats = SimpleNamespace(
            num_preemptions=1, num_prompt_tokens_looked_up=10, num_prompt_tokens_found=4
        )
        tokens = [SimpleNamespace(request_id="r0"), SimpleNamespace(request_id="other")]
        rates.on_step(SimpleNamespace(time_s=time_s, tokens=tokens, stats=stats))
    seen = rates.at(101.5)
    assert seen["tokens_per_s"] == 3.0 and seen["ttft_p50_s"] == 0.5 and seen["num_ttfts"] == 1
    assert seen["hit_rate"] == 0.4 and seen["num_preemptions"] == 3
    assert rates.at(103.2)["tokens_per_s"] == 1.0 and rates.at(110.0)["tokens_per_s"] == 0.0


@pytest.mark.parametrize(
    ("host", "key", "page", "expected"),
    [
        ("127.0.0.1", None, "auto", True),
        ("::1", None, "auto", True),
        ("localhost", None, "auto", True),
        ("0.0.0.0", None, "auto", False),
        ("0.0.0.0", "secret", "auto", True),
        ("0.0.0.0", None, "control", True),
        ("127.0.0.1", "secret", "watch", False),
    ],
)
def test_who_may_pause(host, key, page, expected):
    settings = ServerSettings(host=host, api_key=key, page=page)
    assert lets_pause(settings) is expected


def test_unknown_page_is_refused():
    with pytest.raises(ValueError, match="page must be one of"):
        ServerSettings(page="on")


@pytest.mark.parametrize(
    ("config", "keeps_prefixes", "absent"),
    [
        ({}, False, {"memory", "blocks", "hit_rate", "budget"}),
        ({"max_num_seqs": "4", "max_num_batched_tokens": "9"}, False, {"blocks", "hit_rate"}),
        ({"max_num_seqs": "4", "max_num_batched_tokens": "9", "block_size": "16"}, True, set()),
        ({"max_num_seqs": "4", "max_num_batched_tokens": "9", "block_size": "16",
          "enable_prefix_caching": "False"}, True, {"hit_rate"}),
    ],
)  # fmt: skip
def test_what_a_stage_has_not_is_said_with_a_reason(config, keeps_prefixes, absent):
    facts = SimpleNamespace(
        engine_config=config, keeps_prefixes=keeps_prefixes, max_model_len=9, tokenizer_path=None
    )
    told = stage_facts("m9", "toy", facts, has_roofline=False)["absent"]
    assert {name for name, reason in told.items() if reason} - {"roofline"} == absent
