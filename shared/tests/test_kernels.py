"""Every Triton kernel against its plain torch twin, on the edge shapes."""

import os

import pytest
import torch

from folovllm.kernels import reference
from folovllm.kernels.selection import select_kernels

pytest.importorskip("triton")

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1 before start", allow_module_level=True)

from folovllm.kernels import fused  # noqa: E402  (import compiles for the interpreter or the GPU)

DEVICE = "cuda" if HAS_CUDA else "cpu"
# The interpreter computes bf16 wrongly without saying so: there only float32 and float16.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if HAS_CUDA else [])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "hidden_size"), [(1, 64), (3, 96), (17, 576), (2, 1024)])
def test_rms_norm_equals_reference(num_rows: int, hidden_size: int, dtype: torch.dtype) -> None:
    x, weight = draw(num_rows, hidden_size, dtype=dtype), draw(hidden_size, dtype=dtype, seed=1)
    assert_close(fused.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


def test_rms_norm_reads_strided_rows() -> None:
    x, weight = draw(4, 200, dtype=torch.float32)[:, 3:99], draw(96, dtype=torch.float32, seed=1)
    assert_close(fused.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "hidden_size"), [(1, 64), (5, 576), (2, 1000)])
def test_add_rms_norm_equals_reference_and_updates_the_residual(
    num_rows: int, hidden_size: int, dtype: torch.dtype
) -> None:
    x, weight = draw(num_rows, hidden_size, dtype=dtype), draw(hidden_size, dtype=dtype, seed=1)
    residual = draw(num_rows, hidden_size, dtype=dtype, seed=2)
    expected_residual = residual.clone()
    expected = reference.add_rms_norm(x, expected_residual, weight, 1e-5)
    assert_close(fused.add_rms_norm(x, residual, weight, 1e-5), expected)
    torch.testing.assert_close(residual, expected_residual, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim"),
    [(1, 4, 2, 16), (5, 9, 3, 64), (3, 16, 8, 128), (2, 4, 4, 96), (1, 3, 1, 24)],
)
def test_qk_norm_rope_equals_reference_and_leaves_values_alone(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    has_norm: bool,
    dtype: torch.dtype,
) -> None:
    qkv = draw(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    angles = draw(num_tokens, head_dim // 2, dtype=torch.float32, seed=1)
    # In the reduced dtypes the twin rounds cos and sin first: give both the rounded ones.
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(dtype).float()
    weights = [draw(head_dim, dtype=dtype, seed=seed) if has_norm else None for seed in (2, 3)]
    expected, actual = qkv.clone(), qkv.clone()
    reference.qk_norm_rope(expected, cos_sin, num_heads, num_kv_heads, *weights, 1e-6)
    fused.qk_norm_rope(actual, cos_sin, num_heads, num_kv_heads, *weights, 1e-6)
    scale = 4 if dtype is not torch.float32 else 1  # the twin rounds three times on the way
    tolerance = TOLERANCE[dtype] * scale
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    num_qk = (num_heads + num_kv_heads) * head_dim
    assert torch.equal(actual[:, num_qk:], qkv[:, num_qk:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 96), (3, 1024), (2, 1536), (4, 1025)])
def test_silu_mul_equals_reference(num_tokens: int, size: int, dtype: torch.dtype) -> None:
    gate_up = draw(num_tokens, 2 * size, dtype=dtype)
    assert_close(fused.silu_mul(gate_up), reference.silu_mul(gate_up))


@pytest.mark.parametrize("kernels", [reference, fused], ids=["torch", "triton"])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["head-major", "token-major"])
def test_store_kv_writes_its_slots_and_nothing_else(kernels, is_transposed: bool) -> None:
    num_rows, num_heads, row_len, head_dim = 3, 3, 5, 24
    shape = (num_rows, row_len, num_heads, head_dim)
    if not is_transposed:
        shape = (num_rows, num_heads, row_len, head_dim)
    caches = [torch.full(shape, float("nan"), device=DEVICE) for _ in range(2)]
    views = [cache.transpose(1, 2) if is_transposed else cache for cache in caches]
    qkv = draw(4, 5 * num_heads, head_dim, dtype=torch.float32)
    k, v = qkv[:, num_heads : 2 * num_heads], qkv[:, 2 * num_heads : 3 * num_heads]
    slot_mapping = torch.tensor([14, -1, 0, 7], device=DEVICE)
    kernels.store_kv(k, v, *views, slot_mapping)
    for source, view in zip((k, v), views, strict=True):
        for token, slot in ((0, 14), (2, 0), (3, 7)):
            assert torch.equal(view[slot // row_len, :, slot % row_len], source[token])
        num_written = view.isfinite().all(-1).all(1).sum()
        assert num_written == 3


def test_causal_attention_of_one_token_over_one_key_is_its_value() -> None:
    q, v = draw(1, 4, 8, dtype=torch.float32), draw(1, 2, 8, dtype=torch.float32, seed=1)
    out = reference.causal_attention(q, q[:, :2], v)
    torch.testing.assert_close(out, v.repeat_interleave(2, dim=1))


def test_causal_attention_equals_torch_sdpa() -> None:
    q = draw(7, 6, 16, dtype=torch.float32)
    k, v = (draw(7, 2, 16, dtype=torch.float32, seed=seed) for seed in (1, 2))
    heads_first = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(reference.causal_attention(q, k, v), expected[0].transpose(0, 1))


def test_causal_attention_of_a_chunk_equals_the_rows_of_the_whole() -> None:
    q = draw(9, 4, 16, dtype=torch.float32)
    k, v = (draw(9, 2, 16, dtype=torch.float32, seed=seed) for seed in (1, 2))
    whole = reference.causal_attention(q, k, v)
    torch.testing.assert_close(reference.causal_attention(q[6:], k, v), whole[6:])


def test_kernels_are_chosen_by_device() -> None:
    assert select_kernels(torch.device("cpu")) is reference
    assert select_kernels(torch.device("cuda")) is fused
