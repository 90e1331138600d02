"""Times the prompt kernel of m4_flash and variants of it, after comparing each with a reference.

    PYTHONPATH=.:shared python docs/dev/trials/m4_prompt_attention.py OUT.json \
        "[dict(), dict(M4=True, STACK=2), dict(DELAY=True, WHOLE=True, I32=True)]"

A variant is the options of `launch`: none is the kernel of 9610a61, M4 the present one. Results:
docs/dev/data/m4_prompt_trials_h200.json; what came of them: docs/dev/milestone_4.md.
"""

import json
import math
import sys
from pathlib import Path
from statistics import median
from typing import Any

import m4_prompt_kernels
import torch
import torch.nn.functional as F
import triton

from m4_flash.flash_attention import _prefill_kernel

DEVICE = torch.device("cuda")
BLOCK_SIZE = 16
HEAD_DIM = 128
NUM_LAYERS = 4
CASES = [
    # batch size, queries, keys, query heads, key heads
    (1, 8192, 8192, 16, 8),
    (1, 2048, 16384, 16, 8),
    (1, 8192, 8192, 32, 8),
    (1, 2048, 16384, 32, 8),
    (32, 512, 512, 16, 8),
    (1, 512, 512, 16, 8),
    (1, 2048, 2048, 16, 8),
]
CHECKS = [(2, 201, 201, 8, 4), (2, 130, 451, 8, 4), (3, 65, 320, 16, 4), (2, 64, 1024, 16, 8)]


class Inputs:
    """Random queries, keys, values and caches of several layers, blocks in random order."""

    def __init__(self, num: int, query_len: int, seq_len: int, num_heads: int, num_kv: int) -> None:
        generator = torch.Generator(device=DEVICE).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16, generator=generator)

        self.num, self.query_len, self.seq_len = num, query_len, seq_len
        self.num_heads, self.num_kv = num_heads, num_kv
        width = -(-seq_len // BLOCK_SIZE)
        num_blocks = num * width + 8
        order = torch.randperm(num_blocks, generator=generator, device=DEVICE)
        self.tables = order[: num * width].to(torch.int32).view(num, width)
        cache_shape = (num_blocks, BLOCK_SIZE, num_kv, HEAD_DIM)
        self.layers = []
        for _ in range(NUM_LAYERS):
            qkv = random(num * query_len, num_heads + 2 * num_kv, HEAD_DIM)
            parts = qkv.split([num_heads, num_kv, num_kv], 1)
            self.layers.append((*parts, random(*cache_shape), random(*cache_shape)))
        self.cu_seqlens = torch.arange(num + 1, device=DEVICE, dtype=torch.int32) * query_len
        self.seq_lens = torch.full((num,), seq_len, device=DEVICE, dtype=torch.int32)
        positions = torch.arange(seq_len - query_len, seq_len, device=DEVICE)
        blocks = self.tables[:, positions // BLOCK_SIZE].long()
        self.slots = (blocks * BLOCK_SIZE + positions % BLOCK_SIZE).flatten()


def launch(inputs: Inputs, layer: int, out: torch.Tensor, options: dict[str, Any]) -> None:
    q, k, v, keys, values = inputs.layers[layer]
    group = inputs.num_heads // inputs.num_kv
    stack = min(options.get("STACK", 1), group)
    tile_q = options.get("ROWS", 64) // stack
    stages = options.get("STAGES", 3)
    grid = (inputs.num_heads // stack, len(q) // tile_q + inputs.num)
    tensors = (q, k, v, out, keys, values, inputs.cu_seqlens, inputs.seq_lens, inputs.tables)
    strides = (q.stride(0), k.stride(0), v.stride(0), *keys.stride()[:2], inputs.tables.stride(0))
    scale = HEAD_DIM**-0.5 * math.log2(math.e)
    constants: dict[str, Any] = {
        "NUM_HEADS": inputs.num_heads,
        "GROUP": group,
        "STACK": stack,
        "HEAD_DIM": HEAD_DIM,
        "BLOCK_SIZE": BLOCK_SIZE,
        "TILE_Q": tile_q,
        "TILE_K": options.get("TILE_K", 64),
        "OVERLAP": True,
        "launch_pdl": True,
        "num_warps": options.get("num_warps", 4),
        "num_stages": stages,
        "maxnreg": options.get("maxnreg"),
    }
    if options.get("M4"):
        constants |= {"DIM_BLOCK": HEAD_DIM, "OFFSET_TYPE": triton.language.int32}
        arguments = (*tensors, inputs.slots, *strides, scale, inputs.num)
        _prefill_kernel[grid](*arguments, NUM_STAGES=stages, **constants)
        return
    switches = {name: options.get(name, False) for name in ("DELAY", "P16", "WHOLE", "I32")}
    arguments = (*tensors, inputs.slots, inputs.num, *strides, scale)
    m4_prompt_kernels.prefill[grid](*arguments, STAGES=stages, **switches, **constants)


def reference(inputs: Inputs) -> torch.Tensor:
    q, k, v, keys, values = (tensor.float() for tensor in inputs.layers[0])
    group, num_cached = inputs.num_heads // inputs.num_kv, inputs.seq_len - inputs.query_len
    positions = torch.arange(inputs.seq_len, device=DEVICE)
    out = []
    for row, table in enumerate(inputs.tables.long()):
        own = slice(row * inputs.query_len, (row + 1) * inputs.query_len)
        own_keys = torch.cat([keys[table].flatten(0, 1)[:num_cached], k[own]])
        own_values = torch.cat([values[table].flatten(0, 1)[:num_cached], v[own]])
        attended = F.scaled_dot_product_attention(
            q[own].transpose(0, 1),
            own_keys.repeat_interleave(group, 1).transpose(0, 1),
            own_values.repeat_interleave(group, 1).transpose(0, 1),
            attn_mask=positions <= positions[num_cached:, None],
        )
        out.append(attended.transpose(0, 1))
    return torch.cat(out)


def check(options: dict[str, Any]) -> None:
    for case in CHECKS:
        inputs = Inputs(*case)
        expected = reference(inputs)
        out = torch.full(expected.shape, float("nan"), device=DEVICE, dtype=torch.bfloat16)
        launch(inputs, 0, out, options)
        error = ((out.float() - expected).norm() / expected.norm()).item()
        if not error < 1e-2:
            raise AssertionError(f"{options} is wrong by {error} on {case}")


def seconds_per_layer(inputs: Inputs, out: torch.Tensor, options: dict[str, Any]) -> float:
    """Median of replays of a graph that visits every layer three times."""
    for layer in range(NUM_LAYERS):
        launch(inputs, layer, out, options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in [*range(NUM_LAYERS)] * 3:
            launch(inputs, layer, out, options)
    graph.replay()
    times = []
    for _ in range(7):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / (3 * NUM_LAYERS))
    return median(times)


def main() -> None:
    path, variants = (
        Path(sys.argv[1]),
        eval(sys.argv[2]),
    )
    for options in variants:
        check(options)
    rows = []
    for case in CASES:
        num, query_len, seq_len, num_heads, _ = case
        num_pairs = query_len * (seq_len - query_len) + query_len * (query_len + 1) / 2
        flops = 4 * HEAD_DIM * num_heads * num * num_pairs
        inputs = Inputs(*case)
        out = torch.empty(inputs.layers[0][0].shape, device=DEVICE, dtype=torch.bfloat16)
        for options in variants:
            seconds = min(seconds_per_layer(inputs, out, options) for _ in range(2))
            rows.append({"case": case, "variant": options, "seconds": seconds})
            rate = flops / seconds * 1e-12
            print(case, f"{seconds * 1e6:9.1f} µs {rate:7.1f} TFLOP/s", options, flush=True)
    path.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}) + "\n")


main()
