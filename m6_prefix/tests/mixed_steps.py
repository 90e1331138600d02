"""A step of requests of any lengths over a cache full of NaN, to check an attention against."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from folovllm.kernels.reference import causal_attention
from folovllm.model.config import kv_bytes_per_token
from folovllm.model.transformer import CausalLM
from folovllm.request import SamplingParams
from folovllm.testing.driver import make_requests
from m6_prefix.attention import Attention, AttentionMetadata
from m6_prefix.config import EngineConfig
from m6_prefix.cuda_graph import StepGraph
from m6_prefix.input_batch import InputBatch
from m6_prefix.model_runner import ModelRunner
from m6_prefix.scheduler import ScheduledRequest, SchedulerOutput

needs_cuda = (
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
LAYER = 1
EDGE_SHARES = [
    [(0, 1)],
    [(0, 5), (0, 3)],
    [(7, 1), (0, 1), (39, 1)],
    [(3, 1), (4, 1), (15, 1), (16, 1)],
    [(0, 40), (4, 9), (31, 3), (20, 1)],
]
"""Lists of (tokens in the cache, tokens of this step) per request."""


def make_runner(model: CausalLM, block_size: int, **options) -> ModelRunner:
    """Room for 128 blocks, or for eight requests of 40 tokens if that is less."""
    block_bytes = block_size * kv_bytes_per_token(model.config, model.dtype)
    config = EngineConfig(
        max_model_len=40,
        max_num_seqs=8,
        block_size=block_size,
        kv_cache_bytes=128 * block_bytes,
        **options,
    )
    return ModelRunner(config, model)


@dataclass(frozen=True)
class MixedStep:
    """The input of `Attention.forward`, and what has to come of it."""

    metadata: AttentionMetadata
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    expected: torch.Tensor
    histories: list[torch.Tensor]
    """[2, seq_len, num_kv_heads, head_dim] per request: keys and values once they are stored"""
    slots: list[torch.Tensor]
    """[seq_len] int64 per request, where they have to be"""


def make_mixed_step(runner: ModelRunner, shares: Sequence[tuple[int, int]]) -> MixedStep:
    """Blocks are handed out at random; only slots of computed tokens hold anything but NaN."""
    device, dtype, config = runner.model.device, runner.model.dtype, runner.model.config
    block_size = runner.config.block_size
    generator = torch.Generator().manual_seed(0)
    runner.kv_cache.kv.fill_(float("nan"))
    block_ids = iter(torch.randperm(runner.kv_cache.kv.shape[2], generator=generator).tolist())
    requests = make_requests([[1] * (c + n) for c, n in shares], SamplingParams(max_tokens=1))
    scheduled, histories, slots = [], [], []
    for request, (num_computed, num_new) in zip(requests, shares, strict=True):
        request.num_computed_tokens = num_computed
        seq_len = num_computed + num_new
        table = [next(block_ids) for _ in range(-(-seq_len // block_size))]
        scheduled.append(ScheduledRequest(request, num_new, table))
        shape = (2, seq_len, config.num_kv_heads, config.head_dim)
        histories.append(torch.randn(shape, generator=generator).to(device, dtype))
        positions = torch.arange(seq_len)
        block_of_token = torch.tensor(table)[positions // block_size]
        slots.append((block_of_token * block_size + positions % block_size).to(device))
        for cache, history in zip(runner.kv_cache.kv, histories[-1], strict=True):
            cache[LAYER].flatten(0, 1)[slots[-1][:num_computed]] = history[:num_computed]
    # As in the model: one buffer of heads of q, k and v, so rows are strided.
    num_all_heads = config.num_heads + 2 * config.num_kv_heads
    num_tokens = sum(num_new for _, num_new in shares)
    qkv = torch.randn(num_tokens, num_all_heads, config.head_dim, generator=generator)
    q, k, v = qkv.to(device, dtype).split(
        (config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1
    )
    k.copy_(torch.cat([h[0, c:] for h, (c, _) in zip(histories, shares, strict=True)]))
    v.copy_(torch.cat([h[1, c:] for h, (c, _) in zip(histories, shares, strict=True)]))
    queries = q.split([num_new for _, num_new in shares])
    expected = [
        causal_attention(part, *history) for part, history in zip(queries, histories, strict=True)
    ]
    step = runner.prepare_inputs(SchedulerOutput(tuple(scheduled), ()))
    metadata = metadata_of(runner, step.batch if isinstance(step, StepGraph) else step)
    return MixedStep(metadata, q, k, v, torch.cat(expected), histories, slots)


def metadata_of(runner: ModelRunner, batch: InputBatch) -> AttentionMetadata:
    """What ModelRunner makes of a batch before it calls the model."""
    tables = runner.block_tables.device
    tables.view(-1).index_copy_(0, batch.table_entries, batch.last_block_ids)
    return AttentionMetadata(
        cu_seqlens_q=batch.cu_seqlens_q,
        seq_lens=batch.seq_lens,
        block_tables=tables.index_select(0, batch.table_rows),
        slot_mapping=batch.slot_mapping,
        min_query_len=batch.min_query_len,
        max_query_len=batch.max_query_len,
        max_seq_len=batch.max_seq_len,
    )


@torch.inference_mode()
def check_attention(
    attention: Attention, runner: ModelRunner, shares: Sequence[tuple[int, int]], tolerance: float
) -> None:
    """One layer of `attention` over the runner's cache, stored keys and values included."""
    step = make_mixed_step(runner, shares)
    attention.start_step(step.metadata)
    out = attention.forward(step.metadata, LAYER, step.q, step.k, step.v)
    assert out.is_contiguous()
    torch.testing.assert_close(out, step.expected, rtol=tolerance, atol=tolerance)
    num_stored = 0
    for history, slots in zip(step.histories, step.slots, strict=True):
        for cache, stored in zip(runner.kv_cache.kv, history, strict=True):
            assert torch.equal(cache[LAYER].flatten(0, 1)[slots], stored)
        num_stored += history.numel()
    assert runner.kv_cache.kv[:, LAYER].isfinite().sum() == num_stored, "a slot of nobody"
    assert runner.kv_cache.kv[:, :LAYER].isnan().all(), "another layer"
