"""One rung of the ladder as a complete engine; README.md says what this stage teaches.

What needs torch is loaded when somebody asks for it: the scheduler and its bookkeeping are
imported, and tested, where torch is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from folovllm.request import SamplingParams, StructuredOutputsParams

from .config import EngineConfig

if TYPE_CHECKING:
    from .engine import LLMEngine
    from .llm import LLM

__all__ = ["LLM", "EngineConfig", "LLMEngine", "SamplingParams", "StructuredOutputsParams"]

_HOMES = {"LLM": ".llm", "LLMEngine": ".engine"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
