"""An LLM without weights that may run in another process: for tests of what stands in front."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..entrypoints.engine_options import build_config
from ..entrypoints.llm import LLM
from ..interfaces import StepOutput
from ..request import Request
from .scripted_engine import ScriptedEngine, ScriptedModel, ScriptedModelConfig, ScriptedPolicy

EXIT_STATUS = 7
"""Of a process whose engine was told to end it."""
VOCAB_SIZE = 400
"""Enough for the toy tokenizers."""


@dataclass(frozen=True)
class _TokenizerInFront:
    """One that is not loaded here: an engine gets and gives token ids."""

    path: str
    eos_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class ServedConfig:
    """Options of the engine, and what shall go wrong in it."""

    max_model_len: int = 2048
    max_num_seqs: int = 256
    scheduling_policy: ScriptedPolicy = ScriptedPolicy.PRIORITY
    kv_cache_bytes: int | None = None
    step_ms: float = 0.0
    """How long a step takes."""
    exit_at_step: int | None = None
    """The process ends in this step, without a word."""
    raise_at_step: int | None = None
    hang_at_step: int | None = None
    """This step never ends."""


class ServedEngine(ScriptedEngine):
    """Answers every request with its own prompt, over and over."""

    config: Any

    def step(self) -> StepOutput:
        time.sleep(self.config.step_ms / 1000)
        if self.num_steps == self.config.exit_at_step:
            os._exit(EXIT_STATUS)
        if self.num_steps == self.config.raise_at_step:
            raise RuntimeError("the device is gone")
        while self.num_steps == self.config.hang_at_step:
            time.sleep(60)
        return super().step()


class ServedLLM(LLM):
    """Starts as fast as torch is imported; `model` is the directory of a tokenizer."""

    config_class = ServedConfig
    engine_class = ServedEngine

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        load_format: str = "auto",
        dtype: str = "auto",
        device: str = "auto",
        seed: int = 0,
        tokenizer: str | None = None,
        tensor_parallel_size: int = 1,
        **engine_options: Any,
    ) -> None:
        """What concerns weights is taken as the command line gives it, and there are none."""
        if tensor_parallel_size != 1:
            raise ValueError("there are no weights that several processes could share")
        config = build_config(self.config_class, engine_options)
        if model is None:
            raise ValueError("name the directory of a tokenizer")
        self.model_path = model
        self.tokenizer: Any = _TokenizerInFront(str(model))
        self.model: Any = ScriptedModel(ScriptedModelConfig(VOCAB_SIZE), _repeat_prompt)
        self.engine = ServedEngine(config, self.model)
        self.request_settings = self._make_request_settings(config, seed=seed)


def _repeat_prompt(request: Request) -> Sequence[int]:
    return request.prompt_token_ids
