"""Times ways to multiply with 4-bit weights, after comparing each with dequantised ones.

    PYTHONPATH=.:shared python docs/dev/trials/m7_int4_kernels.py OUT.json [--stage-only]

Shapes are those of Qwen3-8B with groups of 128. A variant is (rows of a tile, outputs of a tile,
words of a run, warps, stages, splits of the inputs); `stage` is what m7_gptq runs today. Every
product of a chain has weights of its own, more than the L2 cache holds.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from folovllm.kernels.overlap import let_next_start, wait_for_previous
from m7_gptq import int4_matmul
from m7_gptq.gptq import QuantizedMatrix

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
GROUP = 128
DEVICE = torch.device("cuda")


class Variant(NamedTuple):
    """How a product is cut."""

    rows: int
    block_out: int
    run: int
    num_warps: int
    num_stages: int
    splits: int


@triton.jit
def _half(pairs, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    return ((pairs >> SHIFT) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit(do_not_specialize=["num_rows"])
def _pairs_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    partial_ptr,
    arrived_ptr,
    num_rows,
    num_inputs,
    num_outputs,
    BLOCK_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """bfloat16: nibbles j and j + 4 of a word become 128 + q in its halves, in one instruction."""
    let_next_start(OVERLAP)
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    is_row = (rows < num_rows)[None, :]
    lanes = tl.arange(0, RUN)
    row_ptrs = words_ptr + outputs[:, None] * (num_inputs // 8) + lanes[None, :]
    x_ptrs = x_ptr + rows[None, :] * num_inputs + lanes[:, None]
    scales_ptr += outputs
    zeros_ptr += outputs
    wait_for_previous(OVERLAP)
    acc = tl.zeros([BLOCK_OUT, ROWS], dtype=tl.float32)
    per_split = tl.cdiv(num_inputs // (8 * RUN), SPLITS) * 8 * RUN
    end = tl.minimum((split + 1) * per_split, num_inputs)
    for first in tl.range(split * per_split, end, 8 * RUN, num_stages=NUM_STAGES):
        words = tl.load(row_ptrs + first // 8)
        for nibble in tl.static_range(4):
            low = first + nibble * RUN
            high = low + 4 * RUN
            low_group = low // GROUP_SIZE * num_outputs
            high_group = high // GROUP_SIZE * num_outputs
            low_zero = tl.load(zeros_ptr + low_group).to(tl.int32)
            high_zero = tl.load(zeros_ptr + high_group).to(tl.int32)
            zeros = (low_zero | 0x4300) | ((high_zero | 0x4300) << 16)
            pairs = ((words >> (4 * nibble)) & 0x000F000F) | 0x43004300
            pairs = tl.inline_asm_elementwise(
                "sub.rn.bf16x2 $0, $1, $2;",
                "=r,r,r",
                [pairs, zeros[:, None]],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
            low_x = tl.load(x_ptrs + low, mask=is_row, other=0.0)
            high_x = tl.load(x_ptrs + high, mask=is_row, other=0.0)
            low_scale = tl.load(scales_ptr + low_group).to(tl.float32)
            high_scale = tl.load(scales_ptr + high_group).to(tl.float32)
            acc += low_scale[:, None] * tl.dot(_half(pairs, 0, tl.bfloat16), low_x)
            acc += high_scale[:, None] * tl.dot(_half(pairs, 16, tl.bfloat16), high_x)
    places = rows[None, :] * num_outputs + outputs[:, None]
    if SPLITS == 1:
        tl.store(out_ptr + places, acc.to(tl.bfloat16), mask=is_row)
    else:
        size = num_rows * num_outputs
        tl.store(partial_ptr + split * size + places, acc, mask=is_row)
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros([BLOCK_OUT, ROWS], dtype=tl.float32)
            for other in tl.static_range(SPLITS):
                part = partial_ptr + other * size + places
                total += tl.load(part, mask=is_row, other=0.0, cache_modifier=".cg")
            tl.store(out_ptr + places, total.to(tl.bfloat16), mask=is_row)
            tl.store(arrived_ptr + tile, 0)


class Matrix:
    """Random weights in the order of the kernels, scales and zeros [groups, outputs]."""

    def __init__(self, num_outputs: int, num_inputs: int, run: int) -> None:
        self.shape = (num_outputs, num_inputs)
        groups = (num_inputs // GROUP, num_outputs)
        q = torch.randint(0, 16, self.shape, dtype=torch.uint8, device=DEVICE)
        self.matrix = QuantizedMatrix(
            q=q,
            scales=(torch.rand(groups, device=DEVICE) + 0.5) * 0.004,
            zeros=torch.randint(4, 12, groups, dtype=torch.int32, device=DEVICE),
            g_idx=(torch.arange(num_inputs, device=DEVICE) // GROUP).to(torch.int32),
        )
        shifts = torch.arange(0, 32, 4, device=DEVICE, dtype=torch.int32)
        runs = q.to(torch.int32).view(num_outputs, -1, 8, run)
        self.words = (runs << shifts[:, None]).sum(dim=2, dtype=torch.int32).view(num_outputs, -1)
        self.scales = self.matrix.scales.to(torch.float16)
        self.zeros = self.matrix.zeros.to(torch.uint8)
        self.partial = torch.empty(8 * 256 * num_outputs, device=DEVICE)
        self.arrived = torch.zeros(4096, dtype=torch.int32, device=DEVICE)

    def multiply(self, x: torch.Tensor, out: torch.Tensor, variant: Variant) -> None:
        num_outputs, num_inputs = self.shape
        grid = (num_outputs // variant.block_out, -(-len(x) // variant.rows), variant.splits)
        _pairs_kernel[grid](
            x,
            self.words,
            self.scales,
            self.zeros,
            out,
            self.partial,
            self.arrived,
            len(x),
            num_inputs,
            num_outputs,
            BLOCK_OUT=variant.block_out,
            ROWS=variant.rows,
            RUN=variant.run,
            GROUP_SIZE=GROUP,
            SPLITS=variant.splits,
            NUM_STAGES=variant.num_stages,
            OVERLAP=True,
            num_warps=variant.num_warps,
            launch_pdl=True,
        )


def _written_out(x: torch.Tensor, weight: int4_matmul.PackedWeight) -> torch.Tensor:
    return torch.nn.functional.linear(x, int4_matmul.dequantize(weight, x.dtype))


def time_us(launches) -> float:
    """Microseconds of one of the launches, replayed as a graph; the best of five."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(launches))
    return min(times)


def variants(num_rows: int) -> list[Variant]:
    if num_rows <= 16:
        rows = 8 if num_rows <= 8 else 16
        cuts = [(16, 128, 1, 3), (16, 128, 1, 2), (32, 128, 2, 3), (64, 128, 4, 2), (64, 64, 4, 3)]
        return [Variant(rows, *cut, splits) for cut in cuts for splits in (1, 2, 4)]
    if num_rows <= 64:
        cuts = [(64, 64, 4, 2), (64, 32, 4, 3), (128, 32, 8, 3), (128, 32, 4, 2)]
        return [Variant(64, *cut, splits) for cut in cuts for splits in (1, 2, 4)]
    cuts = [(128, 32, 8, 2), (64, 32, 4, 2), (128, 16, 8, 3)]
    return [Variant(128, *cut, splits) for cut in cuts for splits in (1, 2)]


def main(out_file: str, find_variants: Callable[[int], list[Variant]]) -> None:
    """find_variants: number of rows -> what is tried beside what the stage runs."""
    torch.manual_seed(0)
    results: list[dict[str, object]] = []
    for name, (num_outputs, num_inputs) in SHAPES.items():
        num_bytes = num_outputs * num_inputs // 2 * (1 + 3 / 64)
        copies = max(4, int(3e8 / num_bytes))
        by_run = {
            run: [Matrix(num_outputs, num_inputs, run) for _ in range(copies)]
            for run in (16, 32, 64, 128)
        }
        plain = [m.matrix.dequantize().to(torch.bfloat16) for m in by_run[128][:4]]
        packed = [int4_matmul.pack_for_kernel(m.matrix) for m in by_run[128]]
        for num_rows in (1, 2, 8, 16, 32, 64, 128, 256):
            x = torch.randn(num_rows, num_inputs, device=DEVICE, dtype=torch.bfloat16)
            out = torch.empty(num_rows, num_outputs, device=DEVICE, dtype=torch.bfloat16)
            us = time_us([partial(torch.nn.functional.linear, x, w) for w in plain])
            row = {"shape": name, "rows": num_rows, "bytes": num_bytes}
            results.append(row | {"variant": "cublas bf16", "us": us})
            us = time_us([partial(int4_matmul.linear, x, w, None) for w in packed])
            results.append(row | {"variant": "stage", "us": us})
            written = [partial(_written_out, x, w) for w in packed]
            results.append(row | {"variant": "stage, written out", "us": time_us(written)})
            for variant in find_variants(num_rows):
                matrices = by_run[variant.run]
                if num_inputs // (8 * variant.run) < variant.splits:
                    continue
                try:
                    matrices[0].multiply(x, out, variant)
                    expected = x.float() @ matrices[0].matrix.dequantize().t()
                    error = ((out.float() - expected).norm() / expected.norm()).item()
                    us = time_us([partial(m.multiply, x, out, variant) for m in matrices])
                except Exception as failure:  # a shape that does not fit the device
                    text = str(failure).splitlines()[0][:120]
                    results.append(row | {"variant": variant, "failure": text})
                    continue
                results.append(row | {"variant": variant, "us": us, "error": error})
            mine = [r for r in results if r["shape"] == name and r["rows"] == num_rows]
            best = sorted((r for r in mine if "us" in r), key=lambda r: r["us"])[:5]
            for r in best + mine[:3]:
                rate = num_bytes / r["us"] / 1e6
                print(name, num_rows, r["variant"], f"{r['us']:.1f} us {rate:.2f} TB/s", flush=True)
            for r in mine:
                if r.get("error", 0) > 0.01:
                    print("WRONG", r)
            Path(out_file).write_text(json.dumps(results, indent=1), encoding="utf-8")
        del by_run, plain, packed


if __name__ == "__main__":
    main(sys.argv[1], (lambda _: []) if "--stage-only" in sys.argv else variants)
