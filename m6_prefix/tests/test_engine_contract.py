"""M5 keeps the contract of every stage, with and without steps launched ahead."""

import random
from typing import Any, ClassVar

import m6_prefix
from folovllm.testing.engine_contract import EngineContract, toy_directory, toy_model
from m6_prefix.config import PreemptionMode

__all__ = ["toy_directory", "toy_model"]

BYTES_PER_TOKEN = 2 * 2 * 2 * 24 * 4
"""Keys and values of toy_model: layers, heads, head_dim, float32."""


class TestEngineContract(EngineContract):
    stage = m6_prefix
    run_step = "launch"
    options: ClassVar[dict[str, Any]] = {
        "max_num_seqs": 4,
        "kv_cache_bytes": 1 << 22,
        "max_num_batched_tokens": 40,
    }

    def fuzz_options(self, rng: random.Random) -> dict[str, Any]:
        block_size = rng.choice([1, 4, 16, 64])
        num_blocks = -(-192 // block_size) + rng.randrange(4)
        return {
            "max_num_seqs": rng.choice([1, 2, 5, 20]),
            "max_num_batched_tokens": rng.choice([20, 21, 50, 256]),
            "max_chunk_tokens": rng.choice([None, 1, 7, block_size, block_size + 1]),
            "block_size": block_size,
            "kv_cache_bytes": num_blocks * block_size * BYTES_PER_TOKEN,
            "preemption_mode": rng.choice(list(PreemptionMode)),
            "swap_cache_tokens": rng.choice([0, 100, 10000]),
        }


class TestEngineContractWithoutStepsAhead(TestEngineContract):
    options: ClassVar[dict[str, Any]] = {**TestEngineContract.options, "async_scheduling": False}
