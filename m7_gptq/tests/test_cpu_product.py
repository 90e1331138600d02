"""torch's packed product, against the weights written out."""

import pytest
import torch

from folovllm.kernels.selection import select_kernels
from m7_gptq.gptq import QuantizationConfig, QuantizedMatrix, quantize, round_to_nearest
from m7_gptq.packing import V1
from m7_gptq.quantized_linear import (
    CpuInt4Product,
    QuantizedLinear,
    Scheme,
    WrittenOutProduct,
)

KERNELS = select_kernels(torch.device("cpu"))
LIKE = torch.empty(0, dtype=torch.bfloat16)


def matrix_of(num_outputs: int, num_inputs: int, **options) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_outputs, num_inputs, generator=generator)
    config = QuantizationConfig(**options)
    if not config.desc_act:
        return round_to_nearest(weight, config)
    x = torch.randn(512, num_inputs, generator=generator) * torch.rand(num_inputs)
    return quantize(weight, x.t() @ x, config)


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 32},
        {"group_size": 128},
        {"group_size": -1},
        {"group_size": 64, "sym": False},
        {"group_size": 32, "desc_act": True, "sym": False},
        {"group_size": 32, "desc_act": True, "static_groups": True},
    ],
)
@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("has_bias", [True, False])
def test_product_is_that_of_the_written_out_weights(options, num_rows, has_bias) -> None:
    matrix = matrix_of(48, 256, **options)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, 256, generator=generator).to(torch.bfloat16)
    bias = torch.randn(48, generator=generator).to(torch.bfloat16) if has_bias else None
    assert CpuInt4Product.can_compute(matrix, LIKE)
    result = CpuInt4Product(matrix, bias, KERNELS, LIKE)(x)
    assert result.dtype == torch.bfloat16
    exact = x.float() @ matrix.dequantize().t() + (0 if bias is None else bias.float())
    written = WrittenOutProduct(matrix, bias, KERNELS, LIKE)(x)
    # Scales and offsets are rounded to bfloat16 instead of weights, which is about as much.
    assert (result - exact).norm() < 2 * (written - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize(
    ("shape", "options", "dtype"),
    [
        ((48, 256), {"group_size": 32}, torch.float32),
        ((40, 256), {"group_size": 32}, torch.bfloat16),
        ((48, 160), {"group_size": 64}, torch.bfloat16),
        ((48, 256), {"group_size": 16}, torch.bfloat16),
        ((48, 96), {"group_size": -1}, torch.bfloat16),
    ],
    ids=["float32", "outputs", "last group", "small groups", "one group of 96"],
)
def test_what_torch_has_no_product_for_is_written_out(shape, options, dtype) -> None:
    like = torch.empty(0, dtype=dtype)
    assert not CpuInt4Product.can_compute(matrix_of(*shape, **options), like)


@pytest.mark.parametrize(
    ("dtype", "product"),
    [(torch.bfloat16, CpuInt4Product), (torch.float32, WrittenOutProduct)],
)
def test_bfloat16_keeps_four_bits_on_a_cpu(dtype, product) -> None:
    scheme = Scheme(QuantizationConfig(group_size=32), V1)
    linear = QuantizedLinear(scheme, 256, 64, False, KERNELS, torch.empty(0, dtype=dtype))
    linear.randomize(torch.Generator().manual_seed(0))
    assert isinstance(linear.product, product)
    x = torch.randn(2, 256).to(dtype)
    assert linear(x).shape == (2, 64)
