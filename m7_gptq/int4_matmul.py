"""Products with 4-bit weights that never exist at 16 bits in memory (Triton).

A decode step reads every weight once and is bound by that: a quarter of the bytes is a quarter of
the time, if the integers become numbers in registers, between the load and the multiplication.
Eight of them share a word. So that the activations beside them lie side by side, nibble j of a run
of W words holds W inputs that follow each other (`pack_for_kernel`), and W divides a group: one
scale and one zero point for each output and nibble.

With so many rows that arithmetic limits, 16-bit products win: then the weights are written out
once per product, and the library multiplies.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from folovllm.kernels.overlap import let_next_start, overlap_options, wait_for_previous

from .gptq import QuantizedMatrix

MAX_ROWS = 128
"""Beyond, weights are written out at 16 bits; to be measured."""
_MAX_RUN = 128
_BLOCK_OUT_ONE_ROW = 4
_BLOCK_OUT = 64
_MIN_DOT = 16
"""Least inner size of a matrix instruction."""


class PackedWeight(NamedTuple):
    """A matrix in the order in which the kernels read it."""

    words: torch.Tensor
    """[num_outputs, num_inputs / 8] int32; nibble j of word r * run + w is input
    (8 * r + j) * run + w"""
    scales: torch.Tensor
    """[num_outputs, num_groups] float16"""
    zeros: torch.Tensor
    """[num_outputs, num_groups] uint8"""
    order: torch.Tensor | None
    """[num_inputs] int64, the activation that each input is; None: they are in order (act order
    puts the inputs of a group beside each other)"""
    run: int
    group_size: int

    @property
    def num_inputs(self) -> int:
        return 8 * self.words.shape[1]


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
    q = matrix.q[:, order].to(torch.int32).view(num_outputs, -1, 8, run)
    shifts = torch.arange(0, 32, 4, device=q.device, dtype=torch.int32)
    # Nibbles do not overlap, so that their sum is their union (the last one brings the sign).
    words = (q << shifts[:, None]).sum(dim=2, dtype=torch.int32)
    return PackedWeight(
        words=words.view(num_outputs, -1).contiguous(),
        scales=matrix.scales.t().contiguous().to(torch.float16),
        zeros=matrix.zeros.t().contiguous().to(torch.uint8),
        order=None if is_ordered else order,
        run=run,
        group_size=group_size,
    )


def _run_of(num_inputs: int, group_size: int) -> int:
    """The largest power of two up to _MAX_RUN with which runs of words fill rows and no group."""
    run = _MAX_RUN
    while (num_inputs // 8) % run or group_size % run:
        run //= 2
    return run


@triton.jit
def _nibbles(words, shift: tl.constexpr, zeros):
    """Integers less their zero points, float32; a float of 2^23 + q has q in its last bits."""
    magic = ((words >> shift) & 0xF) | 0x4B000000
    return magic.to(tl.float32, bitcast=True) - (8388608.0 + zeros)


@triton.jit
def _pairs(words, SHIFT: tl.constexpr, low_zeros, high_zeros, DTYPE: tl.constexpr):
    """The nibbles from bits SHIFT and SHIFT + 16 on, less their zero points: int32 of the shape of
    words, whose lower and upper half are one number of DTYPE each.

    128 + q in bfloat16, 1024 + q in float16, has q in its last bits; one instruction subtracts two.
    """
    IS_BFLOAT16: tl.constexpr = tl.bfloat16 == DTYPE
    BASE: tl.constexpr = 0x4300 if IS_BFLOAT16 else 0x6400
    KIND: tl.constexpr = "bf16x2" if IS_BFLOAT16 else "f16x2"
    zeros = (low_zeros | BASE) | ((high_zeros | BASE) << 16)
    pairs = ((words >> SHIFT) & 0x000F000F) | (BASE * 0x10001)
    return tl.inline_asm_elementwise(
        f"sub.rn.{KIND} $0, $1, $2;",
        "=r,r,r",
        [pairs, zeros],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _half(pairs, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """The numbers in the lower (SHIFT 0) or upper (16) halves of `_pairs`."""
    return ((pairs >> SHIFT) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _one_row_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    num_inputs,
    num_outputs,
    num_groups,
    group_size,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    RUN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_OUT outputs: their words, a run at a time."""
    let_next_start(OVERLAP)
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_output = outputs < num_outputs
    lanes = tl.arange(0, RUN)
    row_ptrs = words_ptr + outputs.to(tl.int64)[:, None] * (num_inputs // 8) + lanes[None, :]
    scales_ptr += outputs.to(tl.int64) * num_groups
    zeros_ptr += outputs.to(tl.int64) * num_groups
    words = tl.load(row_ptrs, mask=is_output[:, None], other=0)
    wait_for_previous(OVERLAP)
    acc = tl.zeros([BLOCK_OUT], dtype=tl.float32)
    for first in range(0, num_inputs, 8 * RUN):
        following = first + 8 * RUN
        mask = is_output[:, None] & (following + lanes < num_inputs)[None, :]
        next_words = tl.load(row_ptrs + following // 8, mask=mask, other=0)
        for nibble in tl.static_range(8):
            start = first + nibble * RUN
            group = start // group_size
            zeros = tl.load(zeros_ptr + group, mask=is_output, other=0).to(tl.float32)
            scales = tl.load(scales_ptr + group, mask=is_output, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + start + lanes).to(tl.float32)
            weight = _nibbles(words, 4 * nibble, zeros[:, None])
            acc += scales * tl.sum(weight * x[None, :], axis=1)
        words = next_words
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out_ptr + outputs, acc.to(out_ptr.dtype.element_ty), mask=is_output)


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_inputs,
    num_outputs,
    num_groups,
    group_size,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_OUT outputs of ROWS rows: integers less zero points times x transposed, then scales.

    IN_PAIRS: two 16-bit weights at a time, which Triton's interpreter cannot.
    """
    let_next_start(OVERLAP)
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_output, is_row = outputs < num_outputs, rows < num_rows
    lanes = tl.arange(0, RUN)
    row_ptrs = words_ptr + outputs.to(tl.int64)[:, None] * (num_inputs // 8) + lanes[None, :]
    scales_ptr += outputs.to(tl.int64) * num_groups
    zeros_ptr += outputs.to(tl.int64) * num_groups
    x_ptrs = x_ptr + rows.to(tl.int64)[None, :] * num_inputs + lanes[:, None]
    wait_for_previous(OVERLAP)
    acc = tl.zeros([BLOCK_OUT, ROWS], dtype=tl.float32)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    for first in tl.range(0, num_inputs, 8 * RUN, num_stages=NUM_STAGES):
        words = tl.load(row_ptrs + first // 8, mask=is_output[:, None], other=0)
        if IN_PAIRS:
            for nibble in tl.static_range(4):
                low = first + nibble * RUN
                high = low + 4 * RUN
                low_ptr, high_ptr = zeros_ptr + low // group_size, zeros_ptr + high // group_size
                low_zeros = tl.load(low_ptr, mask=is_output, other=0).to(tl.int32)
                high_zeros = tl.load(high_ptr, mask=is_output, other=0).to(tl.int32)
                pairs = _pairs(words, 4 * nibble, low_zeros[:, None], high_zeros[:, None], DTYPE)
                low_ptr, high_ptr = scales_ptr + low // group_size, scales_ptr + high // group_size
                low_scales = tl.load(low_ptr, mask=is_output, other=0.0).to(tl.float32)
                high_scales = tl.load(high_ptr, mask=is_output, other=0.0).to(tl.float32)
                low_x = tl.load(x_ptrs + low, mask=is_row[None, :], other=0.0)
                high_x = tl.load(x_ptrs + high, mask=is_row[None, :], other=0.0)
                acc += low_scales[:, None] * tl.dot(_half(pairs, 0, DTYPE), low_x)
                acc += high_scales[:, None] * tl.dot(_half(pairs, 16, DTYPE), high_x)
        else:
            for nibble in tl.static_range(8):
                start = first + nibble * RUN
                group = start // group_size
                zeros = tl.load(zeros_ptr + group, mask=is_output, other=0).to(tl.float32)
                scales = tl.load(scales_ptr + group, mask=is_output, other=0.0).to(tl.float32)
                x = tl.load(x_ptrs + start, mask=is_row[None, :], other=0.0)
                # Whole numbers of at most 15: exact at 16 bits.
                weight = _nibbles(words, 4 * nibble, zeros[:, None]).to(x.dtype)
                acc += scales[:, None] * tl.dot(weight, x, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + rows.to(tl.int64)[None, :] * num_outputs + outputs[:, None]
    mask = is_row[None, :] & is_output[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_kernel(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    weight_ptr,
    num_inputs,
    num_groups,
    group_size,
    RUN: tl.constexpr,
):
    """A run of words of one output, written out."""
    output, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, RUN)
    words = tl.load(words_ptr + output * (num_inputs // 8) + run * RUN + lanes)
    for nibble in tl.static_range(8):
        start = (8 * run + nibble) * RUN
        group = start // group_size
        zero = tl.load(zeros_ptr + output * num_groups + group).to(tl.float32)
        scale = tl.load(scales_ptr + output * num_groups + group).to(tl.float32)
        weight = _nibbles(words, 4 * nibble, zero) * scale
        place = weight_ptr + output * num_inputs + start + lanes
        tl.store(place, weight.to(weight_ptr.dtype.element_ty))


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b; x: [num_rows, num_inputs] contiguous, 16-bit or float32; result in its dtype."""
    num_rows = len(x)
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    if num_rows > MAX_ROWS or (num_rows > 1 and weight.run < _MIN_DOT):
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
    num_outputs, num_groups = weight.scales.shape
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    tensors = (x, weight.words, weight.scales, weight.zeros, bias, out)
    sizes = (weight.num_inputs, num_outputs, num_groups, weight.group_size)
    if num_rows == 1:
        _one_row_kernel[(triton.cdiv(num_outputs, _BLOCK_OUT_ONE_ROW),)](
            *tensors,
            *sizes,
            HAS_BIAS=bias is not None,
            BLOCK_OUT=_BLOCK_OUT_ONE_ROW,
            RUN=weight.run,
            num_warps=1,
            **overlap_options(x.device),
        )
        return out
    tile = _row_tile(num_rows, x)
    _rows_kernel[
        (triton.cdiv(num_outputs, tile.num_outputs), triton.cdiv(num_rows, tile.num_rows))
    ](
        *tensors,
        num_rows,
        *sizes,
        HAS_BIAS=bias is not None,
        BLOCK_OUT=tile.num_outputs,
        ROWS=tile.num_rows,
        RUN=weight.run,
        NUM_STAGES=tile.num_stages,
        IN_PAIRS=x.is_cuda and x.dtype != torch.float32,
        num_warps=tile.num_warps,
        **overlap_options(x.device),
    )
    return out


class _Tile(NamedTuple):
    """What a program of the kernel for several rows computes, and how far it reads ahead."""

    num_rows: int
    num_outputs: int
    num_warps: int
    num_stages: int


def _row_tile(num_rows: int, x: torch.Tensor) -> _Tile:
    """Sizes that fit. On an H200 that for up to 8 rows was the fastest of five that were tried
    (docs/dev/data/m7_kernels_h200.json); the other one was tried alone.

    Activations of eight nibbles lie in shared memory, a run of words long and twice: 32 rows of
    16 bits and 128 words are 131 KB, and twice as many rows are more than there is.
    """
    if num_rows <= 8 and x.is_cuda and x.dtype != torch.float32:
        return _Tile(num_rows=8, num_outputs=16, num_warps=1, num_stages=3)
    most = 64 // x.element_size()
    rows = min(max(16, triton.next_power_of_2(num_rows)), most)
    return _Tile(num_rows=rows, num_outputs=_BLOCK_OUT, num_warps=4, num_stages=2)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """[num_outputs, num_inputs], columns in the order of the kernels (`PackedWeight.order`)."""
    num_outputs, num_groups = weight.scales.shape
    out = torch.empty((num_outputs, weight.num_inputs), dtype=dtype, device=weight.words.device)
    _dequantize_kernel[(num_outputs, weight.words.shape[1] // weight.run)](
        weight.words,
        weight.scales,
        weight.zeros,
        out,
        weight.num_inputs,
        num_groups,
        weight.group_size,
        RUN=weight.run,
    )
    return out
