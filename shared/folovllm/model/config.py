"""What a model looks like: read from a checkpoint's config.json, or a preset of a known shape."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .presets import preset_configs
from .published_settings import (
    eos_token_ids,
    flag,
    head_dim_of,
    num_kv_heads_of,
    number,
    quantization_of,
    refuse_other_computations,
    sliding_window_of,
    supported_type,
    whole_number,
)
from .rope import RopeConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder-only transformer of the Llama, Mistral, Qwen2 or Qwen3 family."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Apart from hidden_size: Qwen3-0.6B has 16 heads of 128 on a hidden size of 1024."""
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    """As the file has it; `num_positions` says what a scaled rope makes of it."""
    tie_word_embeddings: bool
    """Whether logits are computed with the embedding table. The loader clears it where the
    checkpoint brings a head of its own all the same."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each query and key head before RoPE (Qwen3)."""
    sliding_window: int | None = None
    """Tokens a query may look back; None is all. We attend to everything, so an engine refuses
    a max_model_len above it."""
    dtype: str = "float32"
    """The dtype the checkpoint was written in."""
    bos_token_id: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    quantization: dict[str, Any] | None = None
    """How the checkpoint's matrices are stored, in its own words; None: as they are."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads}); check the model's config.json"
            )

    @classmethod
    def from_directory(cls, path: str | Path) -> "ModelConfig":
        """Read config.json and, where there is one, generation_config.json (its EOS ids win).

        ValueError names the file and the setting that is missing, wrong or not supported.
        """
        directory = Path(path)
        config = _read_json(directory / "config.json")
        generation_path = directory / "generation_config.json"
        generation = _read_json(generation_path) if generation_path.exists() else {}
        # AutoGPTQ wrote a file of its own, and config.json said nothing.
        gptq_path = directory / "quantize_config.json"
        if gptq_path.exists() and not config.get("quantization_config"):
            config["quantization_config"] = {"quant_method": "gptq", **_read_json(gptq_path)}
        try:
            return cls.from_hf(config, generation)
        except KeyError as error:
            raise ValueError(
                f"{directory / 'config.json'} has no {error.args[0]!r}, which a model of type "
                f"{config.get('model_type')!r} needs; download the model again"
            ) from error
        except ValueError as error:
            raise ValueError(f"the model in {directory} cannot run: {error}") from error

    @classmethod
    def from_hf(
        cls, config: dict[str, Any], generation: dict[str, Any] | None = None
    ) -> "ModelConfig":
        """Translate the published names; ValueError for anything we would compute wrongly.

        What a file leaves out is what it means to Transformers. KeyError names a setting that
        must be there.
        """
        model_type = supported_type(config)
        refuse_other_computations(config)
        num_heads = whole_number(config, "num_attention_heads")
        head_dim = head_dim_of(config, num_heads)
        attention_bias = flag(config, "attention_bias")
        return cls(
            model_type=model_type,
            vocab_size=whole_number(config, "vocab_size"),
            hidden_size=whole_number(config, "hidden_size"),
            intermediate_size=whole_number(config, "intermediate_size"),
            num_layers=whole_number(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads_of(config, num_heads),
            head_dim=head_dim,
            rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
            rope=RopeConfig.from_hf(config, head_dim),
            max_position_embeddings=whole_number(config, "max_position_embeddings"),
            tie_word_embeddings=flag(config, "tie_word_embeddings"),
            qkv_bias=model_type == "qwen2" or attention_bias,
            o_bias=model_type in ("llama", "qwen3") and attention_bias,
            mlp_bias=model_type == "llama" and flag(config, "mlp_bias"),
            qk_norm=model_type == "qwen3",
            sliding_window=sliding_window_of(config),
            dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=eos_token_ids(config, generation or {}),
            quantization=quantization_of(config),
        )

    @staticmethod
    def preset_names() -> tuple[str, ...]:
        return tuple(sorted(preset_configs()))

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """The shape of a published model, for benchmarks with random weights."""
        presets = preset_configs()
        if name not in presets:
            raise ValueError(f"no preset {name!r}; there are {', '.join(cls.preset_names())}")
        return cls.from_hf(presets[name])

    @property
    def num_positions(self) -> int:
        """Positions that the rotary embedding tells apart, stretched ones included."""
        return self.rope.context_len(self.max_position_embeddings)

    @property
    def max_context_len(self) -> int:
        """Most tokens that a query may look back on, itself included, in this model."""
        if self.sliding_window is None:
            return self.num_positions
        return min(self.num_positions, self.sliding_window)

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that the keys and values of one token take in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist; a model directory needs config.json, *.safetensors and "
            f"tokenizer files"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
