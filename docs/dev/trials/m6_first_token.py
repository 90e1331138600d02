"""Where the time to the first token of a prompt goes whose beginning is cached: host and device.

    PYTHONPATH=.:shared python docs/dev/trials/m6_first_token.py --output FILE.json

Prompts of 8,192 tokens, one at a time, as in the workload prefix-hit; 0.6B shape, random weights.
Of each share: moments after arrival (ms) at which the request was added, the first step was
scheduled, its inputs were ready, its launches had returned, and its token was there; how long the
device worked on that step; and its kernels, by a profiler in a run of their own. For the engine of
another commit, put its m6_prefix before this one on PYTHONPATH; the stored file has two such runs.
"""

import argparse
import gc
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from folovllm.hardware import describe_environment
from folovllm.profiling.steps import _profiled_step
from folovllm.request import Request, SamplingParams
from m6_prefix.llm import LLM

PROMPT_LEN, NUM_ROUNDS = 8192, 8
SHARES = (0.0, 0.5, 0.9, 0.99)


class Stamps:
    """When methods of live objects returned for the first time since `start`."""

    def __init__(self) -> None:
        self.moments: dict[str, float] = {}
        self.begun = 0.0

    def start(self) -> None:
        self.moments, self.begun = {}, time.perf_counter()

    def watch(self, owner: Any, method: str) -> None:
        plain: Callable[..., Any] = getattr(owner, method)

        def watched(*args: Any) -> Any:
            result = plain(*args)
            self.moments.setdefault(method, 1e3 * (time.perf_counter() - self.begun))
            return result

        setattr(owner, method, watched)


class Prompts:
    """Cold prompts, and others that begin like the last of them."""

    def __init__(self, vocab_size: int) -> None:
        self.rng, self.vocab_size, self.count = random.Random(0), vocab_size, 0
        self.cold: list[int] = []

    def request(self, share: float, num_output_tokens: int = 4) -> Request:
        num_cached = round(share * PROMPT_LEN)
        own = [self.rng.randrange(self.vocab_size) for _ in range(PROMPT_LEN - num_cached)]
        prompt = self.cold[:num_cached] + own
        if not num_cached:
            self.cold = prompt
        self.count += 1
        params = SamplingParams(temperature=0.0, max_tokens=num_output_tokens, ignore_eos=True)
        return Request(request_id=f"r{self.count}", prompt_token_ids=prompt, sampling_params=params)


def run(engine: Any, request: Request, stamps: Stamps) -> dict[str, float]:
    """Moments in ms; "device" is from the first launch of the first step to the end of its last."""
    begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
    plain, launches = engine.model_runner.launch, []

    def launch(scheduler_output: Any) -> Any:
        launches.append(None)
        if len(launches) > 1:
            return plain(scheduler_output)
        begin.record()
        result = plain(scheduler_output)
        end.record()
        return result

    engine.model_runner.launch = launch
    torch.cuda.synchronize()
    stamps.start()
    engine.add_request(request)
    while not engine.step().tokens:
        pass
    stamps.moments["token"] = 1e3 * (time.perf_counter() - stamps.begun)
    moments = dict(stamps.moments)
    while engine.has_unfinished_requests():
        engine.step()
    engine.model_runner.launch = plain
    torch.cuda.synchronize()
    return moments | {"device": begin.elapsed_time(end)}


def profile(engine: Any, request: Request, device: torch.device) -> dict[str, Any]:
    """Kernels of the first step, those that take longest; where chunks follow, of two of them."""
    engine.add_request(request)
    step = _profiled_step(engine, device)
    engine.abort_request(request.request_id)
    rows = [(row.name[:60], row.count, round(1e3 * row.total_s, 4)) for row in step.kernels]
    return {"kernels_ms": sum(ms for *_, ms in rows), "kernels": rows[:14]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    llm = LLM(
        "qwen3-0.6b", load_format="dummy", dtype="bfloat16", max_model_len=17408,
        kv_cache_bytes=60 << 30,
    )  # fmt: skip
    engine, prompts, stamps = llm.engine, Prompts(llm.model.config.vocab_size), Stamps()
    for owner, method in (
        (engine, "add_request"),
        (engine.scheduler, "schedule"),
        (engine.model_runner.kv_cache, "copy_blocks"),
        (engine.model_runner.block_tables, "_copy"),
        (engine.model_runner.block_tables, "assign"),
        (engine.model_runner, "prepare_inputs"),
        (engine.model_runner, "launch"),
    ):
        stamps.watch(owner, method)
    result: dict[str, Any] = {"environment": describe_environment(), "shares": {}}
    rounds: dict[float, list[dict[str, float]]] = {share: [] for share in SHARES}
    gc.collect()
    gc.freeze()
    for _ in range(NUM_ROUNDS):
        for share in SHARES:
            rounds[share].append(run(engine, prompts.request(share), stamps))
    for share, moments in rounds.items():
        names = moments[0]
        row = {name: round(median(m[name] for m in moments[1:]), 3) for name in names}
        if share:
            run(engine, prompts.request(0.0), stamps)
        row_profile = profile(engine, prompts.request(share, 1), llm.model.device)
        print(share, row, json.dumps(row_profile, indent=0), flush=True)
        result["shares"][str(share)] = {"ms": row, **row_profile}
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
