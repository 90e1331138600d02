"""Attention of steps whose contexts are split over programs: by batch size, or by length.

    PYTHONPATH=.:shared python docs/dev/trials/m4_splits.py --output FILE.json

The kernels are m4_flash's; for single queries two plans are timed (`split_starts`): programs by
length, and as many for every request as fill the device, which is what db0e421 did. To time the
kernels of db0e421 themselves, which split no context of a chunk, put that commit's m4_flash before
this one on PYTHONPATH.
"""

import argparse
import json
import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch

from folovllm.hardware import describe_environment
from folovllm.kernels.reference import causal_attention
from m4_flash import flash_attention
from m4_flash.attention import AttentionMetadata
from m4_flash.flash_attention import MAX_SPLITS, TritonAttention
from m4_flash.tests.benchmark_attention import DEVICE, DTYPE, MIN_CACHE_BYTES, time_layers

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 16, 8, 128, 16


def mixes() -> dict[str, list[tuple[int, int]]]:
    """(tokens in the cache, tokens of this step) of every request."""
    rng = random.Random(0)
    lognormal = [min(int(rng.lognormvariate(6.7, 0.9)) + 1, 8000) for _ in range(60)]
    return {
        "1 chunk of 64 behind 15,000": [(15000, 64)],
        "1 chunk of 82 behind 8,110": [(8110, 82)],
        "1 chunk of 256 behind 15,000": [(15000, 256)],
        "1 chunk of 512 behind 15,000": [(15000, 512)],
        "1 chunk of 819 behind 7,373": [(7373, 819)],
        "1 chunk of 1,024 behind 15,000": [(15000, 1024)],
        "1 chunk of 2,048 behind 14,336": [(14336, 2048)],
        "1 prompt of 512": [(0, 512)],
        "4 prompts of 512": [(0, 512)] * 4,
        "16 of 600, 1 chunk of 496 behind 8,000": [(599, 1)] * 16 + [(8000, 496)],
        "256 of 1,100": [(1099, 1)] * 256,
        "256 of 100 to 2,048": [(rng.randint(100, 2047), 1) for _ in range(256)],
        "64 of 576": [(575, 1)] * 64,
        "8 of 576": [(575, 1)] * 8,
        "1 of 576": [(575, 1)],
        "1 of 8,192": [(8191, 1)],
        "16 of 600, 1 of 16,384": [(599, 1)] * 16 + [(16383, 1)],
        "60 of a log-normal, mean 1,300": [(length, 1) for length in lognormal],
        "32 of 1,000 to 16,000": [(rng.randint(1000, 16000), 1) for _ in range(32)],
        "120 of 1,000 to 16,000": [(rng.randint(1000, 16000), 1) for _ in range(120)],
    }


class Cache:
    """Random blocks of several layers, and each request's table."""

    def __init__(self, seq_lens: Sequence[int]) -> None:
        needed = [-(-length // BLOCK_SIZE) for length in seq_lens]
        layer_bytes = sum(needed) * BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM * 4
        num_layers = max(1, -(-MIN_CACHE_BYTES // layer_bytes))
        shape = (num_layers, sum(needed), BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
        self.keys = torch.randn(shape, dtype=DTYPE, device=DEVICE)
        self.values = torch.randn(shape, dtype=DTYPE, device=DEVICE)
        ids = iter(torch.randperm(sum(needed)).tolist())
        self.tables = torch.zeros((len(seq_lens), max(needed)), dtype=torch.int32)
        for row, count in enumerate(needed):
            self.tables[row, :count] = torch.tensor([next(ids) for _ in range(count)])
        self.tables = self.tables.to(DEVICE)


def equal_splits(attention: TritonAttention, num_requests: int) -> None:
    """What the number of requests alone says, as before."""
    num_splits = max(1, min(attention.num_programs // (num_requests * NUM_KV_HEADS), MAX_SPLITS))
    starts = torch.arange(num_requests + 1, dtype=torch.int32) * num_splits
    attention.split_starts[: num_requests + 1] = starts.to(DEVICE)


def make_step(
    shares: Sequence[tuple[int, int]], cache: Cache
) -> tuple[AttentionMetadata, tuple[torch.Tensor, ...]]:
    """What attention is told of such a step, and random q, k, v, as they lie in one tensor."""
    seq_lens, query_lens = [c + n for c, n in shares], [n for _, n in shares]
    starts = [*accumulate(query_lens, initial=0)]
    positions = torch.cat([torch.arange(c, c + n) for c, n in shares]).to(DEVICE)
    rows = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(query_lens)).to(DEVICE)
    blocks = cache.tables[rows, positions // BLOCK_SIZE].to(torch.int64)
    metadata = AttentionMetadata(
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE),
        block_tables=cache.tables,
        slot_mapping=blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
        min_query_len=min(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )
    heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    qkv = torch.randn(sum(query_lens), sum(heads), HEAD_DIM, dtype=DTYPE, device=DEVICE)
    return metadata, qkv.split(heads, dim=1)


def expected_rows(
    request: int,
    shares: Sequence[tuple[int, int]],
    cache: Cache,
    q: torch.Tensor,
) -> tuple[slice, torch.Tensor]:
    """A request's rows of the output, and what the reference has there, from the first layer.

    The step's own keys must be in the cache: whoever asks has attended once.
    """
    starts = [*accumulate((n for _, n in shares), initial=0)]
    own = slice(starts[request], starts[request + 1])
    table = cache.tables[request].to(torch.int64)
    keys, values = (
        kv[0, table].flatten(0, 1)[: sum(shares[request])] for kv in (cache.keys, cache.values)
    )
    return own, causal_attention(q[own], keys, values)


def measure(name: str, shares: list[tuple[int, int]]) -> dict[str, object]:
    seq_lens, query_lens = [c + n for c, n in shares], [n for _, n in shares]
    cache = Cache(seq_lens)
    metadata, (q, k, v) = make_step(shares, cache)
    attention = TritonAttention(cache, NUM_HEADS, len(shares))  # type: ignore[arg-type]

    def attend(layer_idx: int) -> torch.Tensor:
        return attention.forward(metadata, layer_idx, q, k, v)

    row: dict[str, object] = {"mix": name, "kv_bytes": sum(seq_lens) * NUM_KV_HEADS * HEAD_DIM * 4}
    policies = ["by length"] if hasattr(attention, "start_step") else ["db0e421"]
    if policies == ["by length"] and max(query_lens) == 1:
        policies.append("equal")
    for policy in policies:
        if policy == "by length":
            attention.start_step(metadata)
        elif policy == "equal":
            equal_splits(attention, len(shares))
        out = attend(0)
        for request in (0, len(shares) - 1):
            own, expected = expected_rows(request, shares, cache, q)
            torch.testing.assert_close(out[own], expected, rtol=2e-2, atol=2e-2)
        row[policy] = time_layers(attend, len(cache.keys))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    rows = []
    for name, shares in mixes().items():
        rows.append(measure(name, shares))
        print(rows[-1], flush=True)
    if output is not None:
        result = {
            "kernel": str(Path(flash_attention.__file__).parent.name),
            "rows": rows,
            "environment": describe_environment(),
        }
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
