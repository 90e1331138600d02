"""The int4 kernels against what torch makes of the dequantised weights."""

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1 before start", allow_module_level=True)

from m7_gptq import int4_matmul  # noqa: E402
from m7_gptq.gptq import (  # noqa: E402
    Hessian,
    QuantizationConfig,
    QuantizedMatrix,
    quantize,
    round_to_nearest,
)

DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
DTYPES = [torch.float16] + ([torch.bfloat16, torch.float32] if HAS_CUDA else [])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = [(64, 8), (256, 33), (2048, 40), (576, 24)]
"""The third one is split over programs, and 576 inputs are no whole number of groups."""


def quantized(num_inputs, num_outputs, **options) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(num_inputs)
    weight = torch.randn(num_outputs, num_inputs, generator=generator) / num_inputs**0.5
    config = QuantizationConfig(**options)
    if config.desc_act:
        hessian = Hessian(num_inputs, weight.device)
        sizes = torch.rand(num_inputs, generator=generator)
        hessian.add(torch.randn(num_inputs + 50, num_inputs, generator=generator) * sizes)
        matrix = quantize(weight, hessian.matrix, config)
    else:
        matrix = round_to_nearest(weight, config)
    return QuantizedMatrix(*(tensor.to(DEVICE) for tensor in matrix))


def draw(*shape: int, dtype: torch.dtype, seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def check(matrix: QuantizedMatrix, num_rows: int, dtype: torch.dtype, bias=None) -> None:
    x = draw(num_rows, matrix.q.shape[1], dtype=dtype)
    out = int4_matmul.linear(x, int4_matmul.pack_for_kernel(matrix), bias)
    assert out.dtype == dtype
    expected = F.linear(x.float(), matrix.dequantize(), None if bias is None else bias.float())
    torch.testing.assert_close(out.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SHAPES)
@pytest.mark.parametrize("num_rows", [1, 2, 17, 65] + ([16, 128, 256] if HAS_CUDA else []))
def test_product_equals_that_of_the_dequantised_weights(
    num_rows, num_inputs, num_outputs, dtype
) -> None:
    check(quantized(num_inputs, num_outputs, group_size=128, sym=False), num_rows, dtype)


@pytest.mark.parametrize("group_size", [8, 32, 128, -1])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("sym", [True, False])
def test_groups_of_every_size_and_act_order(group_size, desc_act, sym) -> None:
    matrix = quantized(512, 16, group_size=group_size, desc_act=desc_act, sym=sym)
    for num_rows in (1, 5):
        check(matrix, num_rows, torch.float16)


@pytest.mark.parametrize("num_rows", [1, 3, int4_matmul.MAX_ROWS + 1])
def test_bias_is_added_and_many_rows_are_left_to_the_library(num_rows) -> None:
    bias = draw(24, dtype=torch.float16, seed=3)
    check(quantized(2048, 24, group_size=64), num_rows, torch.float16, bias)


@pytest.mark.parametrize("num_rows", [1, 9, 33, 100])
def test_programs_that_share_inputs_leave_their_counters_at_zero(num_rows) -> None:
    packed = int4_matmul.pack_for_kernel(quantized(4096, 16, group_size=128))
    x = draw(num_rows, 4096, dtype=torch.float16)
    first = int4_matmul.linear(x, packed, None)
    assert not packed.num_arrived.any()
    assert torch.equal(int4_matmul.linear(x, packed, None), first)  # sums have an order


@pytest.mark.parametrize("desc_act", [False, True])
def test_written_out_weights_are_the_dequantised_ones(desc_act) -> None:
    matrix = quantized(512, 16, group_size=64, desc_act=desc_act, sym=False)
    packed = int4_matmul.pack_for_kernel(matrix)
    expected = matrix.dequantize()
    if packed.order is not None:
        expected = expected[:, packed.order]
    assert (packed.order is not None) == desc_act
    assert torch.equal(int4_matmul.dequantize(packed, torch.float32), expected)


def test_nibbles_of_a_run_are_inputs_that_follow_each_other() -> None:
    q = (torch.arange(16) % 16).repeat(4)[None].to(torch.uint8)  # 64 inputs, runs of 16 words
    matrix = QuantizedMatrix(
        q.to(DEVICE),
        torch.ones(1, 1, device=DEVICE),
        torch.zeros(1, 1, dtype=torch.int32, device=DEVICE),
        torch.zeros(64, dtype=torch.int32, device=DEVICE),
    )
    packed = int4_matmul.pack_for_kernel(matrix)
    assert packed.run == 16
    words = [int(word) & 0xFFFF for word in packed.words[0, 0, 0]]
    assert [word >> shift & 15 for word in words[:2] for shift in range(0, 16, 4)] == [0] * 4 + [
        1
    ] * 4


def test_zero_points_are_kept_only_where_they_differ_from_the_middle() -> None:
    assert int4_matmul.pack_for_kernel(quantized(64, 8, group_size=32)).zeros is None
    assert int4_matmul.pack_for_kernel(quantized(64, 8, group_size=32, sym=False)).zeros is not None


def test_inputs_that_do_not_fill_words_are_refused() -> None:
    with pytest.raises(ValueError, match="12 inputs of 4 bits do not fill words"):
        int4_matmul.pack_for_kernel(quantized(12, 8, group_size=-1))


@pytest.mark.parametrize("num_blocks", [1, 7, 64, 132, 192, 384, 1000])
@pytest.mark.parametrize("num_steps", [1, 3, 12, 32, 97])
def test_inputs_are_shared_when_that_shortens_the_waves_and_nobody_is_left_without(
    monkeypatch, num_blocks, num_steps
) -> None:
    monkeypatch.setattr(int4_matmul, "_num_sms", lambda device: 132)
    tile = int4_matmul._TILES[16]
    num_outputs = num_blocks * tile.num_outputs
    _, splits, blocks = int4_matmul._cut.__wrapped__(16, num_outputs, num_steps, tile, DEVICE)
    assert blocks == (num_blocks, 1)
    steps = -(-num_steps // splits)
    assert (splits - 1) * steps < num_steps
    room = 132 * tile.num_per_sm
    assert -(-num_blocks * splits // room) * steps <= -(-num_blocks // room) * num_steps
    assert splits == 1 or num_blocks <= room
    if num_blocks == 64 and num_steps == 32:
        assert splits == 6  # 384 programs, where there is room for 396


@pytest.mark.parametrize(
    ("num_outputs", "num_inputs", "limit", "splits"),
    [(24576, 4096, 256, 1), (4096, 12288, 256, 2), (6144, 4096, 128, 1), (4096, 4096, 256, 2)],
)
def test_many_rows_get_what_was_fastest_for_the_shapes_of_an_8b_model(
    monkeypatch, num_outputs, num_inputs, limit, splits
) -> None:
    """On an H200, 256 rows: docs/dev/data/m7_product_ways_h200.json."""
    monkeypatch.setattr(int4_matmul, "_num_sms", lambda device: 132)
    x = torch.empty(256, 8, dtype=torch.bfloat16)
    weight = int4_matmul.PackedWeight(
        words=torch.empty(num_outputs // 32, num_inputs // 128, 32, 32, device="meta"),
        scales=torch.empty(num_outputs, num_inputs // 128, device="meta"),
        zeros=None,
        order=None,
        num_arrived=torch.empty(0),
        group_size=128,
    )
    int4_matmul._cut.cache_clear()
    tile = int4_matmul._tile(x, weight)
    cut = int4_matmul._cut(256, num_outputs, num_inputs // 128, tile, x.device)
    int4_matmul._cut.cache_clear()
    assert tile is int4_matmul._TILES[limit] and cut.splits == splits
    assert int4_matmul._tile(x[:128], weight) is int4_matmul._TILES[128]
    assert int4_matmul._tile(x[:16], weight) is int4_matmul._TILES[16]
