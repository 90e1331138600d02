"""Products with 4-bit weights that never exist at 16 bits in memory (Triton).

A decode step reads every weight once and is bound by that: a quarter of the bytes is a quarter of
the time, if the integers become numbers in registers, between the load and the multiplication.
Four of them share a 16-bit word, and two words a register. Nibble j of a run of W words holds W
inputs that follow each other (`pack_for_kernel`): masking one nibble of a register leaves two
neighbours, which is what a matrix instruction wants there, and the activations beside them are one
piece of memory.

From the number of rows on with which arithmetic limits, 16-bit products win: then the weights are
written out once per product, and the library multiplies.

The order within words is an idea of Marlin (Frantar et al. 2024), the integer that becomes a
number by its bits one of FasterTransformer (Kim et al. 2022); the form here is our own.
"""

from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from folovllm.kernels.overlap import let_next_start, overlap_options, wait_for_previous

from .gptq import QuantizedMatrix

MAX_ROWS = 256
"""Beyond, weights are written out at 16 bits; to be measured."""
_MAX_RUN = 32
"""Words of a run: with groups of 128, four runs of inputs are a group."""
_MIDDLE = 8
"""The zero point of every symmetric matrix."""
_MIN_DOT = 16
"""Least inner size of a matrix instruction."""
_MIN_STEPS = 4
"""Words are read ahead; a program with fewer steps would do little else."""
_MAX_SPLITS = 8


class PackedWeight(NamedTuple):
    """A matrix in the order in which the kernels read it."""

    words: torch.Tensor
    """[num_outputs, num_inputs / 4] int16; nibble j of word r * run + w is input
    (4 * r + j) * run + w"""
    scales: torch.Tensor
    """[num_outputs, num_groups] float16"""
    zeros: torch.Tensor | None
    """[num_outputs, num_groups] uint8; None: 8 everywhere"""
    order: torch.Tensor | None
    """[num_inputs] int64, the activation that each input is; None: they are in order (act order
    puts the inputs of a group beside each other)"""
    num_arrived: torch.Tensor
    """int32, zero between products: how many of the programs that share outputs are done"""
    run: int
    group_size: int

    @property
    def num_inputs(self) -> int:
        return 4 * self.words.shape[1]


def pack_for_kernel(matrix: QuantizedMatrix) -> PackedWeight:
    """ValueError if the inputs do not fill words; 4-bit integers are taken for granted."""
    num_outputs, num_inputs = matrix.q.shape
    if num_inputs % 8:
        raise ValueError(f"{num_inputs} inputs of 4 bits do not fill words; 8 of them are a word")
    g_idx = matrix.g_idx.to(torch.int64)
    order = torch.argsort(g_idx, stable=True)
    is_ordered = bool((order == torch.arange(num_inputs, device=order.device)).all())
    sizes = torch.bincount(g_idx)
    group_size = int(sizes[0])
    run = _run_of(num_inputs, group_size if len(sizes) > 1 else num_inputs)
    q = matrix.q[:, order].to(torch.int32).view(num_outputs, -1, 4, run)
    shifts = torch.arange(0, 16, 4, device=q.device, dtype=torch.int32)
    # Nibbles do not overlap, so that their sum is their union; 16 bits of it are the word.
    words = (q << shifts[:, None]).sum(dim=2, dtype=torch.int32).to(torch.int16)
    is_symmetric = bool((matrix.zeros == _MIDDLE).all())
    return PackedWeight(
        words=words.view(num_outputs, -1).contiguous(),
        scales=matrix.scales.t().contiguous().to(torch.float16),
        zeros=None if is_symmetric else matrix.zeros.t().contiguous().to(torch.uint8),
        order=None if is_ordered else order,
        num_arrived=torch.zeros(_most_programs(q.device), dtype=torch.int32, device=q.device),
        run=run,
        group_size=group_size,
    )


def _run_of(num_inputs: int, group_size: int) -> int:
    """The largest power of two up to _MAX_RUN with which runs of words fill rows and no run of
    inputs has two groups."""
    run = _MAX_RUN
    while (num_inputs // 4) % run or group_size % run:
        run //= 2
    return run


@triton.jit
def _plain_weights(words, NIBBLE: tl.constexpr, zeros, DTYPE: tl.constexpr):
    """One nibble of each word less its zero point, DTYPE: exact, at most 15 either way."""
    q = (words.to(tl.int32) >> (4 * NIBBLE)) & 0xF
    return (q - zeros[:, None]).to(DTYPE)


@triton.jit
def _unpacked(words, NIBBLE: tl.constexpr, LESS_MIDDLE: tl.constexpr, DTYPE: tl.constexpr):
    """One nibble q of each word as a number, two words at a time: 128 + q in bfloat16, 1024 + q in
    float16, have q in their last bits. LESS_MIDDLE: q - 8 instead.

    words: int16, neighbours in one register; result of their shape, DTYPE.
    """
    IS_BFLOAT16: tl.constexpr = tl.bfloat16 == DTYPE
    KIND: tl.constexpr = "bf16x2" if IS_BFLOAT16 else "f16x2"
    BASE: tl.constexpr = 0x43004300 if IS_BFLOAT16 else 0x64006400
    MIDDLE: tl.constexpr = BASE + 0x00080008
    SHIFT: tl.constexpr = 4 * NIBBLE
    SUBTRACT: tl.constexpr = f"mov.b32 t, {MIDDLE}; sub.rn.{KIND} $0, $0, t;" if LESS_MIDDLE else ""
    CODE: tl.constexpr = (
        f"{{ .reg .b32 t; shr.u32 t, $1, {SHIFT}; "
        f"lop3.b32 $0, t, 0x000f000f, {BASE}, 0xea; {SUBTRACT} }}"
    )
    if IS_BFLOAT16:  # a parameter cannot be the type of the result
        return tl.inline_asm_elementwise(CODE, "=r,r", [words], tl.bfloat16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(CODE, "=r,r", [words], tl.float16, is_pure=True, pack=2)


@triton.jit
def _weights(words, NIBBLE: tl.constexpr, zeros, HAS_ZEROS: tl.constexpr, DTYPE: tl.constexpr):
    """`_plain_weights` by `_unpacked`."""
    weight = _unpacked(words, NIBBLE, not HAS_ZEROS, DTYPE)
    if HAS_ZEROS:
        BASE: tl.constexpr = 128.0 if tl.bfloat16 == DTYPE else 1024.0
        weight -= (zeros.to(tl.float32) + BASE).to(DTYPE)[:, None]
    return weight


@triton.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    num_arrived_ptr,
    num_rows,
    num_inputs,
    num_outputs,
    num_words,
    num_groups,
    group_size,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    SAME_GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_OUT outputs of ROWS rows, over a part of the inputs: integers less zero points times x
    transposed, then scales.

    num_words: of an output, num_inputs / 4. SAME_GROUP: so many runs of inputs that follow each
    other have one scale. IN_PAIRS: two 16-bit weights at a time, which Triton's interpreter cannot.
    """
    let_next_start(OVERLAP)
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    # Outputs beyond the last one are computed as the last one is, and not stored.
    place = tl.minimum(outputs, num_outputs - 1).to(tl.int64)
    lanes = tl.arange(0, RUN)
    row_ptrs = words_ptr + place[:, None] * num_words + lanes[None, :]
    scales_ptr += place * num_groups
    x_ptrs = x_ptr + rows.to(tl.int64)[None, :] * num_inputs + lanes[:, None]
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    NUM_GROUPS: tl.constexpr = 4 // SAME_GROUP
    acc = tl.zeros([BLOCK_OUT, ROWS], dtype=tl.float32)
    steps = tl.cdiv(num_words // RUN, SPLITS)
    start = tl.program_id(2) * steps * RUN
    end = tl.minimum(start + steps * RUN, num_words)
    wait_for_previous(OVERLAP)
    for word in tl.range(start, end, RUN, num_stages=NUM_STAGES):
        words = tl.load(row_ptrs + word)
        for part in tl.static_range(NUM_GROUPS):
            group = (4 * word + part * SAME_GROUP * RUN) // group_size
            scales = tl.load(scales_ptr + group).to(tl.float32)
            if HAS_ZEROS:
                zeros = tl.load(zeros_ptr + place * num_groups + group).to(tl.int32)
            else:
                zeros = tl.full([BLOCK_OUT], 8, dtype=tl.int32)
            dots = tl.zeros([BLOCK_OUT, ROWS], dtype=tl.float32)
            for index in tl.static_range(SAME_GROUP):
                x = tl.load(
                    x_ptrs + (4 * word + (part * SAME_GROUP + index) * RUN),
                    mask=is_row[None, :],
                    other=0.0,
                )
                if IN_PAIRS:
                    weight = _weights(words, part * SAME_GROUP + index, zeros, HAS_ZEROS, DTYPE)
                else:
                    weight = _plain_weights(words, part * SAME_GROUP + index, zeros, DTYPE)
                dots = tl.dot(weight, x, dots, input_precision="ieee")
            acc += scales[:, None] * dots
    places = rows.to(tl.int64)[None, :] * num_outputs + outputs[:, None]
    mask = is_row[None, :] & (outputs < num_outputs)[:, None]
    is_last = True
    if SPLITS > 1:
        # Whoever comes last finds all parts in memory and adds them in their order: no second
        # launch, and the same sum every time. The barrier puts every thread's stores before the
        # release of the one that counts.
        part_size = num_rows.to(tl.int64) * num_outputs
        tl.store(partial_ptr + tl.program_id(2) * part_size + places, acc, mask=mask)
        tl.debug_barrier()
        meeting_ptr = num_arrived_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        is_last = tl.atomic_add(meeting_ptr, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            tl.store(meeting_ptr, 0)
            acc = tl.zeros([BLOCK_OUT, ROWS], dtype=tl.float32)
            for split in tl.static_range(SPLITS):
                part_ptrs = partial_ptr + split * part_size + places
                acc += tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    if is_last:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + place).to(tl.float32)[:, None]
        tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_kernel(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    weight_ptr,
    num_outputs,
    num_words,
    num_groups,
    group_size,
    HAS_ZEROS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    RUN: tl.constexpr,
    NUM_RUNS: tl.constexpr,
):
    """NUM_RUNS runs of words of BLOCK_OUT outputs, written out."""
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_output = outputs < num_outputs
    place = outputs.to(tl.int64)
    lanes = tl.arange(0, RUN)
    for index in tl.static_range(NUM_RUNS):
        word = (tl.program_id(1) * NUM_RUNS + index) * RUN
        row_ptrs = words_ptr + place[:, None] * num_words + (word + lanes)[None, :]
        words = tl.load(row_ptrs, mask=is_output[:, None], other=0)
        for nibble in tl.static_range(4):
            first = 4 * word + nibble * RUN
            grid = place * num_groups + first // group_size
            scales = tl.load(scales_ptr + grid, mask=is_output, other=0.0).to(tl.float32)
            if HAS_ZEROS:
                zeros = tl.load(zeros_ptr + grid, mask=is_output, other=0).to(tl.int32)
            else:
                zeros = tl.full([BLOCK_OUT], 8, dtype=tl.int32)
            weight = _plain_weights(words, nibble, zeros, tl.float32) * scales[:, None]
            out_ptrs = weight_ptr + place[:, None] * (4 * num_words) + (first + lanes)[None, :]
            tl.store(out_ptrs, weight.to(weight_ptr.dtype.element_ty), mask=is_output[:, None])


class Tile(NamedTuple):
    """What a program computes, how far it reads ahead, and how many of them an SM should get."""

    num_rows: int
    num_outputs: int
    num_warps: int
    num_stages: int
    num_per_sm: int


_TILES = (
    Tile(num_rows=8, num_outputs=64, num_warps=4, num_stages=6, num_per_sm=4),
    Tile(num_rows=16, num_outputs=64, num_warps=4, num_stages=5, num_per_sm=4),
    Tile(num_rows=32, num_outputs=128, num_warps=4, num_stages=4, num_per_sm=2),
    Tile(num_rows=64, num_outputs=128, num_warps=4, num_stages=4, num_per_sm=2),
    Tile(num_rows=128, num_outputs=128, num_warps=8, num_stages=3, num_per_sm=2),
)
"""By their rows. Not one of them has been measured yet: chosen by what the compiler makes of them
for a Hopper (instructions per weight, shared memory, registers)."""
_FLOAT32_TILE = Tile(num_rows=16, num_outputs=32, num_warps=4, num_stages=2, num_per_sm=2)
"""For checking tokens: no matrix instruction is exact enough."""


def _tile(x: torch.Tensor) -> Tile:
    if x.dtype == torch.float32:
        return _FLOAT32_TILE
    return next((tile for tile in _TILES if len(x) <= tile.num_rows), _TILES[-1])


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b; x: [num_rows, num_inputs] contiguous, 16-bit or float32; result in its dtype."""
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    if len(x) > MAX_ROWS or weight.run < _MIN_DOT:
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
    return multiply(x, weight, bias, _tile(x))


def multiply(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, tile: Tile
) -> torch.Tensor:
    """As `linear`, by the kernel and with any tile; x has its inputs in the weight's order."""
    num_rows = len(x)
    num_outputs, num_groups = weight.scales.shape
    num_words = weight.words.shape[1]
    blocks = (triton.cdiv(num_outputs, tile.num_outputs), triton.cdiv(num_rows, tile.num_rows))
    splits = _num_splits(blocks[0] * blocks[1], num_words // weight.run, tile, x.device)
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    partial = out
    if splits > 1:
        shape = (splits, num_rows, num_outputs)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    tensors = (x, weight.words, weight.scales, weight.zeros, bias, out, partial, weight.num_arrived)
    _product_kernel[(*blocks, splits)](
        *tensors,
        num_rows,
        weight.num_inputs,
        num_outputs,
        num_words,
        num_groups,
        weight.group_size,
        HAS_ZEROS=weight.zeros is not None,
        HAS_BIAS=bias is not None,
        BLOCK_OUT=tile.num_outputs,
        ROWS=tile.num_rows,
        RUN=weight.run,
        SAME_GROUP=_num_runs_of_a_group(weight),
        SPLITS=splits,
        NUM_STAGES=tile.num_stages,
        IN_PAIRS=x.is_cuda and x.dtype != torch.float32,
        num_warps=tile.num_warps,
        **overlap_options(x.device),
    )
    return out


def _num_splits(num_programs: int, num_steps: int, tile: Tile, device: torch.device) -> int:
    """How many programs share the inputs of one output, so that the device is full."""
    wanted = tile.num_per_sm * _num_sms(device) // num_programs
    return max(1, min(wanted, num_steps // _MIN_STEPS, _MAX_SPLITS))


def _most_programs(device: torch.device) -> int:
    """Of a product whose inputs are split: more do not need it."""
    return max(tile.num_per_sm for tile in _TILES) * _num_sms(device)


@lru_cache
def _num_sms(device: torch.device) -> int:
    """Streaming multiprocessors; in the interpreter, so few that small matrices are split."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def _num_runs_of_a_group(weight: PackedWeight) -> int:
    """How many of the four runs of inputs in a run of words have one scale: 4, 2 or 1."""
    num_runs = 4
    while weight.group_size % (num_runs * weight.run) and weight.scales.shape[1] > 1:
        num_runs //= 2
    return num_runs


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """[num_outputs, num_inputs], columns in the order of the kernels (`PackedWeight.order`)."""
    num_outputs, num_groups = weight.scales.shape
    num_words = weight.words.shape[1]
    out = torch.empty((num_outputs, weight.num_inputs), dtype=dtype, device=weight.words.device)
    block_out, runs = 32, num_words // weight.run
    num_runs = gcd(runs, 4)
    _dequantize_kernel[(triton.cdiv(num_outputs, block_out), runs // num_runs)](
        weight.words,
        weight.scales,
        weight.zeros,
        out,
        num_outputs,
        num_words,
        num_groups,
        weight.group_size,
        HAS_ZEROS=weight.zeros is not None,
        BLOCK_OUT=block_out,
        RUN=weight.run,
        NUM_RUNS=num_runs,
    )
    return out
