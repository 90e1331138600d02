"""M7 keeps the contract of every stage; without quantised weights it is m6_prefix."""

from typing import Any, ClassVar

import m7_gptq
from folovllm.testing.engine_contract import EngineContract, toy_directory, toy_model

__all__ = ["toy_directory", "toy_model"]


class TestEngineContract(EngineContract):
    stage = m7_gptq
    run_step = "launch"
    options: ClassVar[dict[str, Any]] = {
        "max_num_seqs": 4,
        "kv_cache_bytes": 1 << 22,
        "max_num_batched_tokens": 40,
    }
