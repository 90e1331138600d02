"""Words of a checkpoint, bit by bit."""

import pytest
import torch

from m7_gptq.gptq import QuantizationConfig, round_to_nearest
from m7_gptq.packing import V1, V2, pack, pack_matrix, unpack, unpack_matrix


def test_first_of_eight_values_is_in_the_lowest_bits() -> None:
    values = torch.arange(1, 9)[:, None]
    assert pack(values, 4).tolist() == [[-2023406815]]  # 0x87654321
    assert -2023406815 & 0xFFFFFFFF == 0x87654321
    assert pack(torch.tensor([[255], [0], [0], [1]]), 8).tolist() == [[0x010000FF]]


def test_values_of_three_bits_run_on_over_the_ends_of_words() -> None:
    values = torch.zeros(32, 1, dtype=torch.int64)
    values[10] = 0b101  # bits 30, 31 and the first of the next word
    words = [word & 0xFFFFFFFF for word in pack(values, 3)[:, 0].tolist()]
    assert words == [0b01 << 30, 0b1, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_is_packed_comes_out_again(bits) -> None:
    values = torch.randint(0, 1 << bits, (96, 5), generator=torch.Generator().manual_seed(bits))
    words = pack(values, bits)
    assert words.dtype == torch.int32
    assert words.shape == (96 * bits // 32, 5)
    assert torch.equal(unpack(words, bits), values.to(torch.int32))
    # Independently: the bits of a column as one string.
    column = "".join(f"{value:0{bits}b}"[::-1] for value in values[:, 2].tolist())
    expected = [int(column[i : i + 32][::-1], 2) for i in range(0, len(column), 32)]
    assert [word & 0xFFFFFFFF for word in words[:, 2].tolist()] == expected


@pytest.mark.parametrize(("bits", "unit"), [(2, 16), (3, 32), (4, 8), (8, 4)])
def test_values_that_do_not_fill_words_are_refused(bits, unit) -> None:
    with pytest.raises(ValueError, match=f"a multiple of {unit}"):
        pack(torch.zeros(unit + 1, 2, dtype=torch.int64), bits)


@pytest.mark.parametrize("checkpoint_format", [V1, V2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_matrix_comes_out_as_it_was(checkpoint_format, bits, sym) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    matrix = round_to_nearest(weight, QuantizationConfig(bits=bits, group_size=32, sym=sym))
    packed = pack_matrix(matrix, bits, checkpoint_format)
    assert packed.qweight.shape == (64 * bits // 32, 32)
    assert packed.qzeros.shape == (2, 32 * bits // 32)
    assert packed.scales.dtype == torch.float16
    for ours, theirs in zip(unpack_matrix(packed, bits, checkpoint_format), matrix, strict=True):
        assert torch.equal(ours, theirs)


def test_zero_points_are_stored_less_one_in_version_one() -> None:
    matrix = round_to_nearest(torch.randn(8, 32), QuantizationConfig(group_size=32))
    assert {*pack_matrix(matrix, 4, V1).qzeros.flatten().tolist()} == {0x77777777}
    assert {*pack_matrix(matrix, 4, V2).qzeros.flatten().tolist()} == {0x88888888 - (1 << 32)}


def test_zero_point_that_version_one_cannot_hold_is_refused() -> None:
    matrix = round_to_nearest(torch.rand(8, 32) + 1, QuantizationConfig(group_size=32, sym=False))
    assert (matrix.zeros == 0).all()
    with pytest.raises(ValueError, match="cannot hold a zero point of 0; write 'gptq_v2'"):
        pack_matrix(matrix, 4, V1)
    assert (unpack_matrix(pack_matrix(matrix, 4, V2), 4, V2).zeros == 0).all()
