"""Attention over the KV cache: what a step tells it, and the reference that computes it."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from folovllm.kernels import reference

from .kv_cache import KVCache


@dataclass(frozen=True)
class AttentionMetadata:
    """Where each request's queries, keys and values are in this step.

    No request is padded to another's length: tokens lie end to end. Every length is on the device,
    so that a captured graph reads the lengths of the step that replays it. Two requests with 3
    and 1 tokens to compute, the second with 6 tokens in the cache already, blocks of 4:

        cu_seqlens_q  [0, 3, 4]        slot_mapping  [28, 29, 30, 10]
        seq_lens      [3, 7]           block_tables  [[7, 0], [3, 2]]   (0 is padding)
    """

    cu_seqlens_q: torch.Tensor
    """[num_requests + 1] int32, request i's queries are rows [i] to [i + 1]"""
    seq_lens: torch.Tensor
    """[num_requests] int32, tokens in the cache after this step; 0 for a row that is padding"""
    block_tables: torch.Tensor
    """[num_requests, max_num_blocks] int32; what lies behind a table's end is never looked up"""
    slot_mapping: torch.Tensor
    """[num_tokens] int64, block id * block_size + offset of each token; -1 is not stored"""
    min_query_len: int
    """Of all requests, like the next two; a captured step knows its own bounds only."""
    max_query_len: int
    max_seq_len: int


class Attention(Protocol):
    """Stores the step's keys and values and attends, in whatever way."""

    def start_step(self, metadata: AttentionMetadata) -> None:
        """Called before the first layer of every step, with what all layers will be given."""

    def forward(
        self,
        metadata: AttentionMetadata,
        layer_idx: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        """q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim], rows
        may be strided. Returns a contiguous tensor like q; rows of padding hold anything."""


class TorchAttention:
    """Request by request, over blocks gathered by their tables: the CPU path, and the reference.

    On a GPU it waits for the device in every layer, to learn the lengths.
    """

    def __init__(self, kv_cache: KVCache) -> None:
        self.kv_cache = kv_cache

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
        reference.store_kv(
            k, v, keys.transpose(1, 2), values.transpose(1, 2), metadata.slot_mapping
        )
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        starts, seq_lens = metadata.cu_seqlens_q.tolist(), metadata.seq_lens.tolist()
        for row, seq_len in enumerate(seq_lens):
            queries = slice(starts[row], starts[row + 1])
            block_ids = metadata.block_tables[row, : -(-seq_len // keys.shape[1])]
            # [seq_len, num_kv_heads, head_dim]
            own_keys = keys.index_select(0, block_ids).flatten(0, 1)[:seq_len]
            own_values = values.index_select(0, block_ids).flatten(0, 1)[:seq_len]
            out[queries] = _attend(q[queries], own_keys, own_values)
        return out


def _attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """As kernels.reference.causal_attention, by torch's own attention."""
    num_queries, seq_len = len(q), len(keys)
    is_visible = None
    if 1 < num_queries < seq_len:
        positions = torch.arange(seq_len, device=q.device)
        is_visible = positions <= positions[seq_len - num_queries :, None]
    attended = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=is_visible,
        is_causal=1 < num_queries == seq_len,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1)
