"""Attention over gathered blocks against the plain reference, request by request."""

import pytest
import torch

from folovllm.kernels.reference import causal_attention
from folovllm.request import SamplingParams
from folovllm.testing.driver import make_requests
from folovllm.testing.engine_contract import toy_model
from m3_paged.attention import find_context_slots
from m3_paged.config import EngineConfig, PreemptionMode
from m3_paged.kv_cache import KVCache
from m3_paged.kv_cache_manager import BlockCopy, CopyKind
from m3_paged.model_runner import ModelRunner
from m3_paged.scheduler import ScheduledRequest, SchedulerOutput
from m3_paged.tests.test_engine_contract import BYTES_PER_TOKEN

__all__ = ["toy_model"]


def make_runner(model, block_size: int = 4) -> ModelRunner:
    config = EngineConfig(
        max_model_len=40,
        max_num_seqs=8,
        block_size=block_size,
        kv_cache_bytes=128 * block_size * BYTES_PER_TOKEN,
        preemption_mode=PreemptionMode.SWAP,
        swap_cache_tokens=8 * block_size,
    )
    return ModelRunner(config, model)


def test_slots_follow_the_table_and_padding_repeats_the_last_token() -> None:
    tables, seq_lens = torch.tensor([[7, 2], [3, 0]]), torch.tensor([6, 1])
    slots = find_context_slots(tables, seq_lens, padded_seq_len=8, block_size=4)
    assert slots.view(8, 2).t().tolist() == [[28, 29, 30, 31, 8, 9, 9, 9], [12] * 8]
    slots = find_context_slots(tables, torch.tensor([6, 2]), padded_seq_len=6, block_size=4)
    assert slots.tolist() == [28, 12, 29, 13, 30, 13, 31, 13, 8, 13, 9, 13]


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(
    "shares",
    [
        [(0, 1)],
        [(0, 5), (0, 3)],
        [(7, 1), (0, 1), (39, 1)],
        [(3, 1), (4, 1), (15, 1), (16, 1)],
        [(0, 40), (4, 9), (31, 3)],
    ],
)
def test_attention_equals_reference_for_any_mix_of_lengths(toy_model, shares, block_size) -> None:
    """shares: (tokens already in the cache, tokens of this step) per request."""
    runner, config = make_runner(toy_model, block_size), toy_model.config
    keys, values = runner.kv_cache.keys[1], runner.kv_cache.values[1]
    keys.fill_(float("nan"))
    values.fill_(float("nan"))
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))
    block_ids = iter(order.tolist())
    requests = make_requests([[1] * (c + n) for c, n in shares], SamplingParams(max_tokens=1))
    scheduled, histories = [], []
    for request, (num_computed, n) in zip(requests, shares, strict=True):
        request.num_computed_tokens = num_computed
        num_blocks = -(-(num_computed + n) // block_size)
        table = tuple(next(block_ids) for _ in range(num_blocks))
        kv = torch.randn(2, num_computed + n, config.num_kv_heads, config.head_dim).to(keys)
        for position in range(num_computed):
            block_id, offset = table[position // block_size], position % block_size
            keys[block_id, offset], values[block_id, offset] = kv[:, position]
        scheduled.append(ScheduledRequest(request, n, table))
        histories.append((num_computed, kv))
    batch = runner.prepare_inputs(SchedulerOutput(tuple(scheduled), ()))
    total = sum(n for _, n in shares)
    q = torch.randn(total, config.num_heads, config.head_dim).to(keys)
    new_k, new_v = (torch.cat([kv[i, c:] for c, kv in histories]) for i in (0, 1))
    out = runner.attention.forward(batch.attention, 1, q, new_k, new_v)
    expected = torch.cat(
        [
            causal_attention(part, kv[0], kv[1])
            for part, (_, kv) in zip(q.split([n for _, n in shares]), histories, strict=True)
        ]
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_copies_act_as_if_one_after_the_other(toy_model) -> None:
    """Random lists of copies against a loop that performs them singly."""
    cache = make_runner(toy_model).kv_cache
    generator = torch.Generator().manual_seed(0)
    kinds = list(CopyKind)
    for _ in range(50):
        for tensor in (cache.kv, cache.swapped):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        numbers = torch.randint(0, 6, (12, 3), generator=generator).tolist()
        copies = [BlockCopy(kinds[kind % 3], source, target) for kind, source, target in numbers]
        expected_kv, expected_swapped = perform_singly(cache, copies)
        cache.copy_blocks(copies)
        assert torch.equal(cache.kv, expected_kv)
        assert torch.equal(cache.swapped, expected_swapped)


def perform_singly(cache: KVCache, copies: list[BlockCopy]) -> tuple[torch.Tensor, torch.Tensor]:
    kv, swapped = cache.kv.clone(), cache.swapped.clone()
    for copy in copies:
        if copy.kind is CopyKind.COPY_ON_WRITE:
            kv[:, :, copy.destination] = kv[:, :, copy.source]
        elif copy.kind is CopyKind.SWAP_OUT:
            swapped[copy.destination] = kv[:, :, copy.source]
        else:
            kv[:, :, copy.destination] = swapped[copy.source]
    return kv, swapped


def test_without_kv_cache_bytes_free_memory_decides(toy_model, monkeypatch) -> None:
    if toy_model.device.type == "cuda":
        pytest.skip("free memory of the host decides on a CPU only")
    monkeypatch.setattr("folovllm.memory.available_host_bytes", lambda: 8 * 80 * BYTES_PER_TOKEN)
    config = EngineConfig(max_model_len=40, block_size=4)
    assert ModelRunner(config, toy_model).kv_cache.num_tokens == 80


def test_cache_is_no_larger_than_all_requests_at_full_length(toy_model) -> None:
    config = EngineConfig(max_model_len=40, block_size=16, max_num_seqs=2, kv_cache_bytes=1 << 24)
    assert ModelRunner(config, toy_model).kv_cache.num_tokens == 2 * 48
