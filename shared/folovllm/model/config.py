"""What a model looks like: read from a checkpoint's config.json, or a preset of a known shape."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .rope import RopeConfig

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


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
    tie_word_embeddings: bool
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

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads}); check the model's config.json"
            )

    @classmethod
    def from_directory(cls, path: str | Path) -> "ModelConfig":
        """Read config.json and, where there is one, generation_config.json (its EOS ids win)."""
        directory = Path(path)
        config = _read_json(directory / "config.json")
        generation_path = directory / "generation_config.json"
        generation = _read_json(generation_path) if generation_path.exists() else {}
        try:
            return cls.from_hf(config, generation)
        except KeyError as error:
            raise ValueError(
                f"{directory / 'config.json'} has no {error.args[0]!r}, which a model of type "
                f"{config.get('model_type')!r} needs; download the model again"
            ) from error

    @classmethod
    def from_hf(
        cls, config: dict[str, Any], generation: dict[str, Any] | None = None
    ) -> "ModelConfig":
        """Translate the published names; ValueError for anything we would compute wrongly."""
        model_type = config.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise ValueError(
                f"model_type {model_type!r} is not supported; this engine runs "
                f"{', '.join(SUPPORTED_MODEL_TYPES)}"
            )
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise ValueError(f"hidden_act {activation!r} is not supported, only 'silu'")
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method")
            raise ValueError(f"this checkpoint is quantised ({method}); give an unquantised one")
        _refuse_unknown_head_scaling(config)
        num_heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
        attention_bias = bool(config.get("attention_bias", False))
        eos = (generation or {}).get("eos_token_id")
        eos = config.get("eos_token_id") if eos is None else eos
        return cls(
            model_type=model_type,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=RopeConfig.from_hf(config, head_dim),
            max_position_embeddings=config["max_position_embeddings"],
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=model_type == "qwen2" or attention_bias,
            o_bias=model_type in ("llama", "qwen3") and attention_bias,
            mlp_bias=model_type == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=model_type == "qwen3",
            sliding_window=_sliding_window(config),
            dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=frozenset([eos] if isinstance(eos, int) else eos or ()),
        )

    @staticmethod
    def preset_names() -> tuple[str, ...]:
        return tuple(sorted(_presets()))

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """The shape of a published model, for benchmarks with random weights."""
        presets = _presets()
        if name not in presets:
            raise ValueError(f"no preset {name!r}; there are {', '.join(cls.preset_names())}")
        return cls.from_hf(presets[name])

    @property
    def max_context_len(self) -> int:
        """Most tokens that a query may look back on, itself included, in this model."""
        if self.sliding_window is None:
            return self.max_position_embeddings
        return min(self.max_position_embeddings, self.sliding_window)

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
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _refuse_unknown_head_scaling(config: dict[str, Any]) -> None:
    """Llama and Mistral derivatives carry extra factors; ignoring one gives silent nonsense."""
    neutral = {"attention_multiplier": None, "logits_scaling": 1.0, "final_logit_softcapping": None}
    for name, value in neutral.items():
        if config.get(name, value) != value:
            raise ValueError(f"config.json sets {name}={config[name]!r}, which is not supported")


def _sliding_window(config: dict[str, Any]) -> int | None:
    if config["model_type"] == "llama":
        return None
    if config["model_type"].startswith("qwen") and not config.get("use_sliding_window", False):
        return None
    # What a Mistral checkpoint that names no window means to Transformers; null is no window.
    default = 4096 if config["model_type"] == "mistral" else None
    return config.get("sliding_window", default)


def _presets() -> dict[str, dict[str, Any]]:
    """config.json of the published models, less what does not change the computation."""
    return {
        "qwen3-0.6b": {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
            "eos_token_id": [151645, 151643],
        },
        "qwen3-8b": {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            "eos_token_id": [151645, 151643],
        },
        "llama-3.1-8b": {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            "eos_token_id": [128001, 128008, 128009],
        },
    }
