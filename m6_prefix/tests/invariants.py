"""What must hold in M5 after every step."""

from folovllm.testing import invariants
from m6_prefix.engine import LLMEngine


def check_blocks(engine: LLMEngine) -> None:
    """Every block is free or named by as many tables as its reference count says."""
    invariants.check_blocks(engine.scheduler, invariants.ChunkedProgress())
