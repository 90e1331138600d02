"""M6's bookkeeping keeps the contract of every scheduler, also with steps launched ahead."""

import random
from typing import Any, ClassVar

from folovllm.testing.chunked_driver import ChunkedDriver
from folovllm.testing.scheduler_contract import SchedulerContract
from folovllm.testing.scheduler_driver import SchedulerDriver
from m6_prefix.config import PreemptionMode, SchedulingPolicy
from m6_prefix.tests.prefix_fuzz import PrefixFuzz


class TestSchedulerContract(SchedulerContract):
    stage = "m6_prefix"
    fuzz = PrefixFuzz
    num_ahead: ClassVar[int] = 0
    interrupted_mode: ClassVar[PreemptionMode] = PreemptionMode.RECOMPUTE

    def make_driver(self, config: Any, num_cache_tokens: int) -> SchedulerDriver:
        plain = super().make_driver(config, num_cache_tokens)
        return ChunkedDriver(plain.scheduler, plain.cache, self.count_tokens, self.num_ahead)

    def draw_options(self, rng: random.Random) -> dict[str, Any]:
        max_model_len, max_num_seqs = rng.choice([6, 16, 40]), rng.randint(1, 6)
        return {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_seqs + rng.choice([0, 1, 3, 10, 60]),
            "max_chunk_tokens": rng.choice([None, None, 1, 2, 3, 5, 16]),
            "scheduling_policy": rng.choice(list(SchedulingPolicy)),
            "block_size": rng.choice([1, 2, 3, 4, 7, 16, 64]),
            "enable_prefix_caching": rng.random() < 0.9,
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
        """One in which somebody is preempted; every line is tried, so that one mode is enough."""
        options = {
            "max_model_len": 12,
            "max_num_batched_tokens": 6,
            "max_num_seqs": 4,
            "block_size": 2,
            "num_cache_tokens": 14,
            "preemption_mode": self.interrupted_mode,
            "swap_cache_tokens": 8,
        }
        return {self.interrupted_mode.value: options}


class TestSchedulerContractOneStepAhead(TestSchedulerContract):
    num_ahead = 1
    interrupted_mode = PreemptionMode.SWAP
