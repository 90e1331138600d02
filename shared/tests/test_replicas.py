"""Two engines under Ray Serve behind one address, through real clients; some of them are killed."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from folovllm.testing.server_process import SERVED_LLM, ServerProcess
from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer

pytest.importorskip("ray", reason="the extra `ray` is not installed")
from folovllm.entrypoints.server.replicas.run import resources

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.ray

KEY = "swordfish-1"


class Replicas(ServerProcess):
    """A server of two engines."""

    def __init__(self, log, *flags):
        tokenizer = save_byte_level_tokenizer(log.parent)
        flags = ("--replicas", "2", "--api-key", KEY, *flags)
        super().__init__(SERVED_LLM, tokenizer, log, *flags, api_key=KEY, start_s=120)

    def metric(self, name):
        """Engine -> value; engines without one are missing."""
        text = self.http.get("/metrics").text
        found = re.findall(rf'^vllm:{name}{{engine="(\d)".*}} (\S+)$', text, re.M)
        return {engine: float(value) for engine, value in found}

    def wait_until(self, is_so, within_s=60.0):
        end = time.perf_counter() + within_s
        while not is_so():
            assert time.perf_counter() < end, self.log.read_text()
            time.sleep(0.1)

    def descendants(self):
        """Process id -> its command, of all that the server started."""
        children, commands = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                commands[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(folder.name))
        found, left = {}, [self.process.pid]
        while left:
            for child in children.get(left.pop(), []):
                found[child] = commands[child]
                left.append(child)
        return found

    def replicas(self):
        return [pid for pid, name in self.descendants().items() if "ServeReplica" in name]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Replicas(tmp_path_factory.mktemp("server") / "log", "--step-ms", "2") as served:
        yield served


def test_conversations_stay_with_their_engine_and_others_are_spread(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["toy"]
    for user in ("ann", "bob"):
        before = server.metric("request_success_total")
        messages = [{"role": "user", "content": f"I am {user}. " * 20}]
        for _ in range(3):
            chunks = client.chat.completions.create(
                model="toy", messages=messages, max_completion_tokens=5, stream=True
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "?"}]
        after = server.metric("request_success_total")
        grown = [value - before.get(engine, 0) for engine, value in after.items()]
        assert sorted(grown)[-1] == 3 and sum(grown) == 3
    assert server.metric("request_success_total") == {"0": 3, "1": 3}


def test_errors_are_those_of_one_server(server):
    call = {"prompt": "Hello", "max_tokens": 3}
    for body, status, param in (
        (call | {"model": "other"}, 404, "model"),
        (call | {"temperature": -1}, 400, "temperature"),
        ({}, 400, "prompt"),
    ):
        answer = server.http.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert server.http.post("/v1/completions", content=b"{").status_code == 400
    assert server.http.post("/v1/completions", content=b"a" * (5 << 20)).status_code == 413
    assert server.http.get("/nothing").json()["error"]["message"]
    assert server.http.get("/health").status_code == 200
    for path in ("/v1/completions", "/tokenize"):
        answer = httpx.post(server.url + path, json=call)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert httpx.get(server.url + "/v1/models").status_code == 401


def test_client_that_goes_is_aborted(server):
    before = sum(server.metric("generation_tokens_total").values())
    body = {"prompt": "Hello", "max_tokens": 1900, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as stream:
        next(stream.iter_lines())
    server.wait_until(lambda: not any(server.metric("num_requests_running").values()))
    assert sum(server.metric("generation_tokens_total").values()) - before < 500  # of 1,900


def test_killed_replica_costs_begun_streams_an_error_and_comes_back(server):
    async def run():
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as client:

            async def whole(number):
                call = {"prompt": f"{number} " * 99, "max_tokens": 700}
                return await client.post("/v1/completions", json=call)

            async def stream(number):
                call = {"prompt": f"{number} " * 99, "max_tokens": 700, "stream": True}
                async with client.stream("POST", "/v1/completions", json=call) as answer:
                    lines = [line async for line in answer.aiter_lines() if line]
                assert lines[-1] == "data: [DONE]"
                return '"error"' in lines[-2], len(lines)

            wholes = [asyncio.create_task(whole(number)) for number in range(4)]
            streams = [asyncio.create_task(stream(number)) for number in range(4, 8)]
            while sum(server.metric("num_requests_running").values()) < 8:
                await asyncio.sleep(0.05)
            os.kill(server.replicas()[0], signal.SIGKILL)
            answers = await asyncio.gather(*wholes)
            assert [answer.status_code for answer in answers] == [200] * 4
            assert all(a.json()["usage"]["completion_tokens"] == 700 for a in answers)
            ends = await asyncio.gather(*streams)
            assert 0 < sum(is_error for is_error, _ in ends) < 4
            assert all(is_error or num_lines > 100 for is_error, num_lines in ends)

    asyncio.run(run())
    server.wait_until(lambda: len(server.metric("num_requests_running")) == 2)


def test_replica_whose_engine_died_is_replaced_and_its_calls_answered(server):
    pids = server.replicas()
    engines = [pid for pid, name in server.descendants().items() if "spawn_main" in name]
    assert len(pids) == len(engines) == 2
    for pid in engines:
        os.kill(pid, signal.SIGKILL)
    answer = server.http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 3})
    assert answer.status_code == 200
    server.wait_until(lambda: len(server.metric("num_requests_running")) == 2)
    assert not set(pids) & set(server.replicas())


def test_signal_lets_calls_end_and_leaves_no_process(server):
    processes = [server.process.pid, *server.descendants()]

    async def run():
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as client:
            call = {"prompt": "Hello", "max_tokens": 400}
            running = asyncio.create_task(client.post("/v1/completions", json=call))
            while not any(server.metric("num_requests_running").values()):
                await asyncio.sleep(0.02)
            server.process.send_signal(signal.SIGTERM)
            while (await client.get("/health")).status_code == 200:
                await asyncio.sleep(0.02)
            assert (await client.post("/v1/completions", json=call)).status_code == 503
            assert (await running).json()["usage"]["completion_tokens"] == 400

    asyncio.run(run())
    assert server.process.wait(60) == 0, server.log.read_text()
    assert [pid for pid in processes if Path(f"/proc/{pid}").exists()] == []
    assert "Hello" not in server.log.read_text()


@pytest.mark.parametrize(
    ("num_replicas", "device", "cluster", "expected"),
    [
        (2, "auto", {"CPU": 9.0}, {"num_cpus": 4}),
        (3, "cpu", {"CPU": 2.0, "GPU": 8.0}, {"num_cpus": 42 / 64}),
        (4, "auto", {"CPU": 64.0, "GPU": 4.0}, {"num_gpus": 1, "num_cpus": 1}),
        (2, "cuda", {"CPU": 8.0, "GPU": 1.0}, "need as many GPUs"),
        (2, "auto", {"CPU": 8.0, "GPU": 1.0}, "need as many GPUs"),
        (2, "cuda:1", {"CPU": 8.0, "GPU": 2.0}, "leave out the number"),
    ],
)
def test_every_replica_gets_a_gpu_or_its_share_of_the_cores(
    num_replicas, device, cluster, expected
):
    if isinstance(expected, dict):
        assert resources(num_replicas, device, cluster) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            resources(num_replicas, device, cluster)


def test_cluster_that_is_not_there_is_said_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    command = [
        sys.executable,
        "-c",
        SERVED_LLM,
        "serve",
        "--replicas",
        "2",
        "--ray-address",
        address,
    ]
    done = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"nothing answers at ray_address {address}" in done.stderr


def test_mistake_is_one_line():
    command = [sys.executable, "-c", SERVED_LLM, "serve", "--replicas", "2", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "name the directory of a tokenizer" in line
