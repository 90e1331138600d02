"""Matrix products with few rows of activations, where reading the weights is all there is to do.

A decode step of one request multiplies every weight once. The library's kernels are made for
many rows: with one row some of them leave most of the bandwidth unused, and a product that is
split over the inner dimension costs a second launch. Two forms, because the tensor cores want
at least eight columns: one row is a dot product per output, several are small matrix products.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .overlap import let_next_start, overlap_options, wait_for_previous

MAX_ROWS = 16
"""The most rows that were tried: with 16 an 8B model gains nothing any more (milestone 4)."""
_BLOCK_IN = 1024
"""Inputs that the kernel for one row reads at a time."""
_BLOCK_OUT = 16
"""Outputs per program of the kernel for several rows: the rows of one matrix instruction."""


@triton.jit
def _one_row_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_inputs,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One output: a warp reads one row of the weights, end to end, and a block ahead.

    IS_GATED: as many rows more are up-projections, of which the warp reads one beside its gate's.
    """
    let_next_start(OVERLAP)
    output = tl.program_id(0)
    inputs = tl.arange(0, BLOCK)
    up = output + tl.num_programs(0)
    up_ptr = weight_ptr + up.to(tl.int64) * num_inputs
    weight_ptr += output.to(tl.int64) * num_inputs
    weight = tl.load(weight_ptr + inputs, mask=inputs < num_inputs, other=0.0)
    if IS_GATED:
        up_weight = tl.load(up_ptr + inputs, mask=inputs < num_inputs, other=0.0)
    wait_for_previous(OVERLAP)
    out = 0.0
    up_out = 0.0
    for first in range(0, num_inputs, BLOCK):
        mask = first + inputs < num_inputs
        following = first + BLOCK + inputs
        next_weight = tl.load(weight_ptr + following, mask=following < num_inputs, other=0.0)
        x = tl.load(x_ptr + first + inputs, mask=mask, other=0.0).to(tl.float32)
        out += tl.sum(weight.to(tl.float32) * x, axis=0)
        weight = next_weight
        if IS_GATED:
            up_out += tl.sum(up_weight.to(tl.float32) * x, axis=0)
            up_weight = tl.load(up_ptr + following, mask=following < num_inputs, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + output).to(tl.float32)
    if IS_GATED:
        if HAS_BIAS:
            up_out += tl.load(bias_ptr + up).to(tl.float32)
        out = _silu_mul(out, up_out, out_ptr.dtype.element_ty)
    tl.store(out_ptr + output, out)  # rounded to the type of the output


@triton.jit
def _silu_mul(gate, up, dtype: tl.constexpr):
    """What `fused.silu_mul` makes of two products: rounded, as if they had been stored between."""
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    return gate * tl.sigmoid(gate) * up


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_inputs,
    num_outputs,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_OUT outputs of all rows: weights [BLOCK_OUT, inputs] times x transposed.

    IS_GATED: behind num_outputs rows of gates are as many up-projections.
    """
    let_next_start(OVERLAP)
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    wait_for_previous(OVERLAP)
    inputs = tl.arange(0, BLOCK_IN)
    rows = tl.arange(0, ROWS)
    is_row = (rows < num_rows)[None, :]
    acc = tl.zeros([BLOCK_OUT, ROWS], dtype=tl.float32)
    up_acc = tl.zeros([BLOCK_OUT, ROWS], dtype=tl.float32)
    up_outputs = num_outputs + outputs
    up_ptrs = weight_ptr + up_outputs.to(tl.int64)[:, None] * num_inputs + inputs[None, :]
    weight_ptrs = weight_ptr + outputs.to(tl.int64)[:, None] * num_inputs + inputs[None, :]
    x_ptrs = x_ptr + rows[None, :] * num_inputs + inputs[:, None]
    for first in tl.range(0, num_inputs, BLOCK_IN, num_stages=NUM_STAGES):
        weight = tl.load(weight_ptrs + first)
        x = tl.load(x_ptrs + first, mask=is_row, other=0.0)
        acc = tl.dot(weight, x, acc)
        if IS_GATED:
            up_acc = tl.dot(tl.load(up_ptrs + first), x, up_acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outputs).to(tl.float32)[:, None]
    if IS_GATED:
        if HAS_BIAS:
            up_acc += tl.load(bias_ptr + up_outputs).to(tl.float32)[:, None]
        acc = _silu_mul(acc, up_acc, out_ptr.dtype.element_ty)
    out_ptrs = out_ptr + rows[None, :] * num_outputs + outputs[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=is_row)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See reference.linear; x is contiguous. Anything but few rows of 16-bit numbers is torch's."""
    if not can_multiply(x, weight.shape[0]):
        return F.linear(x, weight, bias)
    return _multiply(x, weight, bias, _Form(weight.shape[0], is_gated=False))


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See reference.gated_linear, for what `can_multiply` allows: one launch instead of two."""
    return _multiply(x, weight, bias, _Form(weight.shape[0] // 2, is_gated=True))


def can_multiply(x: torch.Tensor, num_outputs: int) -> bool:
    """Whether x [num_rows, num_inputs] has so few rows that these kernels are for it."""
    num_rows, num_inputs = x.shape
    is_aligned = (
        num_outputs % _BLOCK_OUT == num_inputs % _few_rows_blocks(num_inputs).num_inputs == 0
    )
    return x.dtype != torch.float32 and num_rows <= MAX_ROWS and (num_rows <= 1 or is_aligned)


class _Form(NamedTuple):
    """What is made of the products with a weight's rows."""

    num_outputs: int
    is_gated: bool


def _multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, form: _Form
) -> torch.Tensor:
    num_rows, num_inputs = x.shape
    out = torch.empty((num_rows, form.num_outputs), dtype=x.dtype, device=x.device)
    if num_rows == 1:
        _one_row_kernel[(form.num_outputs,)](
            x,
            weight,
            bias,
            out,
            num_inputs,
            HAS_BIAS=bias is not None,
            IS_GATED=form.is_gated,
            BLOCK=_BLOCK_IN,
            num_warps=1,
            **overlap_options(x.device),
        )
        return out
    blocks = _few_rows_blocks(num_inputs)
    _few_rows_kernel[(form.num_outputs // _BLOCK_OUT,)](
        x,
        weight,
        bias,
        out,
        num_rows,
        num_inputs,
        form.num_outputs,
        HAS_BIAS=bias is not None,
        IS_GATED=form.is_gated,
        ROWS=8 if num_rows <= 8 else MAX_ROWS,
        BLOCK_OUT=_BLOCK_OUT,
        BLOCK_IN=blocks.num_inputs,
        NUM_STAGES=blocks.num_stages,
        num_warps=blocks.num_warps,
        **overlap_options(x.device),
    )
    return out


class _Blocks(NamedTuple):
    """How the kernel for several rows cuts its work."""

    num_inputs: int
    """Inputs at a time."""
    num_warps: int
    num_stages: int
    """Tiles of weights on their way from memory while one is computed, plus that one."""


def _few_rows_blocks(num_inputs: int) -> _Blocks:
    """What was fastest on an H200."""
    if num_inputs >= 2048 and num_inputs % 512 == 0:
        return _Blocks(num_inputs=512, num_warps=2, num_stages=3)
    return _Blocks(num_inputs=256 if num_inputs % 256 == 0 else 64, num_warps=1, num_stages=4)
