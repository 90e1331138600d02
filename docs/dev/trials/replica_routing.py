"""Two ways to choose among replicas, on conversations: what is found in their caches, and TTFT.

    PYTHONPATH=.:shared python docs/dev/trials/replica_routing.py --output FILE.json \
        [--replicas 2] [--workload multi-turn:…] [--repeats 3] [-- OPTIONS OF serve]

Every run has a server of its own, which a request per engine has warmed up; the policies take
turns. All conversations of the workload go on at once, each asking its next question as soon as it
has its answer, with the tokens of the answers as they came in the prompt.
"""

import argparse
import asyncio
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

from http_load import Timing, summary

from folovllm.hardware import describe_environment, package_version
from folovllm.workloads.workload import WorkloadRequest, make_workload

POLICIES = ("prefix", "round-robin")
_START_S = 300.0


async def ask(url: str, prompt: list[int], output_len: int, name: str) -> tuple[Timing, list[int]]:
    """When the tokens of an answer came, and which they are."""
    where = urlsplit(url)
    body = {"prompt": prompt, "max_tokens": output_len, "temperature": 0.0, "ignore_eos": True}
    content = json.dumps(body | {"stream": True, "return_token_ids": True}).encode()
    now = time.perf_counter()
    timing, token_ids = Timing(name, now, now), []
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=1 << 20)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{name}: {status.decode()}{(await reader.read()).decode()}")
        async for line in reader:
            if line.startswith(b"data: {"):
                new = json.loads(line.removeprefix(b"data: "))["choices"][0]["token_ids"]
                token_ids += new
                timing.token_s += [time.perf_counter()] * len(new)
    finally:
        writer.close()
    if len(token_ids) != output_len:
        raise RuntimeError(f"{name}: {len(token_ids)} tokens instead of {output_len}")
    return timing, token_ids


async def converse(url: str, turns: list[WorkloadRequest]) -> list[Timing]:
    timings, history = [], []
    for turn in turns:
        history += turn.prompt_token_ids
        timing, token_ids = await ask(url, history, turn.output_len, turn.request_id)
        timings.append(timing)
        history += token_ids
    return timings


async def run_all(url: str, conversations: list[list[WorkloadRequest]]) -> list[Timing]:
    done = await asyncio.gather(*(converse(url, turns) for turns in conversations))
    return [timing for timings in done for timing in timings]


def metric(url: str, name: str) -> dict[str, float]:
    """Engine -> value."""
    with urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    found = re.findall(rf'^vllm:{name}{{engine="(\d+)".*}} (\S+)$', text, re.M)
    return {engine: float(value) for engine, value in found}


def wait_until_up(server: subprocess.Popen[bytes], log: Path) -> str:
    """The address that the server has printed, as soon as it answers there."""
    end = time.perf_counter() + _START_S
    while server.poll() is None and time.perf_counter() < end:
        found = re.search(r"http://[\d.]+:\d+", log.read_text())
        if found is not None:
            with suppress(OSError), urlopen(f"{found[0]}/health"):
                return found[0]
        time.sleep(0.1)
    raise RuntimeError(f"no server: {log.read_text()}")


def measure(command: list[str], conversations: list[list[WorkloadRequest]]) -> dict[str, Any]:
    """One run on a server of its own."""
    with tempfile.NamedTemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = wait_until_up(server, Path(log.name))
            warm_up = [[WorkloadRequest((i + 5,) * 8, 8, 0.0, f"warm-up {i}")] for i in range(8)]
            asyncio.run(run_all(url, warm_up))
            names = ("prefix_cache_queries_total", "prefix_cache_hits_total", "prompt_tokens_total")
            before = {name: metric(url, name) for name in names}
            timings = asyncio.run(run_all(url, conversations))
            after = {name: metric(url, name) for name in names}
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    grown = {n: {e: v - before[n].get(e, 0) for e, v in after[n].items()} for n in names}
    looked_up, hits = (sum(grown[name].values()) for name in names[:2])
    later = [timing for timing in timings if not timing.request_id.endswith("turn1")]
    return {
        "hit_rate": hits / looked_up,
        "prompt_tokens_by_engine": grown["prompt_tokens_total"],
        "later_turns": summary(later),
        "summary": summary(timings),
        "requests": [asdict(timing) for timing in timings],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", default="m6_prefix")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument(
        "--workload",
        default="multi-turn:conversations=6,turns=6,system=64,question=24-48,output=8-16",
    )
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("serve", nargs="*", help="options of serve, behind --")
    arguments = parser.parse_args()
    workload = make_workload(arguments.workload, vocab_size=arguments.vocab_size, seed=0)
    conversations: dict[str, list[WorkloadRequest]] = {}
    for request in workload.requests:
        conversations.setdefault(request.request_id.partition("-")[0], []).append(request)
    command = [sys.executable, "-m", arguments.stage, "serve", "--port", "0", *arguments.serve]
    command += ["--replicas", str(arguments.replicas), "--routing"]
    runs: dict[str, list[dict[str, Any]]] = {policy: [] for policy in POLICIES}
    for repeat in range(arguments.repeats):
        for policy in POLICIES[:: -1 if repeat % 2 else 1]:
            run = measure([*command, policy], list(conversations.values()))
            runs[policy].append(run)
            print(policy, f"hit rate {run['hit_rate']:.3f}, TTFT", run["later_turns"]["ttft_s"])
    medians = {
        policy: {
            "hit_rate": statistics.median(run["hit_rate"] for run in done),
            "ttft_p50_s": statistics.median(run["summary"]["ttft_s"]["p50"] for run in done),
            "later_ttft_p50_s": statistics.median(
                run["later_turns"]["ttft_s"]["p50"] for run in done
            ),
            "later_ttft_p90_s": statistics.median(
                run["later_turns"]["ttft_s"]["p90"] for run in done
            ),
            "duration_s": statistics.median(run["summary"]["duration_s"] for run in done),
        }
        for policy, done in runs.items()
    }
    result = {
        "stage": arguments.stage,
        "replicas": arguments.replicas,
        "serve": arguments.serve,
        "workload": {"spec": arguments.workload, "sha256": workload.sha256},
        "environment": describe_environment() | {"ray": package_version("ray")},
        "medians": medians,
        "runs": runs,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result), encoding="utf-8")
    print(json.dumps(medians, indent=2))


if __name__ == "__main__":
    main()
