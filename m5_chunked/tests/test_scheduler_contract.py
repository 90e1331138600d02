"""M4's bookkeeping keeps the contract of every scheduler."""

import random
from typing import Any

from folovllm.testing.scheduler_contract import SchedulerContract
from m5_chunked.config import PreemptionMode, SchedulingPolicy


class TestSchedulerContract(SchedulerContract):
    stage = "m5_chunked"

    def draw_options(self, rng: random.Random) -> dict[str, Any]:
        max_model_len, max_num_seqs = rng.choice([6, 16, 40]), rng.randint(1, 6)
        return {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max(max_model_len, max_num_seqs) + rng.randrange(40),
            "scheduling_policy": rng.choice(list(SchedulingPolicy)),
            "block_size": rng.choice([1, 2, 3, 4, 7, 16, 64]),
            "preemption_mode": rng.choice(list(PreemptionMode)),
            "swap_cache_tokens": rng.choice([0, 20, 200]),
        }

    def draw_num_cache_tokens(self, config: Any, rng: random.Random) -> int:
        num_blocks = -(-config.max_model_len // config.block_size)
        return config.block_size * (num_blocks + rng.randrange(rng.choice([1, 4, num_blocks + 4])))

    def locate(self, config: Any, scheduled: Any, position: int) -> tuple[int, int]:
        index, offset = divmod(position, config.block_size)
        return scheduled.block_table[index], offset

    def scenarios(self) -> dict[str, dict[str, Any]]:
        options = {
            "max_model_len": 12,
            "max_num_batched_tokens": 12,
            "max_num_seqs": 4,
            "block_size": 2,
            "num_cache_tokens": 16,
        }
        return {
            mode.value: {**options, "preemption_mode": mode, "swap_cache_tokens": 8}
            for mode in PreemptionMode
        }
