"""M1 keeps the contract of every stage."""

from typing import Any, ClassVar

import m1_baseline
from folovllm.testing.engine_contract import EngineContract, toy_directory, toy_model

__all__ = ["toy_directory", "toy_model"]


class TestEngineContract(EngineContract):
    stage = m1_baseline
    options: ClassVar[dict[str, Any]] = {}
