"""The operations of `reference` as Triton kernels: one launch and one trip through memory each.

Memory-bound all of them: what counts is to read and write every byte once, and, since a launch
costs the host more than a small kernel costs the device, to need few launches.
"""

import torch
import triton
import triton.language as tl

from . import few_rows
from .few_rows import linear
from .overlap import let_next_start, overlap_options, wait_for_previous

__all__ = [
    "add_rms_norm",
    "gated_linear",
    "linear",
    "qk_norm_rope",
    "rms_norm",
    "silu_mul",
    "store_kv",
]

_ROPE_HEADS = 8
"""Heads per program of the RoPE kernel."""
_SILU_BLOCK = 1024
"""Elements per program of the SiLU kernel."""


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, x_stride, hidden_size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < hidden_size
    x = tl.load(x_ptr + row * x_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / hidden_size + eps)
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    normed = (x * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    out = (normed * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * hidden_size + offsets, out, mask=mask)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    hidden_size,
    eps,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_start(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < hidden_size
    base = row * hidden_size + offsets
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    x = tl.load(x_ptr + base, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + base, mask=mask, other=0.0).to(tl.float32)
    # Rounded before the mean is taken: the residual stream lives in the model's dtype.
    rounded = (x + residual).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + base, rounded, mask=mask)
    total = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / hidden_size + eps)
    normed = (total * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + base, (normed * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr,
    cos_sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    row_len,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_QK_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    dims = tl.arange(0, HALF_BLOCK)
    dim_mask = dims < HALF
    mask = (heads < NUM_QK_HEADS)[:, None] & dim_mask[None, :]
    # Dimension i of the first half rotates with dimension i of the second.
    first_ptrs = qkv_ptr + token * row_len + heads[:, None] * (2 * HALF) + dims[None, :]
    first = tl.load(first_ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(first_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(first * first + second * second, axis=1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        is_query = (heads < NUM_HEADS)[:, None]
        q_first = tl.load(q_weight_ptr + dims, mask=dim_mask, other=0.0).to(tl.float32)
        q_second = tl.load(q_weight_ptr + HALF + dims, mask=dim_mask, other=0.0).to(tl.float32)
        k_first = tl.load(k_weight_ptr + dims, mask=dim_mask, other=0.0).to(tl.float32)
        k_second = tl.load(k_weight_ptr + HALF + dims, mask=dim_mask, other=0.0).to(tl.float32)
        first = first * scale * tl.where(is_query, q_first[None, :], k_first[None, :])
        second = second * scale * tl.where(is_query, q_second[None, :], k_second[None, :])
    cos = tl.load(cos_sin_ptr + token * 2 * HALF + dims, mask=dim_mask, other=0.0)[None, :]
    sin = tl.load(cos_sin_ptr + token * 2 * HALF + HALF + dims, mask=dim_mask, other=0.0)[None, :]
    rotated_first = (first * cos - second * sin).to(qkv_ptr.dtype.element_ty)
    rotated_second = (second * cos + first * sin).to(qkv_ptr.dtype.element_ty)
    tl.store(first_ptrs, rotated_first, mask=mask)
    tl.store(first_ptrs + HALF, rotated_second, mask=mask)


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    gate = tl.load(gate_up_ptr + row * 2 * size + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * size + size + offsets, mask=mask, other=0.0)
    out = gate * tl.sigmoid(gate) * up.to(tl.float32)
    tl.store(out_ptr + row * size + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    k_stride,
    v_stride,
    row_stride,
    head_stride,
    position_stride,
    row_len,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    if slot >= 0:
        heads = tl.arange(0, HEADS_BLOCK)[:, None]
        dims = tl.arange(0, DIM_BLOCK)[None, :]
        mask = (heads < NUM_HEADS) & (dims < HEAD_DIM)
        source = heads * HEAD_DIM + dims
        base = (slot // row_len) * row_stride + (slot % row_len) * position_stride
        target = base + heads * head_stride + dims
        k = tl.load(k_ptr + token * k_stride + source, mask=mask)
        v = tl.load(v_ptr + token * v_stride + source, mask=mask)
        tl.store(k_cache_ptr + target, k, mask=mask)
        tl.store(v_cache_ptr + target, v, mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference.rms_norm; x: [num_rows, hidden_size], rows may be strided."""
    num_rows, hidden_size = x.shape
    out = torch.empty((num_rows, hidden_size), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(hidden_size)
    _rms_norm_kernel[(num_rows,)](x, weight, out, x.stride(0), hidden_size, eps, BLOCK=block)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """See reference.add_rms_norm; x and residual are contiguous."""
    num_rows, hidden_size = x.shape
    out = torch.empty_like(residual)
    block = triton.next_power_of_2(hidden_size)
    _add_rms_norm_kernel[(num_rows,)](
        x, residual, weight, out, hidden_size, eps, BLOCK=block, **overlap_options(x.device)
    )
    return out


def qk_norm_rope(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
) -> None:
    """See reference.qk_norm_rope; qkv is contiguous."""
    num_tokens, head_dim = cos_sin.shape
    num_qk_heads = num_heads + num_kv_heads
    half = head_dim // 2
    _qk_norm_rope_kernel[(num_tokens, triton.cdiv(num_qk_heads, _ROPE_HEADS))](
        qkv,
        cos_sin,
        q_weight,
        k_weight,
        qkv.shape[1],
        eps,
        NUM_HEADS=num_heads,
        NUM_QK_HEADS=num_qk_heads,
        HALF=half,
        HALF_BLOCK=triton.next_power_of_2(half),
        HEADS_BLOCK=_ROPE_HEADS,
        HAS_NORM=q_weight is not None,
        num_warps=2,
        **overlap_options(qkv.device),
    )


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See reference.gated_linear; x is contiguous. One launch where x has few rows."""
    if few_rows.can_multiply(x, weight.shape[0] // 2):
        return few_rows.gated_linear(x, weight, bias)
    return silu_mul(linear(x, weight, bias))


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See reference.silu_mul; gate_up is contiguous."""
    num_tokens, double = gate_up.shape
    size = double // 2
    out = torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul_kernel[(num_tokens, triton.cdiv(size, _SILU_BLOCK))](
        gate_up, out, size, BLOCK=_SILU_BLOCK, **overlap_options(gate_up.device)
    )
    return out


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See reference.store_kv; both caches have the same strides, heads of k and v are adjacent."""
    num_tokens, num_kv_heads, head_dim = k.shape
    _store_kv_kernel[(num_tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        k.stride(0),
        v.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        k_cache.shape[2],
        NUM_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HEADS_BLOCK=triton.next_power_of_2(num_kv_heads),
        DIM_BLOCK=triton.next_power_of_2(head_dim),
        num_warps=2,
    )
