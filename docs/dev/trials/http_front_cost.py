"""What a streamed token costs the process in front of the engine. On a CPU, without a model.

    PYTHONPATH=.:shared python docs/dev/trials/http_front_cost.py --output FILE.json

A server whose engine only sleeps (`testing/served_llm.py`) streams to N clients, one token each per
step; the clients are in this process and only count events. Reported are microseconds of processor
time of the front process (kernel included, from /proc/PID/schedstat) per token, of all its threads
and of the one that Python runs in, while all streams run. A step is long enough that the front can
follow; `events_per_token` says whether it did: if not, several tokens go out at once, which is
cheaper. Beside each row stands what a process needs that does nothing but write as many bytes to as
many sockets as often (uvloop, as in the server): the limit. Linux only.
"""

import argparse
import asyncio
import multiprocessing
import re
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from folovllm.hardware import describe_environment
from folovllm.json_files import write_json_atomically
from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer

_MAIN = (
    "import sys; from folovllm.cli.main import main; "
    "from folovllm.testing.served_llm import ServedLLM; sys.exit(main(ServedLLM, sys.argv[1:]))"
)
_WARM_UP_S = 1.0
_EVENT = b"118\r\ndata: " + b"x" * 272 + b"\n\n\r\n"
"""As long as one of the server's, in HTTP's chunked form."""


@dataclass(frozen=True)
class Reading:
    """Counters at one moment."""

    wall_s: float
    all_threads_s: float
    main_thread_s: float
    num_tokens: float
    num_events: int


class Clients:
    """Open streams, of which only the events are counted."""

    def __init__(self, port: int, body: dict[str, Any], path: str, num_streams: int) -> None:
        content = msgspec.json.encode(body)
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n\r\n"
        self.num_events = 0
        self._selector = selectors.DefaultSelector()
        self._sockets = []
        for _ in range(num_streams):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(head.encode() + content)
            self._selector.register(connection, selectors.EVENT_READ)
            self._sockets.append(connection)

    def read_until(self, end_s: float) -> None:
        """Count events until then, on the clock of `time.perf_counter`."""
        while (left_s := end_s - time.perf_counter()) > 0:
            for key, _ in self._selector.select(left_s):
                data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                if not data:
                    raise RuntimeError("a stream ended: give it more tokens")
                self.num_events += data.count(b"data: ")

    def close(self) -> None:
        for connection in self._sockets:
            connection.close()


def processor_time_s(schedstat: Path) -> float:
    return int(schedstat.read_text().split()[0]) / 1e9


def read_counters(process_id: int, port: int, clients: Clients) -> Reading:
    tasks = Path(f"/proc/{process_id}/task")
    return Reading(
        time.perf_counter(),
        sum(processor_time_s(task / "schedstat") for task in tasks.iterdir()),
        processor_time_s(tasks / str(process_id) / "schedstat"),
        num_generated(port),
        clients.num_events,
    )


def num_generated(port: int) -> float:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    found = re.search(rb"^vllm:generation_tokens_total{.*} (\S+)\r?$", answer, re.M)
    assert found is not None, answer
    return float(found[1])


def measure(process_id: int, port: int, call: str, num_streams: int, seconds: float) -> Any:
    """Processor time per token of one number of streams; the engine is idle before and behind."""
    body: dict[str, Any] = {"max_tokens": 100_000, "stream": True}
    if call == "chat":
        body["messages"] = [{"role": "user", "content": "The quick brown fox"}]
        path = "/v1/chat/completions"
    else:
        body["prompt"] = "The quick brown fox jumps over the lazy dog. "
        path = "/v1/completions"
    clients = Clients(port, body, path, num_streams)
    clients.read_until(time.perf_counter() + _WARM_UP_S)
    before = read_counters(process_id, port, clients)
    clients.read_until(time.perf_counter() + seconds)
    after = read_counters(process_id, port, clients)
    clients.close()
    time.sleep(0.5)
    num_tokens = after.num_tokens - before.num_tokens
    wall_s = after.wall_s - before.wall_s
    all_s = after.all_threads_s - before.all_threads_s
    main_s = after.main_thread_s - before.main_thread_s
    return {
        "us_per_token": all_s / num_tokens * 1e6,
        "main_thread_us_per_token": main_s / num_tokens * 1e6,
        "main_thread_busy": main_s / wall_s,
        "step_ms": wall_s / (num_tokens / num_streams) * 1e3,
        "events_per_token": (after.num_events - before.num_events) / num_tokens,
    }


def write_only(connection: Any, num_streams: int, step_s: float) -> None:
    """The limit, in a process of its own; sends its port through `connection`."""
    transports: list[Any] = []

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            transports.append(transport)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Protocol, "127.0.0.1", 0, backlog=2048)
        connection.send(server.sockets[0].getsockname()[1])
        while True:
            await asyncio.sleep(step_s)
            if len(transports) == num_streams:
                for transport in transports:
                    transport.write(_EVENT)

    uvloop.run(run())


def measure_limit(num_streams: int, step_ms: float, seconds: float) -> float:
    """Microseconds of processor time per event of `write_only`."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=write_only, args=(there, num_streams, step_ms / 1000))
    process.start()
    clients = Clients(here.recv(), {}, "/", num_streams)
    clients.read_until(time.perf_counter() + _WARM_UP_S)
    schedstat = Path(f"/proc/{process.pid}/schedstat")
    before = processor_time_s(schedstat), clients.num_events
    clients.read_until(time.perf_counter() + seconds)
    after = processor_time_s(schedstat), clients.num_events
    process.kill()
    process.join()
    clients.close()
    return (after[0] - before[0]) / (after[1] - before[1]) * 1e6


def start_server(tokenizer: Path, step_ms: float, log: Path) -> tuple[Any, int]:
    command = [sys.executable, "-c", _MAIN, "serve", "--model", str(tokenizer), "--port", "0"]
    command += ["--step-ms", str(step_ms), "--max-model-len", "200000"]
    process = subprocess.Popen(command, stdout=log.open("w"))
    while (found := re.search(r"http://127.0.0.1:(\d+)", log.read_text())) is None:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        time.sleep(0.05)
    return process, int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--calls", nargs="+", default=["completions", "chat"])
    parser.add_argument("--us-per-stream", type=float, default=150.0, help="a step lasts this long")
    parser.add_argument("--seconds", type=float, default=4.0, help="of one run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = save_byte_level_tokenizer(Path(folder))
        for num_streams in arguments.streams:
            step_ms = max(2.0, num_streams * arguments.us_per_stream / 1000)
            process, port = start_server(tokenizer, step_ms, Path(folder) / "log")
            for call in arguments.calls:
                runs = []
                for _ in range(arguments.runs):  # in turns: the machine may have other work
                    run = measure(process.pid, port, call, num_streams, arguments.seconds)
                    run["limit_us"] = measure_limit(num_streams, step_ms, arguments.seconds / 2)
                    runs.append(run)
                median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
                rows.append({"call": call, "streams": num_streams, **median, "runs": runs})
                numbers = ", ".join(f"{name} {value:.3g}" for name, value in median.items())
                print(f"{call}, {num_streams} streams: {numbers}", flush=True)
            process.terminate()
            process.wait()
    if arguments.output is not None:
        result = {
            "arguments": vars(arguments) | {"output": None},
            "environment": describe_environment(),
            "rows": rows,
        }
        write_json_atomically(arguments.output, result)


if __name__ == "__main__":
    main()
