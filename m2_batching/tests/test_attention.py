"""Padded attention over slots against the plain reference, request by request."""

import numpy as np
import pytest
import torch

from folovllm.kernels.reference import causal_attention
from folovllm.request import SamplingParams
from folovllm.testing.driver import make_requests
from folovllm.testing.engine_contract import toy_model
from m2_batching.config import EngineConfig
from m2_batching.model_runner import ModelRunner, contiguous_slots
from m2_batching.scheduler import ScheduledRequest, SchedulerOutput

__all__ = ["toy_model"]

SLOT_LEN = 40


def make_runner(toy_model) -> ModelRunner:
    config = EngineConfig(max_model_len=SLOT_LEN, max_num_seqs=8, kv_cache_bytes=1 << 21)
    return ModelRunner(config, toy_model)


def schedule(runner: ModelRunner, shares: list[tuple[int, int, int]]) -> SchedulerOutput:
    """shares: (slot, tokens already in the cache, tokens of this step) per request."""
    requests = make_requests([[1] * (c + n) for _, c, n in shares], SamplingParams(max_tokens=1))
    for request, (_, num_computed, _) in zip(requests, shares, strict=True):
        request.num_computed_tokens = num_computed
    return SchedulerOutput(
        tuple(
            ScheduledRequest(r, n, slot) for r, (slot, _, n) in zip(requests, shares, strict=True)
        )
    )


@pytest.mark.parametrize(
    "shares",
    [
        [(0, 0, 1)],
        [(0, 0, 5), (1, 0, 3)],
        [(2, 7, 1), (0, 0, 1), (1, 39, 1)],
        [(5, 4, 1), (1, 9, 1)],
        [(7, 0, 20), (2, 5, 1)],
        [(7, 0, 6), (0, 3, 2)],
        [(0, 0, 40), (3, 0, 1), (1, 0, 17)],
    ],
)
def test_attention_equals_reference_for_any_mix_of_lengths(toy_model, shares) -> None:
    runner = make_runner(toy_model)
    config = toy_model.config
    generator = torch.Generator().manual_seed(len(shares))
    keys, values = runner.kv_cache.keys[1], runner.kv_cache.values[1]
    # Whatever a slot held before must not show: not a key, not a value.
    keys.fill_(float("nan"))
    values.fill_(1e30)
    histories = []
    for slot, num_computed, n in shares:
        kv = torch.randn(2, num_computed + n, config.num_kv_heads, config.head_dim)
        keys[slot, :, :num_computed] = kv[0, :num_computed].transpose(0, 1)
        values[slot, :, :num_computed] = kv[1, :num_computed].transpose(0, 1)
        histories.append((num_computed, kv))
    total = sum(n for _, _, n in shares)
    q = torch.randn(total, config.num_heads, config.head_dim, generator=generator)
    batch = runner.prepare_inputs(schedule(runner, shares))
    new_k, new_v = (torch.cat([kv[i, c:] for c, kv in histories]) for i in (0, 1))
    out = runner.attention.forward(batch.attention, 1, q, new_k, new_v)
    expected = torch.cat(
        [
            causal_attention(part, kv[0], kv[1])
            for part, (_, kv) in zip(q.split([n for _, _, n in shares]), histories, strict=True)
        ]
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_prepared_inputs_of_two_requests(toy_model) -> None:
    runner = make_runner(toy_model)
    batch = runner.prepare_inputs(schedule(runner, [(1, 0, 3), (0, 5, 1)]))
    assert batch.positions.tolist() == [0, 1, 2, 5]
    assert batch.logits_indices.tolist() == [2, 3]
    metadata = batch.attention
    assert metadata.slot_mapping.tolist() == [40, 41, 42, 5]
    assert metadata.rows == slice(0, 2)
    assert metadata.packed_to_padded.tolist() == [3, 4, 5, 0]
    assert metadata.padded_to_packed.tolist() == [3, 0, 0, 0, 1, 2]
    assert metadata.is_hidden.shape == (2, 1, 3, 16)
    assert metadata.is_hidden[0, 0, 0].tolist() == [False] * 6 + [True] * 10
    assert metadata.is_hidden[1, 0, 1].tolist() == [False] * 2 + [True] * 14


@pytest.mark.parametrize(
    ("slots", "max_query_len", "expected"),
    [
        ([0, 1, 2], 100, slice(0, 3)),
        ([2, 0, 1], 1, slice(0, 3)),
        ([3], 50, slice(3, 4)),
        ([0, 17], 1, slice(0, 18)),
        ([0, 18], 1, None),
        ([0, 2], 16, slice(0, 3)),
        ([0, 2], 17, None),
    ],
)
def test_slots_are_viewed_while_that_computes_little_in_vain(
    slots, max_query_len, expected
) -> None:
    assert contiguous_slots(np.array(slots), max_query_len) == expected


def test_cache_memory_follows_from_kv_cache_bytes(toy_model) -> None:
    runner = make_runner(toy_model)
    per_token = 2 * 2 * 2 * 24 * 4
    assert runner.kv_cache.num_bytes == 8 * SLOT_LEN * per_token
    config = EngineConfig(max_model_len=SLOT_LEN, kv_cache_bytes=3 * SLOT_LEN * per_token + 1)
    assert ModelRunner(config, toy_model).kv_cache.num_tokens == 3 * SLOT_LEN


def test_without_kv_cache_bytes_free_memory_decides(toy_model, monkeypatch) -> None:
    per_slot = SLOT_LEN * 2 * 2 * 2 * 24 * 4
    monkeypatch.setattr("folovllm.memory.available_host_bytes", lambda: 40 * per_slot)
    config = EngineConfig(max_model_len=SLOT_LEN)
    assert ModelRunner(config, toy_model).kv_cache.num_tokens == 5 * SLOT_LEN
