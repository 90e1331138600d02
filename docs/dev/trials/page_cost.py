"""What somebody who watches an engine costs its host: m6's scheduler without a model, step by step.

    OMP_NUM_THREADS=1 PYTHONPATH=.:shared python docs/dev/trials/page_cost.py OUTPUT.json

Microseconds per step: of the scheduler alone, then through `EngineWatch` with nobody who watches,
with somebody between two snapshots, and for a recorded step with its snapshot, ready to be sent. At
most ten steps per second are recorded. Every request holds 512 tokens and more in blocks of 16.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from folovllm.entrypoints.core_messages import Pause, Watch
from folovllm.entrypoints.live.engine_watch import EngineWatch
from folovllm.hardware import describe_environment
from folovllm.interfaces import SamplerOutput, StepOutput
from folovllm.request import Request, SamplingParams
from m6_prefix.config import EngineConfig
from m6_prefix.kv_cache_manager import KVCacheManager
from m6_prefix.scheduler import Scheduler

PROMPT_LEN = 512
NUM_STEPS, NUM_REPEATS = 60, 7


class BookkeepingEngine:
    """Schedules and records; every sampled token is the same."""

    def __init__(self, num_requests: int, num_blocks: int) -> None:
        config = EngineConfig(max_model_len=4096, max_num_seqs=256, max_num_batched_tokens=8192)
        manager = KVCacheManager(config, num_tokens=config.block_size * num_blocks)
        self.scheduler = Scheduler(config, manager)
        for number in range(num_requests):
            prompt = [number] * PROMPT_LEN
            params = SamplingParams(max_tokens=3000)
            request = Request(
                request_id=str(number), prompt_token_ids=prompt, sampling_params=params
            )
            self.scheduler.add_request(request)
        while self.scheduler.waiting:
            self.step()

    def add_request(self, request: Request) -> None:
        self.scheduler.add_request(request)

    def abort_request(self, request_id: str) -> None:
        self.scheduler.abort_request(request_id)

    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished_requests()

    def step(self) -> StepOutput:
        planned = self.scheduler.schedule()
        stats = self.scheduler.advance(planned)
        number = len(planned.scheduled)
        return self.scheduler.update(planned, SamplerOutput([7] * number, [None] * number), stats)


def time_steps_us(step: Any) -> float:
    times = []
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e6 * median(times)


def measure(num_requests: int, num_blocks: int) -> dict[str, Any]:
    """The four ways in turn, several times; the fastest median of each: the machine is shared."""
    engine, encoder = BookkeepingEngine(num_requests, num_blocks), msgspec.msgpack.Encoder()
    unwatched, between, recorded = (EngineWatch(engine) for _ in range(3))
    between.act_on(Watch())
    between._last_s = float("inf")
    for message in (Watch(), Pause()):
        recorded.act_on(message)
    size = 0

    def record() -> None:
        nonlocal size
        recorded.step()
        size = len(encoder.encode(recorded.take_snapshot()))

    ways = {"scheduler": engine.step, "unwatched": unwatched.step}
    ways |= {"between_snapshots": between.step, "recorded": record}  # type: ignore[dict-item]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(NUM_REPEATS):
        for name, step in ways.items():
            times[name].append(time_steps_us(step))
    row = {f"{name}_us": round(min(values), 1) for name, values in times.items()}
    return {"num_requests": num_requests, "num_blocks": num_blocks, **row, "snapshot_bytes": size}


def main() -> None:
    rows = [measure(8, 4096), measure(64, 16384), measure(256, 65536)]
    for row in rows:
        print(row)
    result = {"steps": NUM_STEPS, "repeats": NUM_REPEATS, "rows": rows}
    result["environment"] = describe_environment()
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
