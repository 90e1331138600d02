"""`LLM` over this stage's engine, with quantised matrices where the checkpoint has them."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from folovllm.entrypoints.llm import LLM as BaseLLM

from .config import EngineConfig
from .default_model import quantized_default_model
from .engine import LLMEngine
from .gptq import QuantizationConfig
from .quantized_linear import linears_of, random_linears_of


class LLM(BaseLLM):
    """`generate`, `chat`, `stream` and `beam_search` over this stage's engine.

    Without a model it takes the embedded one at 4 bits, which is quantised when it is first asked
    for; load_format "dummy" draws random 4-bit weights. A checkpoint that is not quantised runs as
    in the stages before.
    """

    config_class = EngineConfig
    engine_class = LLMEngine
    linears = staticmethod(linears_of)

    def __init__(
        self, model: str | Path | None = None, *, load_format: str = "auto", **options: Any
    ) -> None:
        if load_format == "dummy":
            self.linears = random_linears_of
        elif model is None:
            model = quantized_default_model()
        super().__init__(model, load_format=load_format, **options)
        config = self.model.config
        if load_format == "dummy" and config.quantization is None:  # say what was drawn
            drawn = {"quant_method": "gptq", **asdict(QuantizationConfig())}
            self.model.config = replace(config, quantization=drawn)
