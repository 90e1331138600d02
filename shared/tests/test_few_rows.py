"""Products with few rows against torch, over the shapes at which the kernels change."""

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1 before start", allow_module_level=True)

from folovllm.kernels import few_rows, fused, reference  # noqa: E402

pytestmark = pytest.mark.no_cover  # Triton's interpreter takes twice as long under coverage
DEVICE = "cuda" if HAS_CUDA else "cpu"
DTYPES = [torch.float16] + ([torch.bfloat16] if HAS_CUDA else [])
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def draw(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("num_inputs", "num_outputs"), [(64, 16), (576, 48), (1024, 32), (1536, 16), (24, 5), (100, 32)]
)
@pytest.mark.parametrize("num_rows", [1, 2, 8, 9, 16, 17])
def test_linear_equals_torch(num_rows, num_inputs, num_outputs, has_bias, dtype) -> None:
    x = draw(num_rows, num_inputs, dtype=dtype, seed=0)
    weight = draw(num_outputs, num_inputs, dtype=dtype, seed=1) / num_inputs**0.5
    bias = draw(num_outputs, dtype=dtype, seed=2) if has_bias else None
    expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    out = few_rows.linear(x, weight, bias)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(64, 16), (1536, 48), (24, 5), (100, 32)])
@pytest.mark.parametrize("num_rows", [1, 2, 8, 9, 16, 17])
def test_gated_product_equals_product_and_activation(
    num_rows, num_inputs, num_outputs, has_bias, dtype
) -> None:
    x = draw(num_rows, num_inputs, dtype=dtype, seed=0)
    weight = draw(2 * num_outputs, num_inputs, dtype=dtype, seed=1) / num_inputs**0.5
    bias = draw(2 * num_outputs, dtype=dtype, seed=2) if has_bias else None
    out = fused.gated_linear(x, weight, bias)
    assert torch.equal(out, fused.silu_mul(fused.linear(x, weight, bias)))
    expected = reference.gated_linear(
        x.float(), weight.float(), None if bias is None else bias.float()
    )
    torch.testing.assert_close(out.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_float32_is_left_to_torch() -> None:
    """The comparison with Transformers is exact only with the same products."""
    x, weight = (draw(n, 64, dtype=torch.float32, seed=n) for n in (1, 32))
    assert torch.equal(few_rows.linear(x, weight, None), F.linear(x, weight))


@pytest.mark.parametrize("num_rows", [0, 1, 5, 20])
def test_empty_and_odd_shapes_keep_their_shape(num_rows) -> None:
    x, weight = (draw(n, 50, dtype=torch.float16, seed=n) for n in (num_rows, 7))
    assert few_rows.linear(x, weight, None).shape == (num_rows, 7)
