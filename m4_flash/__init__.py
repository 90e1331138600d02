"""One rung of the ladder as a complete engine; README.md says what this stage teaches."""

from folovllm.llm import LLM as BaseLLM
from folovllm.request import SamplingParams

from .config import EngineConfig
from .engine import LLMEngine

__all__ = ["LLM", "EngineConfig", "LLMEngine", "SamplingParams"]


class LLM(BaseLLM):
    """`LLM.generate` and `LLM.chat` over this stage's engine."""

    config_class = EngineConfig
    engine_class = LLMEngine
