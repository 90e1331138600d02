"""Attention by the official flash-attn package, in its third or second version, if installed.

FlashAttention-3 (Shah et al. 2024) is the module `flash_attn_interface`, FlashAttention-2 (Dao
2023) is `flash_attn`. Both read paged caches in place; neither stores with the queries of this
stage's layout, so keys and values are stored first, in a launch of their own.
"""

from types import ModuleType

import torch
import torch.nn.functional as F

from folovllm.kernels.selection import select_kernels

from .attention import Attention, AttentionMetadata
from .config import EngineConfig
from .kv_cache import KVCache

_FA2_BLOCK_SIZE = 256
"""FlashAttention-2 takes multiples of this as block size."""


def make_flash_attn(config: EngineConfig, kv_cache: KVCache) -> Attention:
    """The newest version that is installed; ValueError if none is, or if it cannot serve."""
    if kv_cache.keys.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"attention_backend flash_attn computes in float16 or bfloat16 and the model is in "
            f"{str(kv_cache.keys.dtype).removeprefix('torch.')}; choose triton, or another dtype"
        )
    interface = flash_attn_3()
    if interface is not None:
        return FlashAttention3(interface, kv_cache)
    package = _flash_attn_2()
    if package is None:
        raise ValueError(
            "attention_backend flash_attn needs FlashAttention-3 (module flash_attn_interface) or "
            "FlashAttention-2 (`pip install flash-attn`), and neither is installed; install one, "
            "or choose triton"
        )
    if config.block_size % _FA2_BLOCK_SIZE:
        raise ValueError(
            f"FlashAttention-2 reads blocks of a multiple of {_FA2_BLOCK_SIZE} tokens and "
            f"block_size is {config.block_size}; set block_size={_FA2_BLOCK_SIZE}, or choose triton"
        )
    return FlashAttention2(package, kv_cache)


def flash_attn_3() -> ModuleType | None:
    """The module of FlashAttention-3, if it is installed."""
    try:
        import flash_attn_interface
    except ImportError:
        return None
    return flash_attn_interface


def _flash_attn_2() -> ModuleType | None:
    try:
        import flash_attn
    except ImportError:
        return None
    return flash_attn


class FlashAttention3:
    """One call for any mix of lengths."""

    def __init__(self, interface: ModuleType, kv_cache: KVCache) -> None:
        self.attend = interface.flash_attn_with_kvcache
        self.kv_cache = kv_cache
        self.store_kv = select_kernels(kv_cache.keys.device).store_kv

    def forward(
        self,
        metadata: AttentionMetadata,
        layer_idx: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        keys, values = self.kv_cache.keys[layer_idx], self.kv_cache.values[layer_idx]
        self.store_kv(k, v, keys.transpose(1, 2), values.transpose(1, 2), metadata.slot_mapping)
        out: torch.Tensor = self.attend(
            q,
            keys,
            values,
            cache_seqlens=metadata.seq_lens,
            page_table=metadata.block_tables,
            cu_seqlens_q=metadata.cu_seqlens_q,
            max_seqlen_q=metadata.max_query_len,
            causal=True,
            # 0: as many as the package thinks best. Long queries fill the device by themselves.
            num_splits=0 if metadata.max_query_len == 1 else 1,
        )
        return out


class FlashAttention2:
    """One call for single queries, another for anything else."""

    def __init__(self, package: ModuleType, kv_cache: KVCache) -> None:
        self.attend_single = package.flash_attn_with_kvcache
        self.attend_varlen = package.flash_attn_varlen_func
        self.kv_cache = kv_cache
        self.store_kv = select_kernels(kv_cache.keys.device).store_kv

    def forward(
        self,
        metadata: AttentionMetadata,
        layer_idx: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        keys, values = self.kv_cache.keys[layer_idx], self.kv_cache.values[layer_idx]
        self.store_kv(k, v, keys.transpose(1, 2), values.transpose(1, 2), metadata.slot_mapping)
        out: torch.Tensor
        if metadata.max_query_len == 1:
            out = self.attend_single(
                q[:, None],
                keys,
                values,
                cache_seqlens=metadata.seq_lens,
                block_table=metadata.block_tables,
                causal=True,
            )
            return out[:, 0]
        seq_ends = metadata.seq_lens.cumsum(0, dtype=torch.int32)
        out = self.attend_varlen(
            q,
            keys,
            values,
            metadata.cu_seqlens_q,
            F.pad(seq_ends, (1, 0)),
            metadata.max_query_len,
            metadata.block_tables.shape[1] * keys.shape[1],
            causal=True,
            block_table=metadata.block_tables,
        )
        return out
