"""Attention over the KV cache."""

import torch

from .kv_cache import KVCache


class Attention:
    """softmax(q k^T / sqrt(head_dim)) v of one request, written out (Vaswani et al. 2017)."""

    def __init__(self, kv_cache: KVCache) -> None:
        self.kv_cache = kv_cache
        self.zero = kv_cache.empty.new_zeros(1, 1, 1)

    def forward(
        self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim].

        The tokens are the last ones of the sequence. Query heads that share a key/value head
        (grouped-query attention, Ainslie et al. 2023) are stacked into one matrix, so that no
        key is repeated in memory.
        """
        self.kv_cache.append(layer_idx, k, v)
        keys, values = self.kv_cache.keys[layer_idx], self.kv_cache.values[layer_idx]
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads, seq_len, _ = keys.shape
        grouped = q.view(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        # [num_kv_heads, group_size * num_tokens, head_dim], then the same with seq_len.
        queries = grouped.reshape(num_kv_heads, -1, head_dim)
        # 0 * zero + scale * (q k^T): the scaling comes with the product, not as another kernel.
        scores = torch.baddbmm(
            self.zero, queries, keys.transpose(1, 2), beta=0, alpha=head_dim**-0.5
        )
        if num_tokens > 1:
            # A single token is the last one and sees everything: nothing to mask.
            future = torch.ones(num_tokens, seq_len, dtype=torch.bool, device=q.device)
            future = future.triu(diagonal=seq_len - num_tokens + 1)
            scores.view(num_kv_heads, -1, num_tokens, seq_len).masked_fill_(future, float("-inf"))
        # One kernel that accumulates in float32 whatever the dtype of its input and output.
        probabilities = torch.softmax(scores, dim=-1)
        attended = torch.bmm(probabilities, values)
        return (
            attended.view(num_kv_heads, -1, num_tokens, head_dim)
            .permute(2, 0, 1, 3)
            .reshape(num_tokens, num_heads, head_dim)
        )
