"""The quantiser against brute force, and what its options promise."""

import pytest
import torch

from m7_gptq.gptq import (
    Hessian,
    QuantizationConfig,
    QuantizedMatrix,
    find_grid,
    quantize,
    relative_error,
    round_to_nearest,
)

OPTIONS = [
    {"sym": sym, "desc_act": desc_act, "static_groups": static, "mse": mse}
    for sym in (True, False)
    for desc_act, static in ((False, False), (True, False), (True, True))
    for mse in (False, True)
]


def problem(num_outputs: int = 24, num_inputs: int = 64, seed: int = 0):
    """Weights, and a Hessian of inputs that depend on each other and are of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_outputs, num_inputs, generator=generator)
    mixed = torch.randn(num_inputs, num_inputs, generator=generator) / num_inputs**0.5
    sizes = torch.rand(num_inputs, generator=generator) * 3
    x = torch.randn(500, num_inputs, generator=generator) * sizes @ mixed
    hessian = Hessian(num_inputs, x.device)
    hessian.add(x)
    return weight, hessian.matrix, x


def brute_force(weight, hessian, config: QuantizationConfig) -> torch.Tensor:
    """Optimal brain surgeon one column at a time, with an inverse of what is left in float64.

    Fix the first column that is left; by the Lagrangian the others change by
    -(w - q) / [H^-1]_00 * [H^-1]_0 for the Hessian of those that are left.
    """
    weight, hessian = weight.double().clone(), hessian.double().clone()
    num_inputs = weight.shape[1]
    size = num_inputs if config.group_size == -1 else config.group_size
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1.0
    weight[:, dead] = 0.0
    static = [find_grid(part.float(), config) for part in weight.split(size, dim=1)]
    order = torch.arange(num_inputs)
    if config.desc_act:
        order = torch.argsort(hessian.diagonal().float(), descending=True, stable=True)
    damp = config.damp_percent * hessian.diagonal().mean()
    hessian += damp * torch.eye(num_inputs, dtype=torch.float64)
    weight, hessian = weight[:, order], hessian[order][:, order]
    values = torch.empty_like(weight)
    for i in range(num_inputs):
        if config.static_groups:
            grid = static[int(order[i]) // size]
        elif i % size == 0:
            grid = find_grid(weight[:, i : i + size].float(), config)
        column = weight[:, i]
        values[:, i] = grid.value(grid.round(column.float())).double()
        inverse = torch.linalg.inv(hessian[i:, i:])
        error = (column - values[:, i]) / inverse[0, 0]
        weight[:, i:] -= torch.outer(error, inverse[0])
    restored = torch.empty_like(values)
    restored[:, order] = values
    return restored


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_quantize_equals_brain_surgeon_by_brute_force(options, group_size) -> None:
    weight, hessian, _ = problem(num_outputs=8)
    config = QuantizationConfig(group_size=group_size, **options)
    expected = brute_force(weight, hessian, config)
    values = quantize(weight, hessian, config).dequantize()
    # Where float32 and float64 round to different sides, a row goes another way from there.
    same_rows = ((values - expected).abs() < 1e-4).all(dim=1)
    assert same_rows.float().mean() >= 0.75
    difference = values.double() - weight
    other = expected - weight
    h = hessian.double()
    ratio = ((difference @ h) * difference).sum() / ((other @ h) * other).sum()
    assert ratio == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("num_inputs", [128, 256, 384])
@pytest.mark.parametrize("group_size", [32, 48, 64, 128, 160, 256, -1])
def test_blocks_of_columns_change_nothing_but_the_order_of_work(num_inputs, group_size) -> None:
    weight, hessian, _ = problem(num_outputs=4, num_inputs=num_inputs, seed=1)
    config = QuantizationConfig(group_size=group_size)
    values = quantize(weight, hessian, config).dequantize()
    expected = brute_force(weight, hessian, config)
    same = ((values - expected).abs() < 1e-3).float().mean()
    assert same > 0.9


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_below_that_of_rounding_to_nearest(options, bits) -> None:
    weight, hessian, _ = problem()
    config = QuantizationConfig(bits=bits, group_size=32, **options)
    ours, nearest = quantize(weight, hessian, config), round_to_nearest(weight, config)
    assert relative_error(weight, ours, hessian) < relative_error(weight, nearest, hessian)


def test_error_is_that_of_the_layers_outputs() -> None:
    weight, hessian, x = problem()
    quantized = round_to_nearest(weight, QuantizationConfig(group_size=32))
    outputs, rounded = x @ weight.t(), x @ quantized.dequantize().t()
    expected = ((outputs - rounded).square().sum() / outputs.square().sum()).item()
    assert relative_error(weight, quantized, hessian) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("options", OPTIONS)
def test_integers_scales_and_groups_are_what_a_checkpoint_can_hold(options) -> None:
    weight, hessian, _ = problem()
    matrix = quantize(weight, hessian, QuantizationConfig(group_size=16, **options))
    assert matrix.q.shape == weight.shape
    assert matrix.q.dtype == torch.uint8
    assert int(matrix.q.max()) < 16
    assert torch.equal(matrix.scales, matrix.scales.half().float()), "scales are float16 there"
    assert torch.bincount(matrix.g_idx.long()).tolist() == [16] * 4
    if options["sym"]:
        assert (matrix.zeros == 8).all()
    if not options["desc_act"] or options["static_groups"]:
        assert matrix.g_idx.tolist() == [i // 16 for i in range(64)]


def test_act_order_rounds_columns_of_large_inputs_first_and_groups_them() -> None:
    weight, hessian, _ = problem()
    matrix = quantize(weight, hessian, QuantizationConfig(group_size=16, desc_act=True))
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    assert matrix.g_idx[order].tolist() == [i // 16 for i in range(64)]


def test_dead_inputs_get_weights_of_zero_and_harm_nobody() -> None:
    weight, _, x = problem()
    x[:, [3, 40]] = 0.0
    hessian = Hessian(64, x.device)
    hessian.add(x)
    matrix = quantize(weight, hessian.matrix, QuantizationConfig(group_size=32))
    assert (matrix.dequantize()[:, [3, 40]] == 0).all()
    assert relative_error(weight, matrix, hessian.matrix) < 0.05
    assert hessian.matrix[3, 3] == 0, "the caller's Hessian was changed"


def test_weights_that_are_on_a_grid_and_rows_of_zeros_are_kept() -> None:
    hessian = problem()[1]
    levels = torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(0))
    levels[:, ::16], levels[:, 1::16] = 7, -8  # every group spans the whole range
    weight = levels * 0.25
    weight[2] = 0.0
    config = QuantizationConfig(group_size=16, sym=False)
    for matrix in (quantize(weight, hessian, config), round_to_nearest(weight, config)):
        assert torch.equal(matrix.dequantize(), weight)


def test_search_for_ranges_never_raises_the_error_of_rounding() -> None:
    weight = problem()[0]
    weight[:, 0] *= 10
    for sym in (True, False):
        plain, searched = (
            find_grid(weight, QuantizationConfig(sym=sym, mse=mse)) for mse in (False, True)
        )
        errors = [
            (grid.value(grid.round(weight)) - weight).abs().pow(2.4).sum(dim=1)
            for grid in (plain, searched)
        ]
        assert (errors[1] <= errors[0]).all()
        assert errors[1].sum() < 0.97 * errors[0].sum()


def test_hessian_is_a_mean_however_inputs_arrive() -> None:
    x = problem()[2]
    at_once, by_parts = Hessian(64, x.device), Hessian(64, x.device)
    at_once.add(x)
    for part in x.split([1, 99, 400]):
        by_parts.add(part)
    torch.testing.assert_close(at_once.matrix, 2 * x.t() @ x / 500, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_parts.matrix, at_once.matrix, rtol=1e-4, atol=1e-4)
    assert by_parts.total_weight == 500


def test_token_that_counts_three_times_is_as_good_as_three_of_it() -> None:
    x = problem()[2]
    weighted, repeated = Hessian(64, x.device), Hessian(64, x.device)
    weights = torch.ones(500)
    weights[7] = 3.0
    weighted.add(x[:9], weights[:9])
    weighted.add(x[9:], weights[9:])
    repeated.add(torch.cat([x, x[7:8], x[7:8]]))
    torch.testing.assert_close(weighted.matrix, repeated.matrix, rtol=1e-4, atol=1e-4)


def test_inputs_that_are_not_positive_definite_are_refused_with_what_to_do() -> None:
    weight, hessian, _ = problem()
    hessian[0, 1] = hessian[1, 0] = 1e6
    with pytest.raises(ValueError, match=r"damp_percent 0.01; raise it"):
        quantize(weight, hessian, QuantizationConfig(group_size=32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits must be 2, 3, 4 or 8, got 5"),
        ({"group_size": 0}, "group_size must be a multiple of 8"),
        ({"group_size": 12}, "group_size must be a multiple of 8"),
        ({"static_groups": True}, "set desc_act as well"),
        ({"damp_percent": 0.0}, "damp_percent must be in"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationConfig(**options)


@pytest.mark.parametrize("desc_act", [False, True])
def test_last_group_may_have_fewer_columns(desc_act) -> None:
    weight, hessian, _ = problem(num_outputs=8)
    config = QuantizationConfig(group_size=48, desc_act=desc_act)
    for matrix in (quantize(weight, hessian, config), round_to_nearest(weight, config)):
        assert matrix.scales.shape == (2, 8)
        assert torch.bincount(matrix.g_idx.long()).tolist() == [48, 16]
    expected = brute_force(weight, hessian, config)
    values = quantize(weight, hessian, config).dequantize()
    assert ((values - expected).abs() < 1e-4).all(dim=1).float().mean() >= 0.75


def test_dequantized_values_are_zero_point_scale_and_group() -> None:
    matrix = QuantizedMatrix(
        q=torch.tensor([[3, 9, 15, 0]], dtype=torch.uint8),
        scales=torch.tensor([[0.5], [2.0]]),
        zeros=torch.tensor([[8], [1]], dtype=torch.int32),
        g_idx=torch.tensor([0, 1, 1, 0], dtype=torch.int32),
    )
    assert matrix.dequantize().tolist() == [[-2.5, 16.0, 28.0, -4.0]]
