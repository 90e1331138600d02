"""Decode attention over contexts of unequal lengths: programs by batch size, or by length.

    PYTHONPATH=.:shared python docs/dev/trials/m4_decode_splits.py --output FILE.json

The kernel is m4_flash's; what differs is who gets how many programs (`split_starts`). Equal
numbers, as many as fill the device, are what the kernel of db0e421 gave to every request; put that
commit's folder before this one on PYTHONPATH to time it itself.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from folovllm.hardware import describe_environment
from folovllm.kernels.reference import causal_attention
from m4_flash import flash_attention
from m4_flash.attention import AttentionMetadata
from m4_flash.flash_attention import MAX_SPLITS, TritonAttention
from m4_flash.tests.benchmark_attention import DEVICE, DTYPE, MIN_CACHE_BYTES, time_layers

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 16, 8, 128, 16


def mixes() -> dict[str, list[int]]:
    """Lengths of contexts, the new token included."""
    rng = random.Random(0)
    return {
        "256 of 1,100": [1100] * 256,
        "256 of 100 to 2,048": [rng.randint(100, 2048) for _ in range(256)],
        "64 of 576": [576] * 64,
        "8 of 576": [576] * 8,
        "1 of 576": [576],
        "1 of 8,192": [8192],
        "16 of 600, 1 of 16,384": [600] * 16 + [16384],
        "60 of a log-normal, mean 1,300": [
            min(int(rng.lognormvariate(6.7, 0.9)) + 1, 8000) for _ in range(60)
        ],
        "32 of 1,000 to 16,000": [rng.randint(1000, 16000) for _ in range(32)],
        "120 of 1,000 to 16,000": [rng.randint(1000, 16000) for _ in range(120)],
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


def measure(name: str, seq_lens: list[int]) -> dict[str, object]:
    cache = Cache(seq_lens)
    num_requests = len(seq_lens)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
    last = (lens - 1).to(torch.int64)
    blocks = cache.tables.gather(1, (last // BLOCK_SIZE)[:, None])[:, 0].to(torch.int64)
    metadata = AttentionMetadata(
        cu_seqlens_q=torch.arange(num_requests + 1, dtype=torch.int32, device=DEVICE),
        seq_lens=lens,
        block_tables=cache.tables,
        slot_mapping=blocks * BLOCK_SIZE + last % BLOCK_SIZE,
        min_query_len=1,
        max_query_len=1,
        max_seq_len=max(seq_lens),
    )
    heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    qkv = torch.randn(num_requests, sum(heads), HEAD_DIM, dtype=DTYPE, device=DEVICE)
    q, k, v = qkv.split(heads, dim=1)
    attention = TritonAttention(cache, NUM_HEADS, num_requests)  # type: ignore[arg-type]

    def attend(layer_idx: int) -> torch.Tensor:
        return attention.forward(metadata, layer_idx, q, k, v)

    row: dict[str, object] = {"mix": name, "kv_bytes": sum(seq_lens) * NUM_KV_HEADS * HEAD_DIM * 4}
    policies = ("by length", "equal") if hasattr(attention, "start_step") else ("db0e421",)
    for policy in policies:
        if policy == "by length":
            attention.start_step(metadata)
        elif policy == "equal":
            equal_splits(attention, num_requests)
        out = attend(0)
        for request in (0, num_requests - 1):
            table = cache.tables[request].to(torch.int64)
            keys, values = (
                kv[0, table].flatten(0, 1)[: seq_lens[request]] for kv in (cache.keys, cache.values)
            )
            expected = causal_attention(q[request : request + 1], keys, values)
            torch.testing.assert_close(out[request : request + 1], expected, rtol=2e-2, atol=2e-2)
        row[policy] = time_layers(attend, len(cache.keys))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    rows = []
    for name, seq_lens in mixes().items():
        rows.append(measure(name, seq_lens))
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
