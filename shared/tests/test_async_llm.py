"""AsyncLLM over an engine in another process: aborts, slow readers, refusals, deaths."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("zmq")
pytest.importorskip("msgspec")

from folovllm.entrypoints.async_llm import AsyncLLM
from folovllm.entrypoints.async_stream import EngineDeadError, QueueFullError
from folovllm.entrypoints.core_watchdog import CoreWatchdog
from folovllm.entrypoints.outputs import RequestOutputKind
from folovllm.request import SamplingParams
from folovllm.testing.served_llm import ServedLLM
from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer

SHORT = SamplingParams(max_tokens=2)
LONG = SamplingParams(max_tokens=1900)
DELTA = RequestOutputKind.DELTA


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return save_byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))


async def all_gone(llm, within_s=5.0):
    """Wait until the engine has nothing to run: then it answers the next request in one step."""
    end = time.perf_counter() + within_s
    while llm.num_unfinished:
        assert time.perf_counter() < end
        await asyncio.sleep(0.01)


class StepRecorder:
    """Keeps the number of tokens of every step."""

    def __init__(self):
        self.num_tokens = []
        self.num_added = 0
        self.is_idle = asyncio.Event()

    def on_added(self, requests):
        self.num_added += len(requests)
        self.is_idle.clear()

    def on_step(self, step):
        self.num_tokens.append(len(step.tokens))

    def on_stopped(self, request_ids):
        pass

    def on_aborted(self, request_ids):
        pass

    def on_idle(self):
        self.is_idle.set()


def test_whoever_leaves_is_aborted_and_slow_readers_get_more_at_once(tokenizer_path):
    async def run():
        steps = StepRecorder()
        options = {"step_ms": 1.0, "max_queue_len": 5, "observers": [steps]}
        async with AsyncLLM(ServedLLM, tokenizer_path, **options) as llm:
            await check_nobody_counts_whom_the_engine_accepts_too_late(llm, steps)
            await check_prefixes_cannot_be_forgotten_where_none_are_kept(llm)
            await check_cancelled_task_is_aborted(llm, steps)
            await check_left_loop_is_aborted(llm, steps)
            await check_slow_reader(llm)
            await check_deltas_cost_what_is_new(llm)
            await check_names_and_refusals(llm)
            await check_latencies_count_from_before_prompts_become_tokens(llm)
            await check_queue_has_a_limit(llm)
            await all_gone(llm)
            await check_ids_wait_for_no_thread(llm)

    asyncio.run(run())


async def check_ids_wait_for_no_thread(llm):
    is_over = threading.Event()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    busy = asyncio.create_task(asyncio.to_thread(is_over.wait))
    await asyncio.sleep(0)  # it has the only thread now
    try:
        async with asyncio.timeout(10):
            outputs = [output async for output in llm.generate([5, 6, 7], SHORT)]
            assert outputs[-1].outputs[0].token_ids == [5, 6]
    finally:
        is_over.set()
        await busy
    with pytest.raises(ValueError, match="prompt 0 must be"):
        await llm.start([5])


async def check_nobody_counts_whom_the_engine_accepts_too_late(llm, steps):
    """Such a request has no step and no end: whoever had counted it would count it for ever."""
    os.kill(llm.process_id, signal.SIGSTOP)  # it cannot answer before the request was taken back
    try:
        leaving = asyncio.create_task(llm.start(["Hello world"], LONG))
        while not llm.num_unfinished:
            await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert steps.num_added == 0 == llm.num_unfinished
    finally:
        os.kill(llm.process_id, signal.SIGCONT)
    streams = await llm.start(["Hello world"], SHORT)  # its answer comes behind the other one's
    assert steps.num_added == 1
    assert [output.finished async for output in streams[0]][-1]


async def check_prefixes_cannot_be_forgotten_where_none_are_kept(llm):
    with pytest.raises(ValueError, match="keeps no prefixes"):
        llm.reset_prefix_cache()
    assert [output.finished async for output in llm.generate("Hello", SHORT)][-1]


async def check_cancelled_task_is_aborted(llm, steps):
    async def read():
        async for _ in llm.generate("Hello world", LONG):
            pass

    task = asyncio.create_task(read())
    while len(steps.num_tokens) < 5:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    num_steps = len(steps.num_tokens)
    await asyncio.wait_for(steps.is_idle.wait(), 5)
    assert len(steps.num_tokens) <= num_steps + 10  # of 1,900
    assert llm.num_unfinished == llm.num_queued == 0


async def check_left_loop_is_aborted(llm, steps):
    generator = llm.generate("Hello world", LONG, output_kind=DELTA)
    async for output in generator:
        if output.outputs:
            break
    await generator.aclose()
    await asyncio.wait_for(steps.is_idle.wait(), 5)
    assert llm.num_unfinished == 0


async def check_slow_reader(llm):
    params = SamplingParams(max_tokens=200)
    (slow,) = await llm.start(["Hello world"], params, output_kind=DELTA)
    fast = [output async for output in llm.generate("Hello", params, output_kind=DELTA)]
    assert len(fast) > 100  # one output for nearly every token: nobody waited for the slow one
    await all_gone(llm)
    outputs = [output async for output in slow]
    assert len(outputs) == 1 and len(outputs[0].outputs[0].token_ids) == 200


async def check_deltas_cost_what_is_new(llm):
    sizes = [
        (len(output.outputs[0].token_ids), len(output.outputs[0].text))
        async for output in llm.generate("Hello", SamplingParams(max_tokens=500), output_kind=DELTA)
    ]
    assert sum(tokens for tokens, _ in sizes) == 500
    assert max(tokens for tokens, _ in sizes[-100:]) < 50


async def check_names_and_refusals(llm):
    outputs = [o async for o in llm.generate("Hello", SamplingParams(max_tokens=2), "my-name")]
    assert {output.request_id for output in outputs} == {"my-name"}
    for prompt, params, message in (
        ("Hello", SamplingParams(max_tokens=3000), "max_model_len"),  # the engine says so
        ("", SamplingParams(), "no tokens"),
        ([100_000], SamplingParams(), "token id 100000"),
    ):
        with pytest.raises(ValueError, match=message):
            await llm.start([prompt], params)
    # Of several prompts, all are refused with the one that cannot run.
    with pytest.raises(ValueError, match="max_model_len"):
        await llm.start([[5] * 10, [5] * 200], SamplingParams(max_tokens=1900))


async def check_latencies_count_from_before_prompts_become_tokens(llm):
    began_s = []

    def parse(prompts):
        began_s.append(time.perf_counter())
        return AsyncLLM._parse(llm, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm, "_parse", parse)
        outputs = [output async for output in llm.generate("Hello", SHORT)]
        (stream,) = await llm.start(["Hello"], SHORT, arrival_time=5.0)
    assert outputs[-1].metrics.arrival_time <= began_s[0]
    assert [output.metrics.arrival_time async for output in stream][-1] == 5.0


async def check_queue_has_a_limit(llm):
    with pytest.raises(QueueFullError, match="5 may wait"):
        await llm.start(["a"] * 6, LONG)
    with pytest.raises(QueueFullError):
        await llm.start(["a"], SamplingParams(n=6))
    streams = await llm.start(["a"] * 5, LONG)
    assert llm.num_unfinished == 5
    for stream in streams:
        stream.close()
    assert llm.num_queued == 0


def test_engine_that_dies_tells_everybody_who_waits(tokenizer_path):
    async def run():
        options = {"step_ms": 1.0, "raise_at_step": 20}
        async with AsyncLLM(ServedLLM, tokenizer_path, **options) as llm:
            streams = await llm.start(["Hello", "world"], LONG)

            async def read(stream):
                async for _ in stream:
                    pass

            results = await asyncio.wait_for(
                asyncio.gather(*map(read, streams), return_exceptions=True), 10
            )
            assert [type(result) for result in results] == [EngineDeadError] * 2
            assert "the device is gone" in str(results[0])
            assert llm.died.is_set()
            with pytest.raises(EngineDeadError):
                await llm.start(["Hello"], LONG)

    asyncio.run(run())


def test_killed_engine_is_noticed_while_nothing_runs(tokenizer_path):
    async def run():
        async with AsyncLLM(ServedLLM, tokenizer_path) as llm:
            os.kill(llm.process_id, signal.SIGKILL)
            await asyncio.wait_for(llm.died.wait(), 10)
            with pytest.raises(EngineDeadError, match="killed by signal 9"):
                llm.check_alive()

    asyncio.run(run())


def test_mistake_at_start_up_is_raised_and_leaves_no_process(tokenizer_path):
    async def run():
        with pytest.raises(ValueError, match="unknown engine option 'max_num_seq'"):
            async with AsyncLLM(ServedLLM, tokenizer_path, max_num_seq=3):
                pass

    asyncio.run(run())


class Core:
    """Answers what it is asked, as far as `answers` goes; only then does it go unheard."""

    def __init__(self, answers, is_read):
        self.answers = answers
        self.is_read = is_read
        self.num_asked = 0
        self.silence = asyncio.Event()
        self._is_waiting = False
        self.watchdog = CoreWatchdog(self.ask, self.receive, self.silence.set, 0.01)

    def ask(self):
        self._is_waiting = self.num_asked < self.answers
        self.num_asked += 1
        if self.is_read:
            self.receive()

    def receive(self):
        if self._is_waiting:
            self._is_waiting = False
            self.watchdog.note_message()


@pytest.mark.parametrize("is_read", [True, False], ids=["read", "not read before the time is up"])
def test_watchdog_speaks_up_when_nothing_comes_and_not_before(is_read):
    async def run():
        core = Core(3, is_read)
        core.watchdog.start()
        await asyncio.wait_for(core.silence.wait(), 10)
        assert core.num_asked == 4
        quiet = Core(0, is_read)
        quiet.watchdog.start()
        quiet.watchdog.stop()
        await asyncio.sleep(0.03)
        assert not quiet.silence.is_set()

    asyncio.run(run())


FRONT = """
import asyncio, sys
from folovllm.entrypoints.async_llm import AsyncLLM
from folovllm.testing.served_llm import ServedLLM

async def main():
    async with AsyncLLM(ServedLLM, sys.argv[1]) as llm:
        print(llm.process_id, flush=True)
        await asyncio.sleep(100)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_engine_ends_with_a_front_that_was_killed(tokenizer_path, tmp_path):
    script = tmp_path / "front.py"
    script.write_text(FRONT)
    command = [sys.executable, str(script), str(tokenizer_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as front:
        core = int(front.stdout.readline())
        front.kill()
    end = time.perf_counter() + 10
    while Path(f"/proc/{core}").exists():
        assert time.perf_counter() < end
        time.sleep(0.02)
