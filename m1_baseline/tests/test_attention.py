"""Attention over the concatenated cache against the plain reference."""

import pytest
import torch

from folovllm.kernels.reference import causal_attention
from folovllm.testing.engine_contract import toy_model
from m1_baseline.attention import Attention
from m1_baseline.config import EngineConfig
from m1_baseline.kv_cache import KVCache

__all__ = ["toy_model"]


@pytest.mark.parametrize("chunks", [[1], [7], [5, 1, 1], [3, 4, 1, 2]])
def test_attention_equals_reference_however_the_sequence_arrives(toy_model, chunks) -> None:
    config = toy_model.config
    total = sum(chunks)
    generator = torch.Generator().manual_seed(total)
    q = torch.randn(total, config.num_heads, config.head_dim, generator=generator)
    k, v = torch.randn(2, total, config.num_kv_heads, config.head_dim, generator=generator)
    attention = Attention(KVCache(EngineConfig(max_model_len=64), toy_model))
    pieces = [
        attention.forward(1, *parts)
        for parts in zip(*(tensor.split(chunks) for tensor in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(torch.cat(pieces), causal_attention(q, k, v))


def test_cache_grows_by_what_is_appended_and_no_more(toy_model) -> None:
    config = toy_model.config
    cache = KVCache(EngineConfig(max_model_len=64), toy_model)
    assert cache.num_bytes == 0
    kv = torch.ones(3, config.num_kv_heads, config.head_dim)
    for layer_idx in range(config.num_layers):
        cache.append(layer_idx, kv, kv)
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    assert cache.num_bytes == 3 * per_token
    cache.clear()
    assert cache.num_bytes == 0


def test_layers_do_not_share_their_history(toy_model) -> None:
    config = toy_model.config
    cache = KVCache(EngineConfig(max_model_len=64), toy_model)
    kv = torch.ones(2, config.num_kv_heads, config.head_dim)
    cache.append(0, kv, kv)
    assert cache.keys[0].shape[1] == 2
    assert cache.keys[1].shape[1] == 0
