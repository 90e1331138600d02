"""Without its prefix cache, m6_prefix schedules what m5_chunked schedules, step by step."""

import importlib
import random
from typing import Any

import pytest

from folovllm.interfaces import SamplerOutput
from folovllm.request import Request, SamplingParams


def plan(stage: str, seed: int, **options: Any) -> list[Any]:
    """What each step of a stage's scheduler does: requests, tokens, sizes of tables, copies."""
    config_module, managers, schedulers = (
        importlib.import_module(f"{stage}.{name}")
        for name in ("config", "kv_cache_manager", "scheduler")
    )
    rng = random.Random(seed)
    config = config_module.EngineConfig(
        max_model_len=40,
        max_num_seqs=6,
        max_num_batched_tokens=rng.choice([6, 9, 30]),
        block_size=rng.choice([1, 3, 4, 16]),
        preemption_mode=rng.choice(list(config_module.PreemptionMode)),
        swap_cache_tokens=60,
        **options,
    )
    scheduler = schedulers.Scheduler(config, managers.KVCacheManager(config, num_tokens=70))
    for number in range(12):
        prompt = [1] * rng.randint(1, 30)
        parent = scheduler.requests.get(f"r{number - 1}") if rng.random() < 0.3 else None
        scheduler.add_request(
            Request(
                request_id=f"r{number}",
                prompt_token_ids=parent.prompt_token_ids if parent else prompt,
                sampling_params=SamplingParams(max_tokens=rng.randint(1, 10)),
                fork_of=parent,
            )
        )
    steps: list[Any] = []
    while scheduler.has_unfinished_requests() and len(steps) < 1000:
        output = scheduler.schedule()
        shares = [
            (s.request.request_id, s.request.num_computed_tokens, s.num_scheduled_tokens)
            for s in output.scheduled
        ]
        sizes = [len(s.block_table) for s in output.scheduled]
        kinds = [copy.kind.name for copy in output.block_copies]
        stats = scheduler.advance(output)
        sampled = SamplerOutput([7] * len(shares), [None] * len(shares))
        scheduler.update(output, sampled, stats)
        steps.append((shares, sizes, kinds, output.num_preemptions, stats))
    return steps


@pytest.mark.parametrize("seed", range(20))
def test_every_step_is_the_same(seed: int) -> None:
    steps = plan("m5_chunked", seed)
    assert len(steps) < 1000
    assert plan("m6_prefix", seed, enable_prefix_caching=False) == steps
    assert plan("m6_prefix", seed) != steps
