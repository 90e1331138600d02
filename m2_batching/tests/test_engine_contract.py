"""M2 keeps the contract of every stage."""

import random
from typing import Any, ClassVar

import m2_batching
from folovllm.testing.engine_contract import EngineContract, toy_directory, toy_model

__all__ = ["toy_directory", "toy_model"]


class TestEngineContract(EngineContract):
    stage = m2_batching
    options: ClassVar[dict[str, Any]] = {
        "max_num_seqs": 4,
        "kv_cache_bytes": 1 << 22,
        "max_num_batched_tokens": 256,
    }

    def options_for_long_context(self) -> dict[str, Any]:
        return {"max_num_batched_tokens": 600}

    def fuzz_options(self, rng: random.Random) -> dict[str, Any]:
        return {
            "max_num_seqs": rng.choice([1, 2, 5, 20]),
            "max_num_batched_tokens": rng.choice([192, 256, 1000]),
        }
