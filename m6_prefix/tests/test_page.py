"""The page's routes over a real engine: events, pause and step, keys, and the end."""

import asyncio
import base64
import hashlib
import json
import re
import signal
from contextlib import asynccontextmanager

import pytest

from folovllm.testing.async_contract import write_model_with_tokenizer
from folovllm.testing.server_process import ServerProcess, serving

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx")

KEY = {"Authorization": "Bearer swordfish"}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = write_model_with_tokenizer(tmp_path_factory.mktemp("model"))
    flags = ["--api-key", "swordfish", "--max-model-len", "128", "--kv-cache-bytes", "1MiB"]
    flags += ["--max-num-batched-tokens", "32", "--max-num-seqs", "4", "--device", "cpu"]
    flags += ["--measure-roofline"]
    log = directory / "server.log"
    with ServerProcess(serving("m6_prefix"), directory, log, *flags) as served:
        yield served


class Watcher:
    """One who has the page open."""

    def __init__(self, client, lines):
        self.client = client
        self._lines = lines

    async def until(self, is_it):
        """The first event of which that is true."""
        async with asyncio.timeout(20):
            async for line in self._lines:
                if line.startswith("data: ") and is_it(event := json.loads(line[6:])):
                    return event
        raise AssertionError("the events ended")

    async def snapshot(self, is_it=lambda event: True):
        return await self.until(lambda event: event["type"] == "snapshot" and is_it(event))

    async def press(self, action):
        answer = await self.client.post("/page/control", json={"action": action})
        assert answer.status_code == 200, answer.text
        return answer.json()["is_paused"]

    def ask(self, max_tokens=20):
        body = {"prompt": "Hello world", "max_tokens": max_tokens, "ignore_eos": True}
        return asyncio.create_task(self.client.post("/v1/completions", json=body))


@asynccontextmanager
async def watching(server):
    async with (
        httpx.AsyncClient(base_url=server.url, headers=KEY, timeout=30) as client,
        client.stream("GET", "/page/events") as stream,
    ):
        yield Watcher(client, stream.aiter_lines())


def test_page_is_one_piece_and_lets_nothing_else_run(server):
    answer = httpx.get(server.url)  # without the key: it holds nothing
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"(src|href)=.(?!data:,|#)", answer.text)
    assert not re.search(r"https?://|innerHTML|insertAdjacent|document\.write", answer.text)
    for kind in ("style", "script"):
        (text,) = re.findall(f"<{kind}>(.*?)</{kind}>", answer.text, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_strangers_and_other_sites_are_refused(server):
    def press(headers, content='{"action": "pause"}'):
        return httpx.post(f"{server.url}/page/control", headers=headers, content=content)

    assert httpx.get(f"{server.url}/page/events").status_code == 401
    assert press(JSON).status_code == 401
    other_site = {"Sec-Fetch-Site": "cross-site"}
    events = httpx.get(f"{server.url}/page/events", headers=KEY | other_site)
    assert events.status_code == press(KEY | JSON | other_site).status_code == 403
    assert press(KEY | {"Content-Type": "text/plain"}).status_code == 415
    assert press(KEY | JSON, '{"action": "explode"}').json()["error"]["param"] == "action"
    assert press(KEY | JSON).status_code == 409  # nobody watches


def test_paused_engine_takes_a_request_and_goes_step_by_step(server):
    async def run():
        async with watching(server) as watcher:
            facts = await watcher.until(lambda event: event["type"] == "facts")
            assert facts["stage"] == "m6_prefix" and facts["may_control"]
            assert facts["budget"] == 32 and facts["absent"]["blocks"] is None
            assert await watcher.press("pause")
            answer = watcher.ask()
            seen = await watcher.snapshot(lambda event: event["requests"])
            assert seen["is_paused"] and seen["requests"][0]["status"] == "waiting"
            other = watcher.ask()
            await watcher.snapshot(lambda event: len(event["requests"]) == 2)
            other.cancel()  # as a client that goes away
            await watcher.snapshot(lambda event: len(event["requests"]) == 1)
            assert (await watcher.ask(max_tokens=500)).status_code == 400
            before = seen["num_steps"]
            for number in range(1, 4):
                await watcher.press("step")
                seen = await watcher.snapshot(lambda event: event["story"])
                assert seen["num_steps"] == before + number
            assert re.match(r"Step \d+: request \d+ decodes one token\.", seen["story"][0])
            assert seen["planned"][0]["shares"][0]["is_decode"]
            assert seen["least_s"] > 0 and seen["step_s"] > 0
            (request,) = seen["requests"]
            held = [cell for cell in seen["memory"]["cells"] if cell >= 2]
            assert request["status"] == "running" and len(held) == request["num_blocks"] > 0
            assert not answer.done()
            assert not await watcher.press("resume")
            assert (await answer).json()["usage"]["completion_tokens"] == 20
            seen = await watcher.snapshot(lambda event: not event["requests"])
            assert not any(cell >= 2 for cell in seen["memory"]["cells"])
            assert 1 in seen["memory"]["cells"], "its blocks are kept for later prompts"
            rates = await watcher.until(lambda event: event["type"] == "rates")
            assert rates["ttft_p50_s"] > 0 and rates["hit_rate"] == 0

    asyncio.run(run())


def test_pause_ends_when_the_last_watcher_leaves(server):
    async def run():
        async with httpx.AsyncClient(base_url=server.url, headers=KEY, timeout=30) as client:
            async with watching(server) as first:
                async with watching(server) as second:
                    assert await second.press("pause")
                await first.snapshot()
                left = Watcher(client, None).ask()
                seen = await first.snapshot(lambda event: event["requests"])
                assert seen["is_paused"], "another one still watches"
            assert (await left).status_code == 200

    asyncio.run(run())


def test_end_of_the_server_does_not_wait_for_a_paused_engine(server):
    async def run():
        async with watching(server) as watcher:
            await watcher.press("pause")
            answer = watcher.ask()
            await watcher.snapshot(lambda event: event["requests"])
            server.process.send_signal(signal.SIGTERM)
            assert (await answer).json()["usage"]["completion_tokens"] == 20

    asyncio.run(run())
    assert server.process.wait(10) == 0
