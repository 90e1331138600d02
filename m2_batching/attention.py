"""Attention over the KV cache."""

from dataclasses import dataclass

import torch

from folovllm.kernels.selection import Kernels

from .kv_cache import KVCache


@dataclass(frozen=True)
class AttentionMetadata:
    """Where each request's queries, keys and values are in this step.

    The packed tokens are spread over a padded batch: one row per cache slot, `max_query_len`
    queries per row. Two prompts of 2 and 3 tokens in slots 0 and 1 give

        packed tokens     a0 a1 b0 b1 b2
        padded batch      a0 a1 --       packed_to_padded  [0, 1, 3, 4, 5]
                          b0 b1 b2       padded_to_packed  [0, 1, 0, 2, 3, 4] (padding: any token)
    """

    slot_mapping: torch.Tensor
    """[num_tokens] int64, cache position of each new token: slot * max_model_len + position"""
    rows: slice | torch.Tensor
    """cache slot of each padded row: a slice of slots, or [num_rows] int64"""
    packed_to_padded: torch.Tensor
    """[num_tokens] int64, each token's index in the flattened padded batch"""
    padded_to_packed: torch.Tensor
    """[num_rows * max_query_len] int64, the token at each padded place"""
    is_hidden: torch.Tensor
    """[num_rows, 1, max_query_len, padded_seq_len] bool, True where a query may not look"""


class Attention:
    """Plain softmax attention of all requests at once, over padded and masked slots.

    Only attention knows about requests; everything else in the model runs on packed tokens
    (selective batching, Orca, Yu et al. 2022).
    """

    def __init__(self, kv_cache: KVCache, kernels: Kernels) -> None:
        self.kv_cache = kv_cache
        self.kernels = kernels
        self.zero = kv_cache.keys.new_zeros(1, 1, 1)

    def forward(
        self,
        metadata: AttentionMetadata,
        layer_idx: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        """q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim].

        Query heads that share a key/value head (grouped-query attention, Ainslie et al. 2023)
        are stacked into one matrix, so that no key is repeated in memory.
        """
        keys, values = self.kv_cache.keys[layer_idx], self.kv_cache.values[layer_idx]
        self.kernels.store_kv(k, v, keys, values, metadata.slot_mapping)
        num_heads, head_dim = q.shape[1:]
        num_kv_heads = keys.shape[1]
        num_rows, _, max_query_len, padded_seq_len = metadata.is_hidden.shape
        # [num_rows * num_kv_heads, padded_seq_len, head_dim]; of a slice of slots, a view.
        keys = keys[:, :, :padded_seq_len][metadata.rows].flatten(0, 1)
        values = values[:, :, :padded_seq_len][metadata.rows].flatten(0, 1)
        queries = (
            q.index_select(0, metadata.padded_to_packed)
            .view(num_rows, max_query_len, num_kv_heads, -1, head_dim)
            .permute(0, 2, 3, 1, 4)
            .reshape(num_rows * num_kv_heads, -1, head_dim)
        )
        # 0 * zero + scale * (q k^T): the scaling comes with the product, not as another kernel.
        scores = torch.baddbmm(
            self.zero, queries, keys.transpose(1, 2), beta=0, alpha=head_dim**-0.5
        )
        scores.view(num_rows, num_heads, max_query_len, padded_seq_len).masked_fill_(
            metadata.is_hidden, float("-inf")
        )
        # One kernel that accumulates in float32 whatever the dtype of its input and output.
        probabilities = torch.softmax(scores, dim=-1)
        attended = (
            torch.bmm(probabilities, values)
            .view(num_rows, num_heads, max_query_len, head_dim)
            .transpose(1, 2)
            .reshape(-1, num_heads, head_dim)
        )
        return attended.index_select(0, metadata.packed_to_padded)
