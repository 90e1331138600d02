"""Device-side storage of keys and values."""

import torch

from folovllm.model.config import kv_bytes_per_token
from folovllm.model.transformer import CausalLM

from .config import EngineConfig


class KVCache:
    """One request's keys and values; every step concatenates the new ones.

    keys[layer_idx], values[layer_idx]: [num_kv_heads, seq_len, head_dim]. Concatenation
    allocates a new tensor and copies the whole history, every layer, every token: simple, and
    the first thing that a serious engine replaces.
    """

    def __init__(self, config: EngineConfig, model: CausalLM) -> None:
        self.num_tokens = config.max_model_len
        num_bytes = config.max_model_len * kv_bytes_per_token(model.config, model.dtype)
        if config.kv_cache_bytes is not None and num_bytes > config.kv_cache_bytes:
            raise ValueError(
                f"a request of max_model_len {config.max_model_len} needs {num_bytes} bytes of KV "
                f"cache but kv_cache_bytes is {config.kv_cache_bytes}; lower max_model_len or "
                f"raise kv_cache_bytes"
            )
        shape = (model.config.num_kv_heads, 0, model.config.head_dim)
        self.empty = torch.empty(shape, dtype=model.dtype, device=model.device)
        self.num_layers = model.config.num_layers
        self.clear()

    def clear(self) -> None:
        self.keys = [self.empty] * self.num_layers
        self.values = [self.empty] * self.num_layers

    def append(self, layer_idx: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v: [num_tokens, num_kv_heads, head_dim], the next tokens of the sequence."""
        self.keys[layer_idx] = torch.cat((self.keys[layer_idx], k.transpose(0, 1)), dim=1)
        self.values[layer_idx] = torch.cat((self.values[layer_idx], v.transpose(0, 1)), dim=1)

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))
