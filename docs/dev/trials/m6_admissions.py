"""Whether a full prefix cache costs an admission, and how long a lookup takes; without a device.

    PYTHONPATH=.:shared python docs/dev/trials/m6_admissions.py OUT.json

Schedulers and caches of m5_chunked and m6_prefix run `nano` with the memory that 8 GiB are for the
shape of Qwen3-0.6B, twice in a row with prompts that have nothing in common: the second time every
block of m6_prefix has been cached. Tokens are drawn from a seed.
"""

import json
import math
import random
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from folovllm.bench.arrivals import Arrivals
from folovllm.interfaces import SamplerOutput
from folovllm.request import Request, SamplingParams
from folovllm.workloads.workload import make_workload

VOCAB_SIZE = 151_936
NUM_KV_TOKENS = (8 << 30) // (2 * 28 * 8 * 128 * 2)
"""Keys and values, 28 layers, 8 heads of 128 numbers, 2 bytes each."""
LOOKUP_TOKENS = 32_000


class Simulation:
    """A stage's scheduler and cache, which outlive the workloads that they run."""

    def __init__(self, stage: str) -> None:
        self.config = import_module(f"{stage}.config").EngineConfig(
            max_model_len=4096, max_num_seqs=256, max_num_batched_tokens=2048
        )
        manager_class = import_module(f"{stage}.kv_cache_manager").KVCacheManager
        self.manager = manager_class(self.config, NUM_KV_TOKENS)
        self.scheduler = import_module(f"{stage}.scheduler").Scheduler(self.config, self.manager)
        self.rng = random.Random(0)

    def run(self, seed: int) -> dict[str, Any]:
        """All of `nano` at once, to its end."""
        workload = make_workload("nano", vocab_size=VOCAB_SIZE, seed=seed)
        arrivals = Arrivals(workload, seed=0)
        num_running: list[int] = []
        num_preemptions = num_unfinished = 0
        while arrivals or num_unfinished:
            for request in arrivals.pop_due(math.inf):
                request.request_id += f"-{seed}"
                self.scheduler.add_request(request)
                num_unfinished += 1
            step = self.scheduler.schedule()
            stats = self.scheduler.advance(step)
            token_ids = [self.rng.randrange(VOCAB_SIZE) for _ in step.scheduled]
            sampled = SamplerOutput(token_ids, [None] * len(token_ids))
            output = self.scheduler.update(step, sampled, stats)
            num_unfinished -= sum(token.finish_reason is not None for token in output.tokens)
            num_running.append(stats.num_running)
            num_preemptions += stats.num_preemptions
        return {
            "num_steps": len(num_running),
            "max_num_running": max(num_running),
            "mean_num_running": round(statistics.mean(num_running), 2),
            "num_preemptions": num_preemptions,
        }


def time_lookup() -> dict[str, Any]:
    """Milliseconds of looking a prompt up and holding its blocks, the least of 20.

    The first lookup also turns the prompt into bytes; later ones of a waiting request do not.
    """
    manager_class = import_module("m6_prefix.kv_cache_manager").KVCacheManager
    config_class = import_module("m6_prefix.config").EngineConfig
    manager = manager_class(
        config_class(max_model_len=2 * LOOKUP_TOKENS, max_num_batched_tokens=2 * LOOKUP_TOKENS),
        4 * LOOKUP_TOKENS,
    )
    rng = random.Random(1)
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(LOOKUP_TOKENS)]
    first = _request("first", prompt)
    assert manager.allocate_slots(first, LOOKUP_TOKENS) is not None
    first.num_computed_tokens = LOOKUP_TOKENS
    manager.publish([first])
    times: dict[str, list[float]] = {"whole": [], "nothing": [], "whole_again": []}
    for number in range(20):
        others = [VOCAB_SIZE - 1 - prompt[0], *prompt[1:]]
        for name, tokens in (("whole", prompt), ("nothing", others)):
            request = _request(f"{name}{number}", list(tokens))
            times[name].append(_milliseconds(manager, request))
            if name == "whole":
                assert request.num_computed_tokens == LOOKUP_TOKENS - 1
                manager.free(request)
                request.num_computed_tokens = 0
                times["whole_again"].append(_milliseconds(manager, request))
            manager.free(request)
    return {name: round(min(values), 3) for name, values in times.items()}


def _request(name: str, tokens: list[int]) -> Request:
    return Request(request_id=name, prompt_token_ids=tokens, sampling_params=SamplingParams())


def _milliseconds(manager: Any, request: Request) -> float:
    start = time.perf_counter()
    manager.share_cached(request)
    return 1e3 * (time.perf_counter() - start)


def main(out_file: str) -> None:
    results: dict[str, Any] = {"num_kv_tokens": NUM_KV_TOKENS}
    for stage in ("m5_chunked", "m6_prefix"):
        simulation = Simulation(stage)
        results[stage] = [simulation.run(seed) for seed in (0, 1)]
        print(stage, results[stage], flush=True)
    results["lookup_ms"] = {"num_tokens": LOOKUP_TOKENS, **time_lookup()}
    print(results["lookup_ms"])
    Path(out_file).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
