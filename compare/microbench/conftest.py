"""Engines in the middle of decoding, one per stage that exists, for the micro-benchmarks."""

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm.interfaces import SamplerOutput
from folovllm.model.config import kv_bytes_per_token
from folovllm.model.loader import load_model
from folovllm.request import Request, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
NUM_RUNNING = 256
"""As many requests as vLLM and nano-vllm run at once by default."""
PROMPT_LEN = 16
MAX_MODEL_LEN = 512

TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": MAX_MODEL_LEN,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
"""The host's work does not depend on the model, so it may be tiny."""


@dataclass(frozen=True)
class DecodingEngine:
    """An engine whose requests are all past their prompts."""

    engine: Any
    num_running: int

    def schedule(self) -> Any:
        return self.engine.scheduler.schedule()


def stage_names() -> list[str]:
    """A stage is found by existing."""
    return sorted(path.parent.name for path in ROOT.glob("m[1-7]_*/__init__.py"))


def record(scheduler: Any, scheduled: Any, token_id: int = 7) -> Any:
    """What follows a schedule(), as if the forward pass had given every row this token.

    A stage that plans a step before it knows the tokens of the last one does so in two calls.
    """
    num_rows = len(scheduled.scheduled)
    sampled = SamplerOutput(token_ids=[token_id] * num_rows, logprobs=[None] * num_rows)
    if hasattr(scheduler, "advance"):
        return scheduler.update(scheduled, sampled, scheduler.advance(scheduled))
    return scheduler.update(scheduled, sampled)


def decoding_requests(count: int, params: SamplingParams | None = None) -> list[Request]:
    """Requests with prompts of PROMPT_LEN tokens that do not end during a benchmark."""
    params = params or SamplingParams(
        temperature=0.0, max_tokens=MAX_MODEL_LEN - PROMPT_LEN, ignore_eos=True
    )
    return [
        Request(
            request_id=f"r{index}",
            prompt_token_ids=[(index + position) % 512 for position in range(PROMPT_LEN)],
            sampling_params=params,
            seed=index,
        )
        for index in range(count)
    ]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Any:
    directory = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps(TINY_LLAMA), encoding="utf-8")
    return load_model(directory, load_format="dummy", dtype="float32", device=str(device))


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Any:
    """Even smaller, for many long requests: 128 bytes of cache per token."""
    directory = tmp_path_factory.mktemp("long")
    config = TINY_LLAMA | {
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 16_384,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_model(directory, load_format="dummy", dtype="float32", device=str(device))


@pytest.fixture(params=stage_names())
def decoding(request: pytest.FixtureRequest, tiny_model: Any) -> DecodingEngine:
    """A stage's engine with as many running requests as it takes, up to NUM_RUNNING."""
    stage = importlib.import_module(request.param)
    bytes_per_token = kv_bytes_per_token(tiny_model.config, tiny_model.dtype)
    config = stage.EngineConfig(
        max_model_len=MAX_MODEL_LEN, kv_cache_bytes=NUM_RUNNING * MAX_MODEL_LEN * bytes_per_token
    )
    num_running = min(NUM_RUNNING, getattr(config, "max_num_seqs", 1))
    engine = stage.LLMEngine(config, tiny_model)
    requests = decoding_requests(num_running)
    for decoding_request in requests:
        engine.add_request(decoding_request)
    while not _all_decoding(requests):
        record(engine.scheduler, engine.scheduler.schedule())
    return DecodingEngine(engine, num_running)


def _all_decoding(requests: Sequence[Request]) -> bool:
    return all(request.num_output_tokens > 0 for request in requests)
