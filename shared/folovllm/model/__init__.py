"""Models: configuration, one transformer for all supported families, weights."""

from .config import ModelConfig, kv_bytes_per_token
from .loader import load_model, resolve_device, resolve_model_directory
from .transformer import CausalLM

__all__ = [
    "CausalLM",
    "ModelConfig",
    "kv_bytes_per_token",
    "load_model",
    "resolve_device",
    "resolve_model_directory",
]
