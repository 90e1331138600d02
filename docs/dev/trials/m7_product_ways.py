"""Two more forms of the int4 product, timed beside the one that the stage runs.

    PYTHONPATH=.:shared python docs/dev/trials/m7_product_ways.py OUT.json [--rows 1 8 64]

Ways: warps of a program share the inputs of its outputs and add their sums at the end, so that no
program waits for another; the matrix instructions are those of a single warp.
Joined: the four runs of a word are one operand of 128 inputs, so that one product of matrices is a
step.
Once: a program asks for all its words before it waits for the kernel before it, and has no loop.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from m7_int4_kernels import DEVICE, SHAPES, random_matrix, time_us

from folovllm.kernels.fused import silu_mul
from folovllm.kernels.overlap import let_next_start, overlap_options, wait_for_previous
from m7_gptq import int4_matmul
from m7_gptq.int4_matmul import PackedWeight, _weights

TILE = tl.constexpr(32)


@triton.jit
def _meet_and_store(
    sums,
    out_ptr,
    partial_ptr,
    num_arrived_ptr,
    rows,
    outputs,
    num_rows,
    num_outputs,
    IS_SPLIT: tl.constexpr,
):
    """sums: [BLOCK_OUT, ROWS]; of programs that share inputs the last one adds them up."""
    places = rows.to(tl.int64)[None, :] * num_outputs + outputs[:, None]
    mask = (rows < num_rows)[None, :] & (outputs < num_outputs)[:, None]
    is_last = True
    if IS_SPLIT:
        part_size = num_rows.to(tl.int64) * num_outputs
        tl.store(partial_ptr + tl.program_id(2) * part_size + places, sums, mask=mask)
        tl.debug_barrier()
        meeting_ptr = num_arrived_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        is_last = tl.atomic_add(meeting_ptr, 1, sem="acq_rel") == tl.num_programs(2) - 1
        if is_last:
            tl.store(meeting_ptr, 0)
            sums = tl.zeros(sums.shape, dtype=tl.float32)
            for split in range(tl.num_programs(2)):
                part_ptrs = partial_ptr + split * part_size + places
                sums += tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    if is_last:
        tl.store(out_ptr + places, sums.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _ways_kernel(
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
    WAYS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """words: [tiles of 32 outputs, runs, 32 outputs, RUN]; scales: [tiles, runs, 32]"""
    let_next_start(OVERLAP)
    first = tl.program_id(0) * BLOCK_OUT
    lane_out = tl.arange(0, BLOCK_OUT)
    outputs = first + lane_out
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    ways = tl.arange(0, WAYS)
    lanes = tl.arange(0, RUN)
    tiles = (outputs // TILE).to(tl.int64)
    out_base = tiles * (TILE * num_words) + outputs % TILE * RUN
    word_ptrs = (
        words_ptr
        + out_base[None, :, None]
        + (ways * (TILE * RUN))[:, None, None]
        + lanes[None, None, :]
    )
    scale_ptrs = scales_ptr + outputs.to(tl.int64)[None, :] * num_groups + ways[:, None]
    x_ptrs = (
        x_ptr
        + rows.to(tl.int64)[None, None, :] * num_inputs
        + (ways * (4 * RUN))[:, None, None]
        + lanes[None, :, None]
    )
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    num_runs = num_words // RUN
    num_splits = tl.num_programs(2)
    steps = tl.cdiv(num_runs // WAYS, num_splits) * WAYS
    start = tl.program_id(2) * steps
    end = tl.minimum(start + steps, num_runs)
    scales = tl.load(scale_ptrs + start)
    zeros = tl.full([BLOCK_OUT], 8, dtype=tl.int32)
    acc = tl.zeros([WAYS, BLOCK_OUT, ROWS], dtype=tl.float32)
    wait_for_previous(OVERLAP)
    for run in tl.range(start, end, WAYS, num_stages=NUM_STAGES):
        words = tl.load(word_ptrs + run * (TILE * RUN))
        next_scales = tl.load(scale_ptrs + tl.minimum(run + WAYS, end - WAYS))
        dots = tl.zeros([WAYS, BLOCK_OUT, ROWS], dtype=tl.float32)
        for index in tl.static_range(4):
            x = tl.load(x_ptrs + (4 * run + index) * RUN, mask=is_row[None, None, :], other=0.0)
            dots = tl.dot(_weights(words, index, zeros, False, DTYPE), x, dots)
        acc += scales.to(tl.float32)[:, :, None] * dots
        scales = next_scales
    total = tl.sum(acc, axis=0)
    _meet_and_store(
        total, out_ptr, partial_ptr, num_arrived_ptr, rows, outputs, num_rows, num_outputs, IS_SPLIT
    )


@triton.jit
def one(words, NIBBLE: tl.constexpr, zeros, scales, SCALED: tl.constexpr, DTYPE: tl.constexpr):
    w = _weights(words, NIBBLE, zeros, False, DTYPE)
    if SCALED:
        w = w * scales.to(DTYPE)[:, None]
    return w


@triton.jit
def group_of_weights(words, zeros, scales, SCALED: tl.constexpr, DTYPE: tl.constexpr):
    low = tl.join(
        one(words, 0, zeros, scales, SCALED, DTYPE), one(words, 1, zeros, scales, SCALED, DTYPE)
    )
    high = tl.join(
        one(words, 2, zeros, scales, SCALED, DTYPE), one(words, 3, zeros, scales, SCALED, DTYPE)
    )
    w = tl.permute(tl.join(low, high), (0, 3, 2, 1))
    return tl.reshape(w, (words.shape[0], 4 * words.shape[1]))


@triton.jit(do_not_specialize=["num_rows"])
def _joined_kernel(
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
    IS_SPLIT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_start(OVERLAP)
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    lanes = tl.arange(0, RUN)
    inputs = tl.arange(0, 4 * RUN)
    tiles = (outputs // TILE).to(tl.int64)
    row_ptrs = (
        words_ptr + (tiles * (TILE * num_words) + outputs % TILE * RUN)[:, None] + lanes[None, :]
    )
    scale_ptrs = scales_ptr + outputs.to(tl.int64) * num_groups
    x_ptrs = x_ptr + rows.to(tl.int64)[None, :] * num_inputs + inputs[:, None]
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_OUT, ROWS], dtype=tl.float32)
    steps = tl.cdiv(num_words // RUN, tl.num_programs(2))
    start = tl.program_id(2) * steps
    end = tl.minimum(start + steps, num_words // RUN)
    zeros = tl.full([BLOCK_OUT], 8, dtype=tl.int32)
    scales = tl.load(scale_ptrs + start)
    wait_for_previous(OVERLAP)
    for run in tl.range(start, end, num_stages=NUM_STAGES):
        words = tl.load(row_ptrs + run * (TILE * RUN))
        next_scales = tl.load(scale_ptrs + tl.minimum(run + 1, end - 1))
        x = tl.load(x_ptrs + run * (4 * RUN), mask=is_row[None, :], other=0.0)
        weight = group_of_weights(words, zeros, scales, SCALED, DTYPE)
        if SCALED:
            acc = tl.dot(weight, x, acc)
        else:
            acc += scales.to(tl.float32)[:, None] * tl.dot(weight, x)
        scales = next_scales
    _meet_and_store(
        acc, out_ptr, partial_ptr, num_arrived_ptr, rows, outputs, num_rows, num_outputs, IS_SPLIT
    )


@triton.jit(do_not_specialize=["num_rows"])
def _once_kernel(
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
    WAYS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_start(OVERLAP)
    first = tl.program_id(0) * BLOCK_OUT
    outputs = first + tl.arange(0, BLOCK_OUT)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    ways = tl.program_id(2) * WAYS + tl.arange(0, WAYS)
    lanes = tl.arange(0, RUN)
    tiles = (outputs // TILE).to(tl.int64)
    out_base = tiles * (TILE * num_words) + outputs % TILE * RUN
    words = tl.load(
        words_ptr
        + out_base[None, :, None]
        + (ways * (TILE * RUN))[:, None, None]
        + lanes[None, None, :]
    )
    scales = tl.load(scales_ptr + outputs.to(tl.int64)[None, :] * num_groups + ways[:, None])
    x_ptrs = (
        x_ptr
        + rows.to(tl.int64)[None, None, :] * num_inputs
        + (ways * (4 * RUN))[:, None, None]
        + lanes[None, :, None]
    )
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    zeros = tl.full([BLOCK_OUT], 8, dtype=tl.int32)
    wait_for_previous(OVERLAP)
    dots = tl.zeros([WAYS, BLOCK_OUT, ROWS], dtype=tl.float32)
    for index in tl.static_range(4):
        x = tl.load(x_ptrs + index * RUN, mask=is_row[None, None, :], other=0.0)
        dots = tl.dot(_weights(words, index, zeros, False, DTYPE), x, dots)
    total = tl.sum(scales.to(tl.float32)[:, :, None] * dots, axis=0)
    _meet_and_store(
        total, out_ptr, partial_ptr, num_arrived_ptr, rows, outputs, num_rows, num_outputs, IS_SPLIT
    )


class Once(NamedTuple):
    num_rows: int
    num_outputs: int
    num_warps: int
    num_ways: int


class Ways(NamedTuple):
    num_rows: int
    num_outputs: int
    num_ways: int
    num_warps: int
    num_stages: int
    splits: int


class Joined(NamedTuple):
    num_rows: int
    num_outputs: int
    is_scaled: bool
    num_warps: int
    num_stages: int
    splits: int


def with_counters(weight: PackedWeight) -> PackedWeight:
    """Enough of them for any of the forms."""
    return weight._replace(num_arrived=torch.zeros(8192, dtype=torch.int32, device=DEVICE))


def multiply(x: torch.Tensor, weight: PackedWeight, form: Ways | Joined | Once) -> torch.Tensor:
    num_rows = len(x)
    num_outputs, num_groups = weight.scales.shape
    num_words = weight.num_runs * weight.run
    sizes = (num_rows, weight.num_inputs, num_outputs, num_words, num_groups)
    blocks = (triton.cdiv(num_outputs, form.num_outputs), triton.cdiv(num_rows, form.num_rows))
    splits = weight.num_runs // form.num_ways if isinstance(form, Once) else form.splits
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    part = out
    if splits > 1:
        part = torch.empty((splits, *out.shape), dtype=torch.float32, device=x.device)
    tensors = (x, weight.words, weight.scales, out, part, weight.num_arrived)
    common: dict[str, Any] = {
        "BLOCK_OUT": form.num_outputs,
        "ROWS": form.num_rows,
        "RUN": weight.run,
        "IS_SPLIT": splits > 1,
        "num_warps": form.num_warps,
        **overlap_options(x.device),
    }
    grid = (*blocks, splits)
    if isinstance(form, Once):
        _once_kernel[grid](*tensors, *sizes, WAYS=form.num_ways, **common)
        return out
    common["NUM_STAGES"] = form.num_stages
    if isinstance(form, Ways):
        _ways_kernel[grid](*tensors, *sizes, WAYS=form.num_ways, **common)
    else:
        _joined_kernel[grid](*tensors, *sizes, SCALED=form.is_scaled, **common)
    return out


FEW_WAYS = [
    (64, 4, 4, 3),
    (64, 4, 4, 4),
    (64, 2, 2, 6),
    (32, 4, 4, 6),
    (32, 4, 4, 4),
    (128, 2, 2, 3),
]
FEW = [(64, 4, 4), (64, 4, 6), (32, 2, 6), (128, 8, 4), (128, 4, 4)]
MANY = [(64, 64, False, 4, 3), (64, 64, False, 4, 4), (64, 64, False, 4, 5), (64, 128, True, 4, 3)]
MANY += [(64, 128, False, 8, 4), (64, 256, True, 8, 3)]
MORE = [
    (128, 64, False, 4, 3),
    (128, 64, False, 4, 4),
    (128, 64, True, 4, 3),
    (128, 128, True, 4, 3),
]
MORE += [(128, 128, False, 8, 3), (128, 256, True, 8, 3), (128, 128, False, 8, 4)]


ONCE = [(64, 8, 8), (64, 4, 8), (64, 4, 4), (32, 4, 8), (32, 4, 16), (64, 8, 16), (128, 8, 4)]
ONCE += [(128, 8, 8), (16, 4, 16), (32, 8, 16), (32, 2, 4)]


def cuts(num_rows: int) -> Iterator[tuple[Any, ...]]:
    """Forms less their splits."""
    if num_rows <= 32:
        rows = 8 if num_rows <= 8 else 16 if num_rows <= 16 else 32
        for cut in FEW_WAYS if rows < 32 else []:
            yield (Ways, rows, *cut)
        for block, warps, stages in FEW:
            yield (Joined, rows, block, False, warps, stages)
    else:
        for cut in MANY + (MORE if num_rows > 64 else []):
            yield (Joined, *cut)


def forms(num_rows: int, shape: tuple[int, int], kinds: str) -> Iterator[Any]:
    num_outputs, num_inputs = shape
    if num_rows <= 16:
        for cut in ONCE:
            yield Once(8 if num_rows <= 8 else 16, *cut)
    if kinds == "once":
        return
    for kind, *cut in cuts(num_rows):
        rows, block = cut[:2]
        blocks = triton.cdiv(num_rows, rows) * triton.cdiv(num_outputs, block)
        steps = num_inputs // 128 // (cut[2] if kind is Ways else 1)
        for splits in (1, 2, 3, 4, 6, 8):
            if splits == 1 or (
                steps // splits >= 2 and blocks * splits <= 2400 // (rows // 64 + 1)
            ):
                yield kind(*cut, splits)


def pairs_us(way: Any, num_rows: int, weights: list) -> float:
    """Microseconds of a product behind the gated activation of its input, as in a decode step."""
    steps = []
    for weight in weights:
        num_inputs = weight.num_inputs if isinstance(weight, PackedWeight) else weight.shape[1]
        pair = torch.randn(num_rows, 2 * num_inputs, device=DEVICE, dtype=torch.bfloat16)
        steps.append(partial(step, way, pair, weight))
    return time_us(steps)


def step(way: Any, pair: torch.Tensor, weight: Any) -> torch.Tensor:
    x = silu_mul(pair)
    if way == "cublas":
        return torch.nn.functional.linear(x, weight)
    return int4_matmul.linear(x, weight, None) if way == "stage" else multiply(x, weight, way)


def error_of(form: Any, num_rows: int, weight: PackedWeight, plain: torch.Tensor) -> float:
    x = torch.randn(num_rows, weight.num_inputs, device=DEVICE, dtype=torch.bfloat16)
    expected = x.float() @ plain.float().t()
    return ((multiply(x, weight, form).float() - expected).norm() / expected.norm()).item()


def compiled_once(tries: list[Any]) -> list[Any]:
    """One form of each that needs a compilation of its own."""
    return list(
        {(*form[:-1], isinstance(form, Once) or form.splits > 1): form for form in tries}.values()
    )


def measure(
    name: str, rows: list[int], share: tuple[int, int] | None, kinds: str
) -> list[dict[str, Any]]:
    num_copies = 1 if share else max(6, int(2e8 / (SHAPES[name][0] * SHAPES[name][1] / 2)))
    matrices = [random_matrix(*SHAPES[name]) for _ in range(num_copies)]
    packed = [int4_matmul.pack_for_kernel(matrix) for matrix in matrices]
    tiles = [with_counters(weight) for weight in packed]
    plain = [matrix.dequantize().to(torch.bfloat16) for matrix in matrices[:8]]
    results = []
    for num_rows in rows:
        tries = list(forms(num_rows, SHAPES[name], kinds))
        if share:
            tries = [t for i, t in enumerate(compiled_once(tries)) if i % share[1] == share[0]]
        ways = dict.fromkeys(tries, tiles)
        if not share:
            ways |= {"stage": packed, "cublas": plain}
        for way, weights in ways.items():
            row = {"shape": name, "rows": num_rows, "kind": type(way).__name__, "way": way}
            try:
                if not isinstance(way, str):
                    row["error"] = error_of(way, num_rows, weights[0], plain[0])
                if not share:
                    row["us"] = round(pairs_us(way, num_rows, weights), 2)
            except Exception as failure:  # a form that does not fit the device
                row["failure"] = str(failure).splitlines()[0][:100]
            results.append(row)
    return results


def report(results: list[dict[str, Any]]) -> None:
    for key in dict.fromkeys((r["shape"], r["rows"]) for r in results):
        rows = [r for r in results if (r["shape"], r["rows"]) == key]
        for r in rows:
            if r.get("error", 0) > 0.01:
                print("WRONG", r)
        best = sorted((r for r in rows if "us" in r and r["kind"] != "str"), key=lambda r: r["us"])[
            :6
        ]
        print(
            *key,
            *((r["way"], r["us"]) for r in rows if r["kind"] == "str" and "us" in r),
            *((r["kind"][0], tuple(r["way"]), r["us"]) for r in best),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--compile-share", type=int, nargs=2, metavar=("INDEX", "OF"))
    parser.add_argument("--kinds", choices=("all", "once"), default="all")
    args = parser.parse_args()
    torch.manual_seed(0)
    results: list[dict[str, Any]] = []
    for name in SHAPES:
        results += (rows := measure(name, args.rows, args.compile_share, args.kinds))
        report(rows)
        args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
