"""Forms of the int4 product that the stage does not have, timed beside the one it has.

    PYTHONPATH=.:shared python docs/dev/trials/m7_product_forms.py OUT.json [--rows 1 8 64]

TILED: words of 32 outputs and one run lie together, so that a program reads whole pieces of memory.
PREFETCH: a program asks for all its words before it waits for the kernel before it.
SCALED: weights are scaled before they are multiplied, and one sum is kept instead of one per group.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from m7_int4_kernels import DEVICE, SHAPES, random_matrix, time_us
from m7_product_ways import _meet_and_store

from folovllm.kernels.fused import silu_mul
from folovllm.kernels.overlap import let_next_start, overlap_options, wait_for_previous
from m7_gptq import int4_matmul
from m7_gptq.int4_matmul import PackedWeight, Tile, _cut, _weights

TILE_OUT = tl.constexpr(32)


@triton.jit
def prefetch(ptrs):
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l",
        [ptrs],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["num_rows"])
def kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    out_ptr,
    partial_ptr,
    num_arrived_ptr,
    num_rows,
    num_inputs,
    num_outputs,
    num_words,
    num_groups,
    BLOCK_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    TILED: tl.constexpr,
    PREFETCH: tl.constexpr,
    SCALED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_start(OVERLAP)
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    place = outputs.to(tl.int64)
    lanes = tl.arange(0, RUN)
    if TILED:
        row_ptrs = (
            words_ptr
            + (place // TILE_OUT * (TILE_OUT * num_words) + place % TILE_OUT * RUN)[:, None]
            + lanes[None, :]
        )
        STRIDE: tl.constexpr = TILE_OUT
    else:
        row_ptrs = words_ptr + place[:, None] * num_words + lanes[None, :]
        STRIDE: tl.constexpr = 1
    scales_ptr += place * num_groups
    x_ptrs = x_ptr + rows.to(tl.int64)[None, :] * num_inputs + lanes[:, None]
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_OUT, ROWS], dtype=tl.float32)
    steps = tl.cdiv(num_words // RUN, SPLITS)
    start = tl.program_id(2) * steps * RUN
    end = tl.minimum(start + steps * RUN, num_words)
    if PREFETCH:
        if TILED:
            line = tl.arange(0, 128) * 64
            for tile in tl.static_range(BLOCK_OUT // 32):
                base = (
                    words_ptr
                    + (
                        (tl.program_id(0) * (BLOCK_OUT // 32) + tile).to(tl.int64) * num_words
                        + start
                    )
                    * TILE_OUT
                )
                for first in range(0, (end - start) * TILE_OUT, 128 * 64):
                    prefetch(base + first + line)
        else:
            for word in range(start, end, 64):
                prefetch(words_ptr + place * num_words + word)
    wait_for_previous(OVERLAP)
    for word in tl.range(start, end, RUN, num_stages=NUM_STAGES):
        words = tl.load(row_ptrs + word * STRIDE)
        scales = tl.load(scales_ptr + word // RUN)
        zeros = tl.full([BLOCK_OUT], 8, dtype=tl.int32)
        if SCALED:
            for index in tl.static_range(4):
                x = tl.load(x_ptrs + (4 * word + index * RUN), mask=is_row[None, :], other=0.0)
                weight = _weights(words, index, zeros, False, DTYPE) * scales.to(DTYPE)[:, None]
                acc = tl.dot(weight, x, acc)
        else:
            dots = tl.zeros([BLOCK_OUT, ROWS], dtype=tl.float32)
            for index in tl.static_range(4):
                x = tl.load(x_ptrs + (4 * word + index * RUN), mask=is_row[None, :], other=0.0)
                weight = _weights(words, index, zeros, False, DTYPE)
                dots = tl.dot(weight, x, dots)
            acc += scales.to(tl.float32)[:, None] * dots
    _meet_and_store(
        acc, out_ptr, partial_ptr, num_arrived_ptr, rows, outputs, num_rows, num_outputs, SPLITS > 1
    )


class Form(NamedTuple):
    tiled: bool
    prefetch: bool
    scaled: bool
    tile: Tile


def in_rows(weight: PackedWeight) -> PackedWeight:
    """The words of an output one after another, as they were before this trial."""
    return weight._replace(words=weight.words.transpose(1, 2).contiguous())


def multiply(x, weight, form):
    tile = form.tile
    num_rows = len(x)
    num_outputs, num_groups = weight.scales.shape
    num_words = weight.num_runs * weight.run
    _, splits, blocks = _cut(num_rows, num_outputs, num_words // weight.run, tile, x.device)
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    part = out
    if splits > 1:
        part = torch.empty((splits, num_rows, num_outputs), dtype=torch.float32, device=x.device)
    kernel[(*blocks, splits)](
        x,
        weight.words,
        weight.scales,
        out,
        part,
        weight.num_arrived,
        num_rows,
        weight.num_inputs,
        num_outputs,
        num_words,
        num_groups,
        BLOCK_OUT=tile.num_outputs,
        ROWS=tile.num_rows,
        RUN=weight.run,
        SPLITS=splits,
        NUM_STAGES=tile.num_stages,
        TILED=form.tiled,
        PREFETCH=form.prefetch,
        SCALED=form.scaled,
        num_warps=tile.num_warps,
        **overlap_options(x.device),
    )
    return out


def launches(form: Form, x: torch.Tensor, weights: list[PackedWeight]) -> list[partial]:
    return [partial(multiply, x, weight, form) for weight in weights]


def forms(num_rows: int) -> Iterator[Form]:
    few = {
        8: [(64, 4, 4, 2), (32, 2, 6, 8), (64, 4, 4, 4), (128, 8, 4, 1)],
        16: [(128, 8, 5, 4), (64, 4, 4, 2)],
        32: [(64, 4, 5, 4), (128, 8, 4, 2)],
    }
    many = {
        64: [(64, 4, 4, 2), (128, 4, 3, 1), (256, 8, 4, 1)],
        128: [(128, 8, 3, 1), (128, 4, 3, 1), (256, 8, 3, 1)],
        256: [(128, 8, 3, 1)],
    }
    rows = next((r for r in few if num_rows <= r), None)
    if rows is not None:
        for cut in few[rows]:
            for tiled, prefetch in ((False, False), (False, True), (True, False), (True, True)):
                yield Form(tiled, prefetch, False, Tile(rows, *cut))
        return
    for rows, cuts in many.items():
        if num_rows <= 64 and rows > 64:
            continue
        for cut in cuts:
            if cut[0] * rows <= 128 * 128:
                yield Form(False, False, False, Tile(rows, *cut))
                yield Form(True, False, False, Tile(rows, *cut))
            yield Form(True, False, True, Tile(rows, *cut))


def chain_us(form: Form | None, num_rows: int, layers: dict[str, list]) -> float:
    """Microseconds of a layer's four products one after another, each behind a kernel of a few
    microseconds (the gated activation of few rows), as in a decode step."""
    steps = []
    for matrices in zip(*layers.values(), strict=True):
        for weight in matrices:
            num_inputs = weight.num_inputs if isinstance(weight, PackedWeight) else weight.shape[1]
            pair = torch.randn(num_rows, 2 * num_inputs, device=DEVICE, dtype=torch.bfloat16)
            steps.append(partial(step, form, pair, weight))
    return 4 * time_us(steps)


def step(form, pair, weight):
    x = silu_mul(pair)
    if isinstance(weight, torch.Tensor):
        return torch.nn.functional.linear(x, weight)
    return int4_matmul.linear(x, weight, None) if form is None else multiply(x, weight, form)


def record(results: list, out: Path, row: dict) -> None:
    results.append(row)
    out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(*row.values(), flush=True)


def attempt(work) -> dict:
    try:
        return {"us": round(work(), 2)}
    except Exception as failure:  # a tile that does not fit the device
        return {"failure": str(failure).splitlines()[0][:100]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 16, 64, 128, 256])
    parser.add_argument("--compile-only", metavar="SHAPE")
    args = parser.parse_args()
    torch.manual_seed(0)
    shapes = SHAPES if args.compile_only is None else {args.compile_only: SHAPES[args.compile_only]}
    num_layers = 1 if args.compile_only else 6
    matrices = {n: [random_matrix(*s) for _ in range(num_layers)] for n, s in shapes.items()}
    packed = {n: [int4_matmul.pack_for_kernel(m) for m in ms] for n, ms in matrices.items()}
    rowwise = {n: [in_rows(w) for w in ws] for n, ws in packed.items()}
    plain = {n: [m.dequantize().to(torch.bfloat16) for m in ms] for n, ms in matrices.items()}
    results: list[dict] = []
    for num_rows in args.rows:
        for form in forms(num_rows):
            weights = packed if form.tiled else rowwise
            for name in shapes:
                x = torch.randn(num_rows, SHAPES[name][1], device=DEVICE, dtype=torch.bfloat16)
                try:
                    out = multiply(x, weights[name][0], form).float()
                except Exception as failure:
                    print(name, num_rows, form, str(failure).splitlines()[0][:100], flush=True)
                    continue
                expected = x.float() @ plain[name][0].float().t()
                error = ((out - expected).norm() / expected.norm()).item()
                if error > 0.01:
                    print("WRONG", name, num_rows, form, error, flush=True)
                if args.compile_only is None and num_rows > 32:
                    row = attempt(partial(time_us, launches(form, x, weights[name])))
                    record(
                        results,
                        args.out,
                        {
                            "rows": num_rows,
                            "form": str(form[:3]),
                            "tile": tuple(form.tile),
                            "shape": name,
                            **row,
                        },
                    )
            if args.compile_only is None:
                row = attempt(partial(chain_us, form, num_rows, weights))
                record(
                    results,
                    args.out,
                    {
                        "rows": num_rows,
                        "form": str(form[:3]),
                        "tile": tuple(form.tile),
                        "shape": "chain",
                        **row,
                    },
                )
        if args.compile_only is None:
            for way, form, weights in (("stage", None, packed), ("cublas", None, plain)):
                row = attempt(partial(chain_us, form, num_rows, weights))
                record(
                    results,
                    args.out,
                    {"rows": num_rows, "form": way, "tile": None, "shape": "chain", **row},
                )


if __name__ == "__main__":
    main()
