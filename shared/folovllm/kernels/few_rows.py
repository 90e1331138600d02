"""Matrix products with few rows of activations, where reading the weights is all there is to do.

A decode step of one request multiplies every weight once. The library's kernels are made for
many rows: with one row some of them leave most of the bandwidth unused, and a product that is
split over the inner dimension costs a second launch. Two forms, because the tensor cores want
at least eight columns: one row is a dot product per output, several are small matrix products.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

MAX_ROWS = 16
"""From here on the library is as fast (measured on an H200, see docs/dev/milestone_4.md)."""
_BLOCK_IN = 1024
"""Inputs that the kernel for one row reads at a time."""
_BLOCK_OUT = 16
"""Outputs per program of the kernel for several rows: the rows of one matrix instruction."""


@triton.jit
def _one_row_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_inputs, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """One output: a warp reads one row of the weights, end to end."""
    output = tl.program_id(0).to(tl.int64)
    products = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, num_inputs, BLOCK):
        inputs = first + tl.arange(0, BLOCK)
        mask = inputs < num_inputs
        weight = tl.load(weight_ptr + output * num_inputs + inputs, mask=mask, other=0.0)
        x = tl.load(x_ptr + inputs, mask=mask, other=0.0)
        products += weight.to(tl.float32) * x.to(tl.float32)
    out = tl.sum(products, axis=0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + output).to(tl.float32)
    tl.store(out_ptr + output, out.to(out_ptr.dtype.element_ty))


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
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """BLOCK_OUT outputs of all rows: weights [BLOCK_OUT, inputs] times x transposed."""
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inputs = tl.arange(0, BLOCK_IN)
    rows = tl.arange(0, ROWS)
    is_row = (rows < num_rows)[None, :]
    acc = tl.zeros([BLOCK_OUT, ROWS], dtype=tl.float32)
    weight_ptrs = weight_ptr + outputs.to(tl.int64)[:, None] * num_inputs + inputs[None, :]
    x_ptrs = x_ptr + rows[None, :] * num_inputs + inputs[:, None]
    for first in tl.range(0, num_inputs, BLOCK_IN, num_stages=NUM_STAGES):
        weight = tl.load(weight_ptrs + first)
        x = tl.load(x_ptrs + first, mask=is_row, other=0.0)
        acc = tl.dot(weight, x, acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outputs).to(tl.float32)[:, None]
    out_ptrs = out_ptr + rows[None, :] * num_outputs + outputs[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=is_row)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See reference.linear; x is contiguous. Anything but few rows of 16-bit numbers is torch's."""
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0]
    block_in = 256 if num_inputs % 256 == 0 else 64
    is_aligned = num_outputs % _BLOCK_OUT == num_inputs % block_in == 0
    if x.dtype == torch.float32 or num_rows > MAX_ROWS or (num_rows > 1 and not is_aligned):
        return F.linear(x, weight, bias)
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    if num_rows == 1:
        _one_row_kernel[(num_outputs,)](
            x,
            weight,
            bias,
            out,
            num_inputs,
            HAS_BIAS=bias is not None,
            BLOCK=_BLOCK_IN,
            num_warps=1,
        )
        return out
    _few_rows_kernel[(num_outputs // _BLOCK_OUT,)](
        x,
        weight,
        bias,
        out,
        num_rows,
        num_inputs,
        num_outputs,
        HAS_BIAS=bias is not None,
        ROWS=8 if num_rows <= 8 else MAX_ROWS,
        BLOCK_OUT=_BLOCK_OUT,
        BLOCK_IN=block_in,
        NUM_STAGES=4,
        num_warps=1,
    )
    return out
