"""Single settings of a published config.json: what each may be, and what leaving it out means."""

from typing import Any

from ..setting_checks import is_int

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def supported_type(config: dict[str, Any]) -> str:
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"model_type {model_type!r} is not supported; this engine runs "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    return str(model_type)


def refuse_other_computations(config: dict[str, Any]) -> None:
    """ValueError for a setting under which another model than ours would be computed."""
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"hidden_act {activation!r} is not supported, only 'silu'")
    # Llama and Mistral derivatives carry extra factors; ignoring one gives silent nonsense.
    neutral = {
        "attention_multiplier": None,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "is_causal": True,
        "per_layer_config": None,
    }
    for name, value in neutral.items():
        if config.get(name, value) not in (value, None):
            raise ValueError(f"config.json sets {name}={config[name]!r}, which is not supported")


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """What the checkpoint says about how its weights are stored; None if it says nothing."""
    for name in ("quantization_config", "compression_config"):
        quantization = config.get(name)
        if quantization:
            return (
                quantization if isinstance(quantization, dict) else {"quant_method": quantization}
            )
    return None


def whole_number(config: dict[str, Any], name: str) -> int:
    """A size that must be there, of at least 1."""
    value = config[name]
    if not is_int(value) or value < 1:
        raise ValueError(
            f"config.json must have a whole number of at least 1 as {name}, got {value!r}"
        )
    return int(value)


def number(config: dict[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"config.json must have a number as {name}, got {value!r}")
    return float(value)


def flag(config: dict[str, Any], name: str) -> bool:
    """A switch that is off where nothing is said; a text such as "false" is none."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json must have true or false as {name}, got {value!r}")
    return bool(value)


def head_dim_of(config: dict[str, Any], num_heads: int) -> int:
    if config.get("head_dim") is not None:
        return whole_number(config, "head_dim")
    if config["model_type"] == "qwen3" and "head_dim" not in config:
        return 128
    hidden_size = whole_number(config, "hidden_size")
    if hidden_size % num_heads:
        raise ValueError(
            f"config.json has no head_dim, and its hidden_size {hidden_size} is no multiple of "
            f"num_attention_heads {num_heads}; download the model again"
        )
    return hidden_size // num_heads


def num_kv_heads_of(config: dict[str, Any], num_heads: int) -> int:
    if config.get("num_key_value_heads") is not None:
        return whole_number(config, "num_key_value_heads")
    if "num_key_value_heads" in config:
        return num_heads
    return {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(config["model_type"], num_heads)


def eos_token_ids(config: dict[str, Any], generation: dict[str, Any]) -> frozenset[int]:
    """Every end-of-sequence id; those of generation_config.json, where it names any."""
    file, eos = "generation_config.json", generation.get("eos_token_id")
    if eos is None:
        default = 2 if config["model_type"] in ("llama", "mistral") else None
        file, eos = "config.json", config.get("eos_token_id", default)
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(map(is_int, ids)):
        raise ValueError(
            f"{file} must have a token id, a list of them or null as eos_token_id, got {eos!r}"
        )
    # An id that no logit stands for cannot be sampled, and cannot end anything.
    return frozenset(token_id for token_id in ids if 0 <= token_id < config["vocab_size"])


def sliding_window_of(config: dict[str, Any]) -> int | None:
    """The window of the layers that have one; None if no layer has."""
    model_type = config["model_type"]
    if model_type == "llama":
        return None
    # What a checkpoint that names no window means to Transformers; null is no window.
    window = config.get("sliding_window", 4096)
    if model_type.startswith("qwen"):
        window = window if flag(config, "use_sliding_window") else None
        return window if _has_sliding_layers(config, window) else None
    return window


def _has_sliding_layers(config: dict[str, Any], window: int | None) -> bool:
    """Qwen: the layers from max_window_layers on have a window, or those that layer_types names."""
    types = config.get("layer_types")
    if types is None:
        return int(config.get("max_window_layers") or 0) < config["num_hidden_layers"]
    for name in types:
        if name == "full_attention" or (name == "sliding_attention" and window is not None):
            continue
        raise ValueError(
            f"config.json has {name!r} among its layer_types, with a window of {window}; this "
            f"engine computes full_attention, and sliding_attention within its window"
        )
    return "sliding_attention" in types
