"""Times ways to cut products with 4-bit weights, after comparing each with dequantised ones.

    PYTHONPATH=.:shared python docs/dev/trials/m7_int4_kernels.py OUT.json [--stage-only]

Shapes are those of Qwen3-8B with groups of 128, symmetric. A variant is a `Tile` of the stage's
kernel; `stage` is the one that m7_gptq runs today. Every product of a chain has weights of its own,
more than the L2 cache holds. `--rows` says how many rows; with `--seconds N`, what has its turn
later is left out.
"""

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m7_gptq import int4_matmul
from m7_gptq.gptq import QuantizedMatrix
from m7_gptq.int4_matmul import PackedWeight, Tile

SHAPES = {"gate_up": (24576, 4096), "down": (4096, 12288), "qkv": (6144, 4096), "o": (4096, 4096)}
GROUP = 128
ROWS = (1, 8, 16, 64, 256, 2, 32, 128, 512)
DEVICE = torch.device("cuda")


def random_matrix(num_outputs: int, num_inputs: int) -> QuantizedMatrix:
    groups = (num_inputs // GROUP, num_outputs)
    return QuantizedMatrix(
        q=torch.randint(0, 16, (num_outputs, num_inputs), dtype=torch.uint8, device=DEVICE),
        scales=((torch.rand(groups, device=DEVICE) + 0.5) * 0.004).half().float(),
        zeros=torch.full(groups, 8, dtype=torch.int32, device=DEVICE),
        g_idx=(torch.arange(num_inputs, device=DEVICE) // GROUP).to(torch.int32),
    )


def written_out(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    return torch.nn.functional.linear(x, int4_matmul.dequantize(weight, x.dtype))


def time_us(launches: list[partial[torch.Tensor]]) -> float:
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


def variants(num_rows: int) -> Iterator[Tile]:
    """(rows, outputs, warps, stages, programs per SM)"""
    if num_rows <= 16:
        rows = 8 if num_rows <= 8 else 16
        for cut in [(64, 4, 6), (64, 4, 8), (64, 4, 4), (128, 4, 5), (32, 2, 6), (128, 8, 5)]:
            for per_sm in (1, 2, 4, 8):
                yield Tile(rows, *cut, per_sm)
    elif num_rows <= 32:
        for cut in [(128, 4, 4), (64, 4, 5), (128, 8, 4)]:
            for per_sm in (1, 2, 4):
                yield Tile(32, *cut, per_sm)
    elif num_rows <= 64:
        for cut in [(128, 4, 4), (128, 4, 3), (64, 4, 4), (256, 8, 3)]:
            for per_sm in (1, 2, 4):
                yield Tile(64, *cut, per_sm)
    else:
        for cut in [(128, 8, 3), (128, 8, 4), (256, 8, 3)]:
            for per_sm in (1, 2):
                yield Tile(128, *cut, per_sm)
        for cut in [(128, 4, 4), (256, 8, 3)]:
            yield Tile(64, *cut, 2)


def measure(name: str, num_rows: int, packed: list[PackedWeight], plain: list[torch.Tensor],
            tries: list[Tile]) -> list[dict[str, Any]]:  # fmt: skip
    """A row per way: microseconds and the error against float32, or why it did not run."""
    num_outputs, num_inputs = plain[0].shape
    x = torch.randn(num_rows, num_inputs, device=DEVICE, dtype=torch.bfloat16)
    expected = x.float() @ int4_matmul.dequantize(packed[0], torch.float32).t()
    num_bytes = num_outputs * num_inputs * (0.5 + 2 / GROUP)
    ways: dict[Any, list[partial[torch.Tensor]]] = {
        "cublas bf16": [partial(torch.nn.functional.linear, x, w) for w in plain],
        "stage": [partial(int4_matmul.linear, x, w, None) for w in packed],
        "written out": [partial(written_out, x, w) for w in packed],
        "write out": [partial(int4_matmul.dequantize, w, torch.bfloat16) for w in packed],
    }
    ways |= {
        tile: [partial(int4_matmul.multiply, x, w, None, tile) for w in packed] for tile in tries
    }
    rows = []
    for way, launches in ways.items():
        row = {"shape": name, "rows": num_rows, "way": way, "bytes": num_bytes}
        try:
            out = launches[0]().float()
            error = ((out - expected).norm() / expected.norm()).item() if way != "write out" else 0
            us = time_us(launches)
        except Exception as failure:  # a tile that does not fit the device
            rows.append(row | {"failure": str(failure).splitlines()[0][:120]})
            continue
        rows.append(row | {"us": us, "error": error, "tb_per_s": num_bytes / us / 1e6})
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    best = sorted((r for r in rows[4:] if "us" in r), key=lambda r: r["us"])[:4]
    for r in rows[:4] + best:
        print(r["shape"], r["rows"], r["way"], f"{r.get('us', 0):.1f} us",
              f"{r.get('tb_per_s', 0):.2f} TB/s", r.get("failure", ""), flush=True)  # fmt: skip
    for r in rows:
        if r.get("error", 0) > 0.01:
            print("WRONG", r, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage-only", action="store_true")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--seconds", type=float, default=600.0)
    args = parser.parse_args()
    torch.manual_seed(0)
    end = time.perf_counter() + args.seconds
    results: list[dict[str, Any]] = []
    for name, shape in SHAPES.items():
        copies = max(4, int(3e8 / (shape[0] * shape[1] / 2)))
        matrices = [random_matrix(*shape) for _ in range(copies)]
        packed = [int4_matmul.pack_for_kernel(m) for m in matrices]
        plain = [m.dequantize().to(torch.bfloat16) for m in matrices[:4]]
        for num_rows in args.rows:
            if time.perf_counter() > end:
                break
            tries = [] if args.stage_only else list(variants(num_rows))
            results += (rows := measure(name, num_rows, packed, plain, tries))
            report(rows)
            args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
        del matrices, packed, plain


if __name__ == "__main__":
    main()
