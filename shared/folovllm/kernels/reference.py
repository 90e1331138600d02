"""The fused operations and attention in plain torch: the CPU path, and every kernel's oracle."""

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b; x: [num_tokens, in_features], weight: [out_features, in_features]."""
    return F.linear(x, weight, bias)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019).

    x, result: [..., hidden_size]; weight: [hidden_size]. The mean is taken in float32, and the
    normalised value is rounded to x's dtype before the weight, as the published models do.
    """
    x32 = x.to(torch.float32)
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add x to the residual stream, in place, and return the normalised sum.

    x, residual, result: [num_tokens, hidden_size]. Mutates `residual`.
    """
    residual += x
    return rms_norm(residual, weight, eps)


def qk_norm_rope(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
) -> None:
    """Normalise query and key heads (where there are weights) and rotate them; mutates `qkv`.

    qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], heads of q, then k, then v;
    v is left alone. cos_sin: [num_tokens, head_dim] float32, see RotaryTable.gather.
    q_weight, k_weight: [head_dim].
    """
    num_tokens, head_dim = cos_sin.shape
    heads = qkv.view(num_tokens, -1, head_dim)
    cos, sin = cos_sin.unsqueeze(1).to(qkv.dtype).chunk(2, dim=-1)
    queries = heads[:, :num_heads]
    keys = heads[:, num_heads : num_heads + num_kv_heads]
    for part, weight in ((queries, q_weight), (keys, k_weight)):
        normed = part if weight is None else rms_norm(part, weight, eps)
        first, second = normed.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        part.copy_(rotated)


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """silu(gate(x)) * up(x), [num_rows, num_outputs].

    weight: [2 * num_outputs, num_inputs], gate above up; bias: [2 * num_outputs] or None.
    """
    return silu_mul(linear(x, weight, bias))


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (SwiGLU, Shazeer 2020).

    gate_up: [num_tokens, 2 * intermediate_size], gate first; result: [num_tokens,
    intermediate_size].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write each token's key and value into its slot of the cache; mutates the caches.

    k, v: [num_tokens, num_kv_heads, head_dim]. k_cache, v_cache: [num_rows, num_kv_heads,
    row_len, head_dim], any strides. slot_mapping: [num_tokens] int64; slot s is position
    s % row_len of row s // row_len, and a token with slot -1 is not stored.
    """
    row_len = k_cache.shape[2]
    stored = slot_mapping >= 0
    slots = slot_mapping[stored]
    rows, positions = slots // row_len, slots % row_len
    k_cache[rows, :, positions] = k[stored]
    v_cache[rows, :, positions] = v[stored]


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention of one sequence whose last rows are the queries.

    q, result: [num_queries, num_heads, head_dim]; k, v: [seq_len, num_kv_heads, head_dim];
    query head h reads key/value head h // (num_heads // num_kv_heads). Everything is computed
    in float32 (float64 if given) and returned in q's dtype.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    num_queries, num_heads, head_dim = q.shape
    seq_len, num_kv_heads = k.shape[:2]
    keys = k.to(compute).repeat_interleave(num_heads // num_kv_heads, dim=1)
    values = v.to(compute).repeat_interleave(num_heads // num_kv_heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.to(compute), keys) * head_dim**-0.5
    query_positions = torch.arange(seq_len - num_queries, seq_len, device=q.device)
    future = torch.arange(seq_len, device=q.device)[None, :] > query_positions[:, None]
    scores = scores.masked_fill(future, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)
