"""Device-side storage of keys and values."""

import torch

from folovllm.model.config import kv_bytes_per_token
from folovllm.model.transformer import CausalLM

from .config import EngineConfig


class KVCache:
    """Keys and values of all running requests, one slot of max_model_len tokens each.

    keys[layer_idx], values[layer_idx]: [num_slots, num_kv_heads, max_model_len, head_dim]. Heads
    come before tokens so that (slot, head) is one batch dimension of a matrix product and no
    key is copied. The memory starts as zeros and ever holds finite numbers: masked positions
    get probability 0, and 0 * NaN would still be NaN.
    """

    def __init__(self, config: EngineConfig, model: CausalLM, num_bytes: int) -> None:
        slot_bytes = config.max_model_len * kv_bytes_per_token(model.config, model.dtype)
        num_slots = min(num_bytes // slot_bytes, config.max_num_seqs)
        if num_slots == 0:
            raise ValueError(
                f"a slot of max_model_len {config.max_model_len} tokens takes {slot_bytes} bytes "
                f"but only {num_bytes} are there for the KV cache; lower max_model_len or raise "
                f"kv_cache_bytes"
            )
        self.num_tokens = num_slots * config.max_model_len
        shape = (
            2,
            model.config.num_layers,
            num_slots,
            model.config.num_kv_heads,
            config.max_model_len,
            model.config.head_dim,
        )
        self.keys, self.values = torch.zeros(shape, dtype=model.dtype, device=model.device)

    @property
    def num_bytes(self) -> int:
        """Bytes held, used or not."""
        return self.keys.nbytes + self.values.nbytes
