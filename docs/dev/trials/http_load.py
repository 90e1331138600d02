"""Drives an OpenAI-compatible server with a workload, and times every token as a client sees it.

    PYTHONPATH=.:shared python docs/dev/trials/http_load.py --url http://127.0.0.1:8000 \
        --model NAME --vocab-size 151936 --output FILE.json --workload azure:path=F.csv,speed=8
    … --workload fixed:batch=256,input=512,output=256 --concurrency 64

Prompts go as token ids to /v1/completions, with `ignore_eos`, so that every server does the same
work. With --concurrency, so many clients ask one after the other; without, the workload's
arrivals decide. A chunk may hold several tokens: `continuous_usage_stats` says how many. Gaps of
tokens of one chunk are 0. Nothing but the standard library talks to the server, in
--processes processes, so that a client does not measure itself.
"""

import argparse
import asyncio
import json
import multiprocessing
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from folovllm.hardware import describe_environment
from folovllm.workloads.workload import WorkloadRequest, make_workload

_NUM_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')


@dataclass
class Timing:
    """One request as its client saw it; seconds on the clock of `time.perf_counter`."""

    request_id: str
    due_s: float
    """When it should have been sent, which is its arrival."""
    sent_s: float
    token_s: list[float] = field(default_factory=list)
    error: str | None = None


async def ask(
    url: str, model: str, request: WorkloadRequest, due_s: float, temperature: float
) -> Timing:
    """Send one request and note when its tokens come."""
    where = urlsplit(url)
    body = json.dumps(
        {
            "model": model,
            "prompt": list(request.prompt_token_ids),
            "max_tokens": request.output_len,
            "temperature": temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ).encode()
    timing = Timing(request.request_id, due_s, time.perf_counter())
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=1 << 20)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            timing.error = status.decode().strip()
            return timing
        async for line in reader:
            if b'"error"' in line:
                timing.error = line.decode().strip()
            found = _NUM_TOKENS.search(line)
            if found is not None:
                num_new_tokens = int(found[1]) - len(timing.token_s)
                timing.token_s += [time.perf_counter()] * num_new_tokens
    finally:
        writer.close()
    if timing.error is None and len(timing.token_s) != request.output_len:
        timing.error = f"{len(timing.token_s)} tokens instead of {request.output_len}"
    return timing


async def run_share(
    url: str,
    model: str,
    requests: list[WorkloadRequest],
    concurrency: int | None,
    start_s: float,
    temperature: float,
) -> list[Timing]:
    """The requests of one process, from `start_s` on."""
    await asyncio.sleep(start_s - time.perf_counter())
    if concurrency is None:

        async def ask_in_time(request: WorkloadRequest) -> Timing:
            due_s = start_s + request.arrival_s
            await asyncio.sleep(due_s - time.perf_counter())
            return await ask(url, model, request, due_s, temperature)

        return list(await asyncio.gather(*map(ask_in_time, requests)))
    left = iter(requests)
    timings: list[Timing] = []

    async def client() -> None:
        for request in left:
            now = time.perf_counter()
            timings.append(await ask(url, model, request, now, temperature))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return timings


def run_process(*share: Any) -> list[Timing]:
    return asyncio.run(run_share(*share))


def summary(timings: list[Timing]) -> dict[str, Any]:
    """In seconds; percentiles of TTFT and TPOT are over requests, those of ITL over all gaps."""
    done = [timing for timing in timings if timing.error is None]
    ttft = [t.token_s[0] - t.due_s for t in done]
    gaps = np.concatenate([np.diff(t.token_s) for t in done]) if done else np.array([])
    tpot = [(t.token_s[-1] - t.token_s[0]) / (len(t.token_s) - 1) for t in done if t.token_s[1:]]
    span_s = max(t.token_s[-1] for t in done) - min(t.due_s for t in done) if done else 0.0
    late = [timing.sent_s - timing.due_s for timing in timings]

    def percentiles(values: Any) -> dict[str, float] | None:
        if not len(values):
            return None
        return {f"p{p}": float(np.percentile(values, p)) for p in (50, 90, 99)}

    return {
        "num_requests": len(timings),
        "errors": [timing.error for timing in timings if timing.error is not None],
        "duration_s": span_s,
        "output_tokens_per_s": sum(len(t.token_s) for t in done) / span_s if span_s else None,
        "ttft_s": percentiles(ttft),
        "tpot_s": percentiles(tpot),
        "itl_s": percentiles(gaps),
        "sent_late_s": percentiles(late),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", required=True, metavar="SPEC")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concurrency", type=int, help="clients; default: arrivals decide")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    arguments = parser.parse_args()
    workload = make_workload(
        arguments.workload, vocab_size=arguments.vocab_size, seed=arguments.seed
    )
    num_processes = min(arguments.processes, arguments.concurrency or arguments.processes)
    start_s = time.perf_counter() + 5.0  # all processes are up by then
    shares = []
    for index in range(num_processes):
        clients = arguments.concurrency
        if clients is not None:
            clients = clients // num_processes + (index < clients % num_processes)
        requests = list(workload.requests[index::num_processes])
        share = (arguments.url, arguments.model, requests, clients, start_s, arguments.temperature)
        shares.append(share)
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        timings = [timing for part in pool.starmap(run_process, shares) for timing in part]
    result = {
        "url": arguments.url,
        "model": arguments.model,
        "workload": {"spec": arguments.workload, "sha256": workload.sha256},
        "concurrency": arguments.concurrency,
        "temperature": arguments.temperature,
        "environment": describe_environment(),
        "summary": summary(timings),
        "requests": [asdict(timing) for timing in timings],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result), encoding="utf-8")
    print(json.dumps(result["summary"], indent=2))


if __name__ == "__main__":
    main()
