"""`LLM` over this stage's engine."""

from folovllm.entrypoints.llm import LLM as BaseLLM

from .config import EngineConfig
from .engine import LLMEngine


class LLM(BaseLLM):
    """`generate`, `chat`, `stream` and `beam_search` over this stage's engine."""

    config_class = EngineConfig
    engine_class = LLMEngine
