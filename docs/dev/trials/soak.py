"""Minutes of mixed and bad load against a server of several engines, which are killed meanwhile.

    PYTHONPATH=.:shared python docs/dev/trials/soak.py --output FILE.json \
        [--minutes 20] [--replicas 2] [--stage m6_prefix] [-- OPTIONS OF serve]

Clients ask for completions and chats, short and long, whole and streamed; go away before or in
the middle of an answer; read slowly; send bodies that are none; half requests; and every half
minute more at once than may wait. Every two minutes a replica is killed, or its engine. What is
checked, and written down: every call that was not given up got an answer or an error that says
what is wrong; memory does not grow; in the end nothing runs, no block is held, and the server ends
without leaving a process. With --replicas 1 nothing is killed, since the engine's end is the
server's there; but what the engine counted as finished and aborted must be what the clients saw.

Exit status 0 if all of it held. Needs Linux: it reads /proc.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from replica_routing import metric, wait_until_up

from folovllm.hardware import describe_environment, package_version

SERVE = ["--max-model-len", "512", "--kv-cache-bytes", "32MiB", "--max-num-seqs", "8"]
SERVE += ["--max-queue-len", "8"]
NUM_CLIENTS = 6
BURST, BURST_EVERY_S, SAMPLE_EVERY_S = 48, 30.0, 10.0
TIMEOUT_S = 180.0
"""Whoever has no answer by then hangs."""
MALFORMED = (
    b"", b"{", b"[]", b"null", b'{"prompt": 5}', b'{"prompt": []}', b'{"messages": 1}', b"\xff",
    b"[" * 5000, b'{"prompt": "a", "temperature": -1}', b'{"prompt": "a", "nonsense": 1}',
    b'{"prompt": "a", "max_tokens": 0}', b'{"prompt": "\\ud800"}', b'{"prompt": "a", "n": 1e99}',
    b'{"prompt": "' + b"a " * 4000 + b'"}', b'{"prompt": [99999999]}', b'{"prompt": "a", "n": 999}',
)  # fmt: skip
LENGTHS = (0, 1, 1, 1, 4)
"""Topics in a row: prompts of a few tokens, of about 60, and of about 220."""
ROLES = {"ServeReplica": "replicas", "spawn_main": "engines", "ServeController": "controller"}
ROLES |= {"resource_tracker": "Python's"}
MAX_GROWTH = 1.10
"""Of the memory of all processes, from the second quarter of the time to the last."""


@dataclass
class Tally:
    """What became of the calls."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    unclear: list[str] = field(default_factory=list)

    def count(self, kind: str, outcome: str, is_clear: bool) -> None:
        self.outcomes.setdefault(kind, Counter())[outcome] += 1
        if not is_clear:
            self.unclear.append(f"{kind}: {outcome}")


class Clients:
    """Of one server; all of them draw from the same random numbers."""

    def __init__(self, port: int, tally: Tally, rng: random.Random) -> None:
        self._port = port
        self._tally = tally
        self._rng = rng
        self._topics = [f"Topic {i}: " + "tell me about the sea. " * 8 for i in range(12)]
        self._kinds: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "whole": (4, self.whole),
            "stream": (6, self.stream),
            "gone before the answer": (1, self.leave_early),
            "gone in the answer": (2, self.leave_late),
            "slow reader": (1, self.read_slowly),
            "malformed": (3, self.send_nonsense),
            "half a request": (1, self.send_half),
        }

    async def ask_until(self, end_s: float) -> None:
        names = list(self._kinds)
        weights = [weight for weight, _ in self._kinds.values()]
        while time.monotonic() < end_s:
            (name,) = self._rng.choices(names, weights)
            await self._kinds[name][1]()

    async def burst(self) -> None:
        await asyncio.gather(
            *(self._judge("burst", self._body(stream=False)) for _ in range(BURST))
        )

    async def whole(self) -> None:
        await self._judge("whole", self._body(stream=False))

    async def stream(self) -> None:
        await self._judge("stream", self._body(stream=True))

    async def read_slowly(self) -> None:
        await self._judge("slow reader", self._body(stream=True, max_tokens=48), pause_s=0.2)

    async def send_nonsense(self) -> None:
        """Every one must be refused, and none be a mistake of the server."""
        path = self._rng.choice(("/v1/completions", "/v1/chat/completions", "/tokenize"))
        body = self._rng.choice(MALFORMED)
        if path == "/tokenize" and body.startswith(b'{"prompt": "a'):
            path = "/v1/completions"  # a text of any length can be tokenised
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status, content = await self._call(path, body, 0.0)
        except (OSError, TimeoutError, ValueError) as error:
            self._tally.count("malformed", f"no answer: {type(error).__name__} {error}", False)
            return
        is_refused = 400 <= status < 500 or status == 503  # where no engine was there to refuse it
        self._tally.count("malformed", f"status {status}", is_refused and b'"message"' in content)

    async def leave_early(self) -> None:
        await self._give_up("gone before the answer", self._body(stream=False), num_read=0)

    async def leave_late(self) -> None:
        body = self._body(stream=True, max_tokens=200)
        await self._give_up("gone in the answer", body, num_read=200)

    async def send_half(self) -> None:
        await self._give_up("half a request", self._body(stream=False)[:20], num_read=0, more=100)

    def _body(self, *, stream: bool, max_tokens: int | None = None) -> bytes:
        chapter = f"Chapter {self._rng.randrange(50)}."
        topic = self._rng.choice(self._topics) * self._rng.choice(LENGTHS) + chapter
        body = {"max_tokens": max_tokens or self._rng.randrange(1, 16), "ignore_eos": True}
        if self._rng.random() < 0.5:
            body |= {"messages": [{"role": "user", "content": topic}]}
        else:
            body |= {"prompt": topic}
        return json.dumps(body | {"stream": stream}).encode()

    async def _judge(self, kind: str, body: bytes, pause_s: float = 0.0) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status, content = await self._call(_path(body), body, pause_s)
        except (OSError, TimeoutError, ValueError) as error:
            self._tally.count(kind, f"no answer: {type(error).__name__} {error}", False)
            return
        self._tally.count(kind, *_outcome(status, content, is_stream=b'"stream": true' in body))

    async def _call(self, path: str, body: bytes, pause_s: float) -> tuple[int, bytes]:
        """Status and body; ValueError for an answer that is cut off."""
        reader, writer = await self._send(path, body, len(body))
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            content = bytearray()
            while piece := await reader.read(64 if pause_s else -1):
                content += piece
                await asyncio.sleep(pause_s)
            is_chunked = b"transfer-encoding: chunked" in head.lower()
            return int(head.split()[1]), _joined(content) if is_chunked else bytes(content)
        except asyncio.IncompleteReadError as error:
            raise ValueError(f"cut off behind {error.partial!r}") from None
        finally:
            writer.close()

    async def _give_up(self, kind: str, body: bytes, num_read: int, more: int = 0) -> None:
        """Close the connection when so many bytes have been read, or at once."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                reader, writer = await self._send(_path(body), body, len(body) + more)
                if num_read:
                    await reader.read(num_read)
                else:
                    await asyncio.sleep(self._rng.random() * 0.3)
                writer.close()
            self._tally.count(kind, "given up", True)
        except (OSError, TimeoutError) as error:
            self._tally.count(kind, f"no answer: {type(error).__name__} {error}", False)

    async def _send(
        self, path: str, body: bytes, length: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        # A small window, so that a slow reader is felt by the server and not by the system.
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self._port))
        reader, writer = await asyncio.open_connection(sock=connection, limit=1 << 20)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {length}\r\n\r\n".encode() + body)
        return reader, writer


def _path(body: bytes) -> str:
    return "/v1/chat/completions" if b'"messages"' in body else "/v1/completions"


def _joined(chunks: bytearray) -> bytes:
    """A body in chunks, without their lengths."""
    joined, start = bytearray(), 0
    while True:
        end = chunks.find(b"\r\n", start)
        if end < 0:
            raise ValueError(f"cut off behind {bytes(chunks[-100:])!r}")
        length = int(chunks[start:end], 16)
        if not length:
            return bytes(joined)
        joined += chunks[end + 2 : end + 2 + length]
        start = end + 2 + length + 2


def _outcome(status: int, content: bytes, is_stream: bool) -> tuple[str, bool]:
    """What became of a call that could be answered, and whether the client knows."""
    if status in (429, 500, 503):
        return f"status {status}", bool(json.loads(content)["error"]["message"])
    if status != 200:
        return f"status {status}: {content[:200]!r}", False
    if not is_stream:
        return "answered", bool(json.loads(content)["choices"])
    if not content.endswith(b"data: [DONE]\n\n"):
        return f"stream without an end: {content[-200:]!r}", False
    events = [json.loads(text[6:]) for text in content.split(b"\n\n")[:-2]]
    if "error" in events[-1]:
        return "error event", bool(events[-1]["error"]["message"])
    return "answered", all(event["choices"] for event in events)


class Server:
    """The processes of a server."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT)
        self.url = wait_until_up(self.process, log)

    def processes(self) -> dict[int, str]:
        """Id -> role; the front, and all that it started."""
        children: dict[int, list[int]] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                status = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if status[0] != "Z":
                children.setdefault(int(status[1]), []).append(int(folder.name))
        found, left = {self.process.pid: "front"}, [self.process.pid]
        while left:
            for child in children.get(left.pop(), []):
                found[child] = _role(child)
                left.append(child)
        return found

    def memory_mib(self) -> dict[str, float]:
        """Role -> resident memory of its processes; shared pages count once for each of them."""
        memory: Counter[str] = Counter()
        for pid, role in self.processes().items():
            try:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except (OSError, IndexError):
                continue
            memory[role] += pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
        return {role: round(mib, 1) for role, mib in sorted(memory.items())}

    def num_descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


def _role(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return "gone"
    return next((role for word, role in ROLES.items() if word in command), "Ray's")


async def load(server: Server, clients: Clients, arguments: argparse.Namespace) -> dict[str, Any]:
    """All of it; what was seen on the way."""
    start_s = time.monotonic()
    end_s = start_s + 60 * arguments.minutes
    memory: list[dict[str, Any]] = []
    kills: list[dict[str, Any]] = []

    async def every(period_s: float, act: Callable[[], Awaitable[None]]) -> None:
        due_s = start_s + period_s
        while due_s < end_s:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            await act()
            due_s = max(due_s + period_s, time.monotonic())

    async def sample() -> None:
        mib = await asyncio.to_thread(server.memory_mib)
        now = round(time.monotonic() - start_s, 1)
        memory.append({"time_s": now, "descriptors": server.num_descriptors(), "mib": mib})

    async def kill() -> None:
        role = ("replicas", "engines")[len(kills) % 2]
        victims = [pid for pid, its in server.processes().items() if its == role]
        killed_s = time.monotonic()
        os.kill(victims[len(kills) // 2 % len(victims)], signal.SIGKILL)
        await asyncio.sleep(2.0)
        while len(await asyncio.to_thread(engines, server.url)) < arguments.replicas:
            await asyncio.sleep(0.5)
        back_s = round(time.monotonic() - killed_s, 1)
        kills.append({"time_s": round(killed_s - start_s, 1), "what": role, "all_back_s": back_s})
        print(f"{kills[-1]}", flush=True)

    tasks = [every(SAMPLE_EVERY_S, sample), every(BURST_EVERY_S, clients.burst)]
    if arguments.replicas > 1:
        tasks.append(every(arguments.kill_every, kill))
    await asyncio.gather(*tasks, *(clients.ask_until(end_s) for _ in range(NUM_CLIENTS)))
    return {"duration_s": time.monotonic() - start_s, "kills": kills, "memory": memory}


def engines(url: str) -> dict[str, float]:
    """Engine -> requests that run in it; without those that do not answer."""
    try:
        return metric(url, "num_requests_running")
    except OSError:
        return {}


def finished(url: str) -> Counter[str]:
    """Reason -> requests that ended for it, over all engines; aborts are one."""
    with urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    pattern = r'^vllm:request_success_total{.*finished_reason="(\w+)".*} (\S+)$'
    counts: Counter[str] = Counter()
    for reason, value in re.findall(pattern, text, re.M):
        counts[reason] += int(float(value))
    return counts


def agrees(tally: Tally, counted: Counter[str]) -> bool:
    """Whether one engine's counts fit the calls: each of them asked for one completion.

    Who gave up may have gone before the engine heard of it, or behind its last token.
    """
    answered = sum(counts["answered"] for counts in tally.outcomes.values())
    given_up = sum(counts["given up"] for counts in tally.outcomes.values())
    num_done = counted["stop"] + counted["length"]
    return answered <= num_done and num_done + counted["abort"] <= answered + given_up


def wait_until_idle(url: str, num_engines: int) -> bool:
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s:
        running = [*engines(url).values(), *metric(url, "num_requests_waiting").values()]
        if len(running) == 2 * num_engines and not any(running):
            return True
        time.sleep(0.5)
    return False


async def lone_kv_use(server: Server, port: int, num_engines: int) -> dict[str, float]:
    """Engine -> the part of its cache that is held while one request of 33 tokens runs in it.

    That is the request's blocks, and any that nobody ever gave back.
    """
    use: dict[str, float] = {}
    clients = Clients(port, Tally(), random.Random(0))
    for number in range(100):
        prompt = [1000 + number, *range(100 + number, 132 + number)]
        body = {"prompt": prompt, "max_tokens": 400, "stream": True, "ignore_eos": True}
        content = json.dumps(body).encode()
        reader, writer = await clients._send("/v1/completions", content, len(content))
        await reader.readuntil(b"data: ")
        running = await asyncio.to_thread(engines, server.url)
        held = await asyncio.to_thread(metric, server.url, "kv_cache_usage_perc")
        writer.close()
        use |= {engine: held[engine] for engine, num in running.items() if num == 1}
        await asyncio.to_thread(wait_until_idle, server.url, num_engines)
        if len(use) == num_engines:
            return use
    raise RuntimeError(f"only engines {list(use)} got a request")


def still_there(processes: dict[int, str], within_s: float = 15.0) -> list[str]:
    """Roles of those that have not ended after so long: helpers notice the end of the others."""
    end_s = time.monotonic() + within_s
    while True:
        left = [role for pid, role in processes.items() if Path(f"/proc/{pid}").exists()]
        if not left or time.monotonic() > end_s:
            return left
        time.sleep(0.2)


def verdict(
    seen: dict[str, Any], tally: Tally, before: dict[str, Any], after: dict[str, Any]
) -> dict[str, bool]:
    quarter = len(seen["memory"]) // 4
    totals = [sum(sample["mib"].values()) for sample in seen["memory"]]
    early = statistics.median(totals[quarter : 2 * quarter])
    late = statistics.median(totals[-quarter:])
    seen["memory_mib"] = {"second_quarter": early, "last_quarter": late, "growth": late / early}
    print(f"memory {early:.0f} -> {late:.0f} MiB")
    same_use = before["lone_kv_use"].keys() == after["lone_kv_use"].keys() and all(
        abs(after["lone_kv_use"][engine] - use) <= before["block"]
        for engine, use in before["lone_kv_use"].items()
    )
    return {
        "every call got an answer or a clear error": not tally.unclear,
        "memory is flat": late <= MAX_GROWTH * early,
        "nothing runs or waits": after["is_idle"],
        "no block is held": same_use,
        "no connection is left": after["descriptors"] <= before["descriptors"] + 4,
        "all engines were replaced": all(kill["all_back_s"] < 120 for kill in seen["kills"]),
        "the engine counted what the clients saw": after["agrees"],
        "the server ended by itself": after["exit_status"] == 0,
        "no process is left": not after["left"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--stage", default="m6_prefix")
    parser.add_argument("--kill-every", type=float, default=120.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("serve", nargs="*", help="options of serve, behind --")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", arguments.stage, "serve", "--port", "0", *SERVE]
    command += ["--replicas", str(arguments.replicas), *arguments.serve]
    log = Path(tempfile.mkdtemp(prefix="soak-")) / "log"
    server = Server(command, log)
    print(f"{server.url}, log in {log}", flush=True)
    port = int(server.url.rpartition(":")[2])
    tally = Tally()
    clients = Clients(port, tally, random.Random(arguments.seed))

    def look() -> dict[str, Any]:
        is_idle = wait_until_idle(server.url, arguments.replicas)
        use = asyncio.run(lone_kv_use(server, port, arguments.replicas))
        time.sleep(6.0)  # until idle connections are closed
        return {
            "is_idle": is_idle, "lone_kv_use": use, "descriptors": server.num_descriptors(),
        }  # fmt: skip

    before = look()
    before["block"] = min(before["lone_kv_use"].values()) / 3  # 34 to 48 tokens are 3 blocks of 16
    counted = finished(server.url)
    seen = asyncio.run(load(server, clients, arguments))
    wait_until_idle(server.url, arguments.replicas)
    seen["finished"] = finished(server.url) - counted
    after = look()
    # A replica that was replaced counts anew.
    after["agrees"] = arguments.replicas > 1 or agrees(tally, seen["finished"])
    pids = server.processes()
    ending_s = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    after["exit_status"] = server.process.wait(120)
    after["exit_s"] = time.monotonic() - ending_s
    after["left"] = still_there(pids)
    result = {
        "stage": arguments.stage,
        "replicas": arguments.replicas,
        "serve": [*SERVE, *arguments.serve],
        "minutes": arguments.minutes,
        "kill_every_s": arguments.kill_every,
        "environment": describe_environment() | {"ray": package_version("ray")},
        "verdict": verdict(seen, tally, before, after),
        "calls": {kind: dict(counts) for kind, counts in tally.outcomes.items()},
        "unclear": tally.unclear,
        "before": before,
        "after": after,
        **seen,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("calls", "unclear", "verdict")}, indent=1))
    return 0 if all(result["verdict"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
