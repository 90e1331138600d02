"""M2's bookkeeping keeps the contract of every scheduler."""

import random
from typing import Any

from folovllm.testing.scheduler_contract import SchedulerContract
from m2_batching.config import SchedulingPolicy


class TestSchedulerContract(SchedulerContract):
    stage = "m2_batching"

    def draw_options(self, rng: random.Random) -> dict[str, Any]:
        max_model_len, max_num_seqs = rng.choice([6, 16, 40]), rng.randint(1, 6)
        return {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max(max_model_len, max_num_seqs) + rng.randrange(40),
            "scheduling_policy": rng.choice(list(SchedulingPolicy)),
        }

    def draw_num_cache_tokens(self, config: Any, rng: random.Random) -> int:
        return config.max_model_len * rng.randint(1, 5) + rng.randrange(config.max_model_len)

    def locate(self, config: Any, scheduled: Any, position: int) -> tuple[int, int]:
        assert position < config.max_model_len
        return scheduled.slot, position

    def count_tokens(self, scheduled: Any) -> int:
        return len(scheduled) * max((s.num_scheduled_tokens for s in scheduled), default=0)

    def scenarios(self) -> dict[str, dict[str, Any]]:
        options = {"max_model_len": 12, "max_num_batched_tokens": 12, "max_num_seqs": 3}
        return {"slots": {**options, "num_cache_tokens": 24}}
