"""Times attention alone: this stage's kernels, FlashAttention where installed, torch's own.

    PYTHONPATH=.:shared python -m m6_prefix.tests.benchmark_attention --output FILE.json

Beside every time stands the limit: bytes of keys and values over the bandwidth of a copy, or
FLOPs over the rate of a large matrix product, both measured in the same run. Every result is
compared with the reference before it is timed.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from folovllm.hardware import describe_environment, measure_ceilings
from folovllm.kernels.flash_attn_package import attend_version_3, flash_attn_3
from folovllm.kernels.reference import causal_attention
from m6_prefix.attention import AttentionMetadata
from m6_prefix.attention_backends import PackageAttention
from m6_prefix.flash_attention import TritonAttention

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
NUM_RUNS = 7
MIN_CACHE_BYTES = 256 << 20
"""Layers are visited in turn, so that this much lies between two uses of a key."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Requests of equal length."""

    batch_size: int
    query_len: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    block_size: int = 16

    @property
    def kv_bytes(self) -> int:
        """Keys and values read once."""
        return self.batch_size * self.seq_len * self.num_kv_heads * self.head_dim * 2 * 2

    @property
    def flops(self) -> int:
        """Two products over the pairs of a query and a key that it may see."""
        before = self.seq_len - self.query_len
        pairs = self.query_len * before + self.query_len * (self.query_len + 1) // 2
        return 4 * self.batch_size * self.num_heads * self.head_dim * pairs


CASES = (
    Case(batch_size=256, query_len=1, seq_len=1100, num_heads=16, num_kv_heads=8),
    Case(batch_size=256, query_len=1, seq_len=1100, num_heads=16, num_kv_heads=8, block_size=256),
    Case(batch_size=256, query_len=1, seq_len=576, num_heads=16, num_kv_heads=8),
    Case(batch_size=64, query_len=1, seq_len=2048, num_heads=32, num_kv_heads=8),
    Case(batch_size=64, query_len=1, seq_len=576, num_heads=16, num_kv_heads=8),
    Case(batch_size=8, query_len=1, seq_len=576, num_heads=16, num_kv_heads=8),
    Case(batch_size=1, query_len=1, seq_len=576, num_heads=16, num_kv_heads=8),
    Case(batch_size=1, query_len=1, seq_len=8192, num_heads=32, num_kv_heads=8),
    Case(batch_size=8, query_len=1, seq_len=16384, num_heads=16, num_kv_heads=8),
    Case(batch_size=1, query_len=512, seq_len=512, num_heads=16, num_kv_heads=8),
    Case(batch_size=32, query_len=512, seq_len=512, num_heads=16, num_kv_heads=8),
    Case(batch_size=1, query_len=8192, seq_len=8192, num_heads=16, num_kv_heads=8),
    Case(batch_size=1, query_len=8192, seq_len=8192, num_heads=32, num_kv_heads=8),
    Case(batch_size=1, query_len=2048, seq_len=16384, num_heads=16, num_kv_heads=8),
)


class Cache:
    """What attention reads of a KVCache: several layers of random blocks."""

    def __init__(self, case: Case) -> None:
        self.blocks_per_request = -(-case.seq_len // case.block_size)
        num_blocks = case.batch_size * self.blocks_per_request
        num_layers = max(1, -(-MIN_CACHE_BYTES // case.kv_bytes))
        shape = (num_layers, num_blocks, case.block_size, case.num_kv_heads, case.head_dim)
        self.keys = torch.randn(shape, dtype=DTYPE, device=DEVICE)
        self.values = torch.randn(shape, dtype=DTYPE, device=DEVICE)
        order = torch.randperm(num_blocks, device=DEVICE).to(torch.int32)
        self.tables = order.view(case.batch_size, self.blocks_per_request)


@dataclass(frozen=True)
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    metadata: AttentionMetadata


def make_inputs(case: Case, cache: Cache) -> Inputs:
    num_tokens = case.batch_size * case.query_len
    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    qkv = torch.randn(num_tokens, sum(heads), case.head_dim, dtype=DTYPE, device=DEVICE)
    q, k, v = qkv.split(heads, dim=1)
    positions = torch.arange(case.seq_len - case.query_len, case.seq_len, device=DEVICE)
    block_ids = cache.tables[:, positions // case.block_size].to(torch.int64)
    ends = accumulate([case.query_len] * case.batch_size)
    metadata = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE),
        seq_lens=torch.full((case.batch_size,), case.seq_len, dtype=torch.int32, device=DEVICE),
        block_tables=cache.tables,
        slot_mapping=(block_ids * case.block_size + positions % case.block_size).view(-1),
        min_query_len=case.query_len,
        max_query_len=case.query_len,
        max_seq_len=case.seq_len,
    )
    return Inputs(q, k, v, metadata)


def check_last_request(case: Case, cache: Cache, inputs: Inputs, out: torch.Tensor) -> float:
    """Largest difference of the last request's last queries from the reference."""
    table = cache.tables[-1].to(torch.int64)
    keys = cache.keys[0, table].flatten(0, 1)[: case.seq_len]
    values = cache.values[0, table].flatten(0, 1)[: case.seq_len]
    count = min(case.query_len, 64)
    expected = causal_attention(inputs.q[-count:], keys, values)
    difference = (out[-count:].float() - expected.float()).abs().max().item()
    if not difference < 2e-2:
        raise RuntimeError(f"{case}: the result is {difference} off the reference")
    return difference


def time_layers(attend: Callable[[int], object], num_layers: int) -> float:
    """Median seconds of one call, from replays of a graph that visits all layers."""
    num_calls = max(num_layers, 4)
    for layer_idx in range(num_layers):
        attend(layer_idx)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(num_calls):
            attend(call % num_layers)
    durations = []
    for _ in range(NUM_RUNS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        durations.append(start.elapsed_time(end) / 1e3 / num_calls)
    return median(durations[2:])


def measure(case: Case, copy_bytes_per_s: float, flops_per_s: float) -> list[dict[str, Any]]:
    """One row per backend that can serve the case."""
    cache = Cache(case)
    inputs = make_inputs(case, cache)
    backends: dict[str, Any] = {
        "triton": TritonAttention(cache, case.num_heads, case.batch_size),
    }
    interface = flash_attn_3()
    if interface is not None:
        backends["flash_attn_3"] = PackageAttention(cache, partial(attend_version_3, interface))
    rows = []
    for name, backend in backends.items():

        def attend(layer_idx: int, backend: Any = backend) -> torch.Tensor:
            out: torch.Tensor = backend.forward(
                inputs.metadata, layer_idx, inputs.q, inputs.k, inputs.v
            )
            return out

        backend.start_step(inputs.metadata)
        difference = check_last_request(case, cache, inputs, attend(0))
        rows.append((name, time_layers(attend, len(cache.keys)), difference))
    if case.query_len == case.seq_len:
        shape = (case.batch_size, case.query_len, -1, case.head_dim)
        q, k, v = (t.reshape(shape).transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v))

        def sdpa(_: int) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        rows.append(("torch_sdpa_contiguous", time_layers(sdpa, 1), None))
    floor_s = max(case.kv_bytes / copy_bytes_per_s, case.flops / flops_per_s)
    return [
        {
            **asdict(case),
            "backend": name,
            "seconds": seconds,
            "bytes_per_s": case.kv_bytes / seconds,
            "flops_per_s": case.flops / seconds,
            "floor_s": floor_s,
            "floor_fraction": floor_s / seconds,
            "max_difference": difference,
        }
        for name, seconds, difference in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device, and these kernels are timed on one")
    ceilings = measure_ceilings(DEVICE)
    rows = []
    for case in CASES:
        for row in measure(case, ceilings.copy_bytes_per_s, ceilings.matmul_flops_per_s):
            rows.append(row)
            print(
                f"{case.batch_size:>3} x {case.query_len:>4} queries, {case.seq_len:>5} keys, "
                f"{case.num_heads}/{case.num_kv_heads} heads, block {case.block_size:>3}, "
                f"{row['backend']:<22} {row['seconds'] * 1e6:>8.1f} us "
                f"{row['bytes_per_s'] / 1e12:6.2f} TB/s {row['flops_per_s'] / 1e12:6.0f} TFLOP/s "
                f"{row['floor_fraction']:6.1%} of the limit",
                flush=True,
            )
    if output is not None:
        result = {
            "schema": 1,
            "ceilings": asdict(ceilings),
            "rows": rows,
            "environment": describe_environment(),
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
