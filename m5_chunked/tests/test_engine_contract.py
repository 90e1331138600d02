"""M3 keeps the contract of every stage."""

import random
from typing import Any, ClassVar

import m5_chunked
from folovllm.testing.engine_contract import EngineContract, toy_directory, toy_model
from m5_chunked.config import PreemptionMode

__all__ = ["toy_directory", "toy_model"]

BYTES_PER_TOKEN = 2 * 2 * 2 * 24 * 4
"""Keys and values of toy_model: layers, heads, head_dim, float32."""


class TestEngineContract(EngineContract):
    stage = m5_chunked
    options: ClassVar[dict[str, Any]] = {
        "max_num_seqs": 4,
        "kv_cache_bytes": 1 << 22,
        "max_num_batched_tokens": 256,
    }

    def options_for_long_context(self) -> dict[str, Any]:
        return {"max_num_batched_tokens": 600}

    def fuzz_options(self, rng: random.Random) -> dict[str, Any]:
        block_size = rng.choice([1, 4, 16, 64])
        num_blocks = -(-192 // block_size) + rng.randrange(4)
        return {
            "max_num_seqs": rng.choice([1, 2, 5, 20]),
            "max_num_batched_tokens": rng.choice([192, 256, 1000]),
            "block_size": block_size,
            "kv_cache_bytes": num_blocks * block_size * BYTES_PER_TOKEN,
            "preemption_mode": rng.choice(list(PreemptionMode)),
            "swap_cache_tokens": rng.choice([0, 100, 10000]),
        }
