"""Events of many streams go out together: slow clients, failures, and what /metrics counts."""

import asyncio
import time
from types import SimpleNamespace
from unittest.mock import AsyncMock

import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("starlette")

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from folovllm.entrypoints.async_stream import Bell
from folovllm.entrypoints.server.delivery import Delivery
from folovllm.entrypoints.server.errors import ApiError, invalid_value
from folovllm.entrypoints.server.event_stream import ClientGone, while_connected
from folovllm.entrypoints.server.histogram import BulkHistogram
from folovllm.entrypoints.server.protocol import ChatBody, CompletionBody
from folovllm.entrypoints.server.service import Service
from folovllm.entrypoints.server.settings import ServerSettings
from folovllm.request import SamplingParams


class Source:
    """Gives what `put` was given since it was asked last."""

    def __init__(self):
        self.is_finished = False
        self.num_asked = 0
        self._events = []
        self._ring = None

    def ring_with(self, ring):
        self._ring = ring

    def put(self, event, is_last=False):
        self._events.append((event, is_last))
        self._ring()

    def take_events(self):
        self.num_asked += 1
        events, self._events = self._events, []
        for event, _ in events:
            if isinstance(event, Exception):
                raise event
        self.is_finished = any(is_last for _, is_last in events)
        return b"".join(event for event, _ in events)


class Client:
    """Takes what is sent to it while `is_open` is set."""

    def __init__(self):
        self.bodies = []
        self.is_open = asyncio.Event()
        self.is_open.set()

    async def send(self, message):
        await self.is_open.wait()
        self.bodies.append(message["body"])


async def turns(count=4):
    for _ in range(count):
        await asyncio.sleep(0)


def start(delivery):
    source, client = Source(), Client()
    return source, client, asyncio.ensure_future(delivery.deliver(source, client.send))


def test_client_that_takes_nothing_is_not_asked_for_and_gets_all_later():
    async def run():
        delivery = Delivery()
        slow, slow_client, slow_end = start(delivery)
        quick, quick_client, quick_end = start(delivery)
        await turns()
        slow_client.is_open.clear()
        for event in (b"1", b"2", b"3"):
            for source in (slow, quick):
                source.put(event, event == b"3")
            await turns()
        await quick_end
        assert quick_client.bodies == [b"1", b"2", b"3"]
        assert slow_client.bodies == [] and slow.num_asked == 2  # at the start, and for b"1"
        slow_client.is_open.set()
        await slow_end
        assert slow_client.bodies == [b"1", b"23"]

    asyncio.run(run())


class Connection:
    """Of a client that stays until `leave` is set; `error` is what hearing of it raises."""

    def __init__(self, error=None):
        self.leave = asyncio.Event()
        self._error = error

    async def receive(self):
        await self.leave.wait()
        if self._error is not None:
            raise self._error
        return {"type": "http.disconnect"}


class Work:
    """Lasts until `finish` is set."""

    def __init__(self):
        self.finish = asyncio.Event()
        self.was_cancelled = False

    async def run(self):
        try:
            await self.finish.wait()
            return "result"
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise


@pytest.mark.parametrize("error", [None, OSError("reset")])
def test_work_ends_when_its_client_goes_and_the_task_goes_on(error):
    async def run():
        connection, work = Connection(error), Work()
        asyncio.get_running_loop().call_soon(connection.leave.set)
        with pytest.raises(ClientGone):
            await while_connected(connection.receive, work.run())
        assert work.was_cancelled and asyncio.current_task().cancelling() == 0
        work.finish.set()
        assert await while_connected(Connection().receive, work.run()) == "result"

    asyncio.run(run())


def test_client_that_goes_when_the_work_is_done_cancels_nothing():
    async def run():
        connection, work = Connection(), Work()
        work.finish.set()
        assert await while_connected(connection.receive, work.run()) == "result"
        connection.leave.set()
        await turns()
        assert asyncio.current_task().cancelling() == 0

    asyncio.run(run())


def test_cancelling_the_task_is_not_taken_for_the_client_going():
    async def run():
        connection, work = Connection(), Work()
        task = asyncio.ensure_future(while_connected(connection.receive, work.run()))
        await turns()
        task.cancel()
        connection.leave.set()  # at the same time
        with pytest.raises(asyncio.CancelledError):
            await task
        assert work.was_cancelled and task.cancelled()

    asyncio.run(run())


def test_error_of_a_prompt_names_what_the_prompt_was_made_of():
    error = ValueError("prompt 0 holds token id 400, but this model's ids are 0 to 399")
    for body in (ChatBody, CompletionBody):
        found = invalid_value(error, body.model_fields, body.prompt_field)
        assert found.content["param"] == {ChatBody: "messages", CompletionBody: "prompt"}[body]
    error = ValueError("stop_token_ids of prompt 0 holds token id 400")
    found = invalid_value(error, ChatBody.model_fields, ChatBody.prompt_field)
    assert found.content["param"] == "stop_token_ids"


def test_what_fails_ends_its_own_stream_only():
    async def run():
        delivery = Delivery()
        failing, _, failing_end = start(delivery)
        gone, gone_client, gone_end = start(delivery)
        late, late_client, late_end = start(delivery)
        fine, fine_client, fine_end = start(delivery)

        await turns()
        failing.put(ValueError("no text"))
        gone_client.is_open = Refusing(num_turns=0)
        late_client.is_open = Refusing(num_turns=2)
        for source in (gone, late, fine):
            source.put(b"1")
        with pytest.raises(ValueError, match="no text"):
            await failing_end
        for end in (gone_end, late_end):
            with pytest.raises(OSError, match="gone"):
                await end
        fine.put(b"2", True)
        await fine_end
        assert b"".join(fine_client.bodies) == b"12"

    asyncio.run(run())


class Refusing:
    """In place of a client's `is_open`."""

    def __init__(self, num_turns):
        self._num_turns = num_turns

    async def wait(self):
        await turns(self._num_turns)
        raise OSError("the client is gone")


def test_cancelled_delivery_sends_nothing_more_and_leaves_no_task():
    async def run():
        delivery = Delivery()
        source, client, end = start(delivery)
        await turns()
        client.is_open.clear()
        source.put(b"1")
        await turns()
        source.put(b"2")
        end.cancel()
        await asyncio.gather(end, return_exceptions=True)
        client.is_open.set()
        source.put(b"3")
        await turns()
        assert client.bodies == []
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_bell_is_heard_by_whoever_waits_later_and_by_one_reader_only():
    async def run():
        bell = Bell()
        bell.ring()
        await bell.wait()
        waiting = asyncio.ensure_future(bell.wait())
        await turns()
        with pytest.raises(RuntimeError, match="two tasks"):
            await bell.wait()
        assert not waiting.done()
        bell.ring()
        await waiting

    asyncio.run(run())


class Stream:
    """One prompt's outputs, of which none comes; `error` comes instead of the first."""

    def __init__(self, error=None):
        self.is_closed = False
        self._error = error

    async def __anext__(self):
        if self._error is not None:
            raise self._error
        await asyncio.Event().wait()

    def close(self):
        self.is_closed = True


def test_call_that_fails_takes_all_its_prompts_back():
    """A stream closes itself when its own reader ends; nobody ends the readers of the others."""

    async def run():
        streams = [Stream(), Stream(RuntimeError("no text"))]
        llm = SimpleNamespace(start=AsyncMock(return_value=streams))
        service = Service(llm, "toy", ServerSettings(), SamplingParams())
        request = SimpleNamespace(receive=asyncio.Event().wait)
        body = CompletionBody(prompt=[[5], [6]])
        with pytest.raises(RuntimeError, match="no text"):
            await service.complete(request, body)
        assert all(stream.is_closed for stream in streams)
        assert service.num_calls == 0

    asyncio.run(run())


def test_latencies_of_a_call_count_from_before_its_prompt_becomes_tokens():
    """Which may wait for a thread, and take long."""
    began_s = []

    def encode(*arguments, **options):
        began_s.append(time.perf_counter())
        return [5]

    tokenizer = SimpleNamespace(
        encode=encode, apply_chat_template=encode, decode=lambda *a, **o: ""
    )
    llm = SimpleNamespace(start=AsyncMock(side_effect=ValueError("prompt")), tokenizer=tokenizer)

    async def run():
        service = Service(llm, "toy", ServerSettings(), SamplingParams())
        request = SimpleNamespace(receive=asyncio.Event().wait)
        chat = ChatBody(messages=[{"role": "user", "content": "a"}])
        text = CompletionBody(prompt="a", add_special_tokens=False)
        for answer, body in ((service.chat, chat), (service.complete, text)):
            with pytest.raises(ApiError):
                await answer(request, body)
            assert llm.start.call_args.kwargs["arrival_time"] <= began_s[-1]
        assert len(began_s) == 2

    asyncio.run(run())


def test_histogram_of_many_equal_values_says_what_prometheus_own_says():
    bounds, labels = (0.001, 0.01, 0.5, 2.0), {"model_name": "toy", "engine": "0"}
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    bulk = BulkHistogram("vllm:gap_seconds", "A gap.", labels, bounds, ours)
    one = Histogram("vllm:gap_seconds", "A gap.", list(labels), registry=theirs, buckets=bounds)
    for value, count in ((0.01, 3), (0.25, 1), (7.0, 2), (0.0001, 5)):
        bulk.observe(value, count)
        for _ in range(count):
            one.labels(**labels).observe(value)

    def samples(registry):
        lines = generate_latest(registry).decode().splitlines()
        return sorted(line for line in lines if "_created" not in line)

    assert samples(ours) == samples(theirs)
