"""Tiny random models of every supported family, written to disk as a publisher would."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

_VOCAB_SIZE = 199
"""Small and odd: nothing may rely on a round vocabulary."""


@dataclass(frozen=True)
class ToyFamily:
    """A family, and the features of it that a toy must have for a test to mean something."""

    name: str
    model_type: str
    overrides: dict[str, Any]


def toy_families() -> tuple[ToyFamily, ...]:
    """The four families, with grouped-query attention, scaled RoPE, tied and untied embeddings."""
    llama3_rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return (
        ToyFamily("llama", "llama", {"rope_parameters": llama3_rope, "tie_word_embeddings": False}),
        ToyFamily("mistral", "mistral", {"sliding_window": None, "tie_word_embeddings": False}),
        ToyFamily("qwen2", "qwen2", {"tie_word_embeddings": True}),
        ToyFamily("qwen3", "qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    )


def write_toy_model(family: ToyFamily, directory: Path, *, seed: int = 0) -> Path:
    """Save a random two-layer model of `family` with transformers; return its directory.

    Weights are scaled up from the usual initialisation, so that logits differ by more than
    rounding and greedy tokens do not settle on one value.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": _VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(family.model_type, **{**shape, **family.overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif "embed" in name or "lm_head" in name:
                parameter.normal_(0.0, 1.0, generator=generator)
            else:
                parameter.normal_(0.0, 0.15, generator=generator)
    model.generation_config.eos_token_id = [2, 3]
    model.save_pretrained(directory, safe_serialization=True)
    return directory


def reference_greedy(
    directory: Path, prompts: list[list[int]], max_tokens: int, *, ignore_eos: bool = True
) -> list[list[int]]:
    """Greedy tokens of Transformers in float32, one prompt at a time.

    The tests of every stage ask for the same ones: a process computes them once.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    model = _Checkpoint(digest.hexdigest(), directory)
    outputs = _greedy_of(model, tuple(map(tuple, prompts)), max_tokens, ignore_eos)
    return [list(output) for output in outputs]


@dataclass(frozen=True)
class _Checkpoint:
    """A directory, equal to any other with the same files."""

    digest: str
    directory: Path = field(compare=False)


@cache
def _greedy_of(
    checkpoint: _Checkpoint, prompts: tuple[tuple[int, ...], ...], max_tokens: int, ignore_eos: bool
) -> tuple[list[int], ...]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32).eval()
    return tuple(_greedy(model, [list(prompt) for prompt in prompts], max_tokens, ignore_eos))


def _greedy(
    model: Any, prompts: list[list[int]], max_tokens: int, ignore_eos: bool
) -> Iterator[list[int]]:
    eos = model.generation_config.eos_token_id
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=None if ignore_eos else eos,
            pad_token_id=0,
        )
        yield output[0, len(prompt) :].tolist()


def reference_logits(
    directory: Path, prompts: list[list[int]], continuations: list[list[int]]
) -> list[torch.Tensor]:
    """Transformers' logits at every position that predicts a token of a continuation.

    One tensor per prompt: [len(continuation), vocab_size] float32.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows = []
    with torch.no_grad():
        for prompt, continuation in zip(prompts, continuations, strict=True):
            logits = model(torch.tensor([prompt + continuation])).logits[0]
            rows.append(logits[len(prompt) - 1 : len(prompt) + len(continuation) - 1].float())
    return rows
