"""Who computes attention: this stage's kernels, the flash-attn package, or the reference."""

import torch

from folovllm.kernels.flash_attn_package import PagedAttendFn, load_flash_attn
from folovllm.kernels.selection import select_kernels
from folovllm.model.transformer import CausalLM

from .attention import Attention, AttentionMetadata, TorchAttention
from .config import AttentionBackend, EngineConfig
from .kv_cache import KVCache

MAX_HEAD_DIM = 256
"""Of the Triton kernels and of the flash-attn package."""


def select_attention(config: EngineConfig, model: CausalLM, kv_cache: KVCache) -> Attention:
    """Who computes attention: as `config` says, or the kernels of this stage where they can run.

    ValueError says why a backend that was named cannot serve, and what to choose or install.
    """
    backend = config.attention_backend
    if backend is AttentionBackend.AUTO:
        has_kernels = model.device.type == "cuda" and model.config.head_dim <= MAX_HEAD_DIM
        backend = AttentionBackend.TRITON if has_kernels else AttentionBackend.TORCH
    if backend is AttentionBackend.TORCH:
        return TorchAttention(kv_cache)
    if model.device.type != "cuda":
        raise ValueError(
            f"attention_backend {backend.value} needs a CUDA device and this model is on "
            f"{model.device}; choose torch or auto"
        )
    if model.config.head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"attention_backend {backend.value} takes head_dim up to {MAX_HEAD_DIM} and this "
            f"model has {model.config.head_dim}; choose torch"
        )
    if backend is AttentionBackend.TRITON:
        from .flash_attention import TritonAttention  # needs triton, which a CPU does not

        return TritonAttention(kv_cache, model.config.num_heads, config.max_num_seqs)
    attend = load_flash_attn(kv_cache.keys.dtype, config.block_size)
    return PackageAttention(kv_cache, attend)


class PackageAttention:
    """The flash-attn package, which attends to what a launch of its own has stored before."""

    def __init__(self, kv_cache: KVCache, attend: PagedAttendFn) -> None:
        self.kv_cache = kv_cache
        self.attend = attend
        self.store_kv = select_kernels(kv_cache.keys.device).store_kv

    def start_step(self, metadata: AttentionMetadata) -> None: ...

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
        return self.attend(
            q,
            keys,
            values,
            cu_seqlens_q=metadata.cu_seqlens_q,
            seq_lens=metadata.seq_lens,
            block_tables=metadata.block_tables,
            max_query_len=metadata.max_query_len,
        )
