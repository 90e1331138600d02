"""A checkpoint directory for engines that only read checkpoints."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from folovllm.entrypoints.llm import DEFAULT_MODEL
from folovllm.model.config import ModelConfig
from folovllm.model.loader import load_model, resolve_model_directory
from folovllm.model.transformer import CausalLM
from folovllm.model.weights import published_tensors


@contextmanager
def checkpoint(
    model: str | None, *, load_format: str, dtype: str, device: str, seed: int
) -> Iterator[Path]:
    """The directory of a real model, or one made for a dummy: the stages' random weights, saved.

    With the same weights a peer must produce the same tokens, so the gate covers dummies too.
    A made directory is gone when the context ends.
    """
    if load_format != "dummy":
        yield resolve_model_directory(model or DEFAULT_MODEL)
        return
    if model is None:
        raise ValueError("load_format 'dummy' needs a model: a preset such as qwen3-0.6b")
    with TemporaryDirectory(prefix="folovllm-dummy-") as folder:
        source = load_model(model, load_format=load_format, dtype=dtype, device=device, seed=seed)
        save_checkpoint(source, Path(folder))
        del source
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        yield Path(folder)


def save_checkpoint(model: CausalLM, folder: Path) -> None:
    """Write config.json and model.safetensors under the names that checkpoints use."""
    tensors = {
        name: tensor.to("cpu", copy=True).contiguous()
        for name, tensor in published_tensors(model).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = hf_config(model.config, str(model.dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def count_parameters(folder: Path, config: ModelConfig) -> int:
    """Parameters of a checkpoint, counted from the headers of its files."""
    num_parameters = 0
    for name, shape in _tensor_shapes(folder):
        is_tied_copy = name == "lm_head.weight" and config.tie_word_embeddings
        if not is_tied_copy and not name.endswith("rotary_emb.inv_freq"):
            num_parameters += math.prod(shape)
    return num_parameters


def _tensor_shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_slice(name).get_shape()


def hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model of this shape."""
    rope = config.rope
    scaling: dict[str, Any] = {"rope_type": rope.rope_type}
    if rope.rope_type != "default":
        scaling["factor"] = rope.factor
    if rope.rope_type in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.rope_type == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
    if rope.rope_type == "yarn":
        scaling |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.attention_factor,
            "truncate": rope.truncate,
        }
    has_attention_bias = config.qkv_bias if config.model_type != "qwen2" else False
    return {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
        # Engines that do not know rope_parameters yet read this name.
        **({"rope_scaling": scaling} if rope.rope_type != "default" else {}),
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": has_attention_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": config.sliding_window,
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": sorted(config.eos_token_ids) or None,
    }


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
