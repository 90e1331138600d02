"""The checkpoint format of AutoGPTQ and GPTQModel: integers packed into words, and their names."""

from math import lcm
from typing import NamedTuple

import torch

from .gptq import QuantizedMatrix

WORD_BITS = 32
V1, V2 = "gptq", "gptq_v2"
"""v1 stores zero points less one; v2 as they are."""


class PackedMatrix(NamedTuple):
    """A quantised matrix as a checkpoint has it."""

    qweight: torch.Tensor
    """[num_inputs * bits / 32, num_outputs] int32, packed along the inputs"""
    qzeros: torch.Tensor
    """[num_groups, num_outputs * bits / 32] int32, packed along the outputs"""
    scales: torch.Tensor
    """[num_groups, num_outputs] float16"""
    g_idx: torch.Tensor
    """[num_inputs] int32"""


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integers along dim 0, the first in the lowest bits; [n * bits / 32, m] int32.

    values: [n, m], each below 2^bits. One stream of bits per column: with 3 bits every 32 values
    take three words, and some values lie in two of them.
    """
    values_per_unit, words_per_unit = _unit(bits)
    num_values, num_columns = values.shape
    if num_values % values_per_unit:
        raise ValueError(
            f"{num_values} values of {bits} bits do not fill whole words; they must be a multiple "
            f"of {values_per_unit}"
        )
    units = values.to(torch.int64).view(-1, values_per_unit, num_columns)
    words = units.new_zeros((len(units), words_per_unit, num_columns))
    for index in range(values_per_unit):
        word, shift = divmod(index * bits, WORD_BITS)
        words[:, word] |= units[:, index] << shift
        if shift + bits > WORD_BITS:
            words[:, word + 1] |= units[:, index] >> (WORD_BITS - shift)
    words &= (1 << WORD_BITS) - 1
    # The upper half of the unsigned words are the negative numbers of signed ones.
    words -= (words >> (WORD_BITS - 1)) << WORD_BITS
    return words.view(-1, num_columns).to(torch.int32)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """What `pack` was given: [n, m] int32."""
    values_per_unit, words_per_unit = _unit(bits)
    num_columns = words.shape[1]
    units = (words.to(torch.int64) & ((1 << WORD_BITS) - 1)).view(-1, words_per_unit, num_columns)
    values = units.new_empty((len(units), values_per_unit, num_columns))
    for index in range(values_per_unit):
        word, shift = divmod(index * bits, WORD_BITS)
        value = units[:, word] >> shift
        if shift + bits > WORD_BITS:
            value = value | units[:, word + 1] << (WORD_BITS - shift)
        values[:, index] = value & ((1 << bits) - 1)
    return values.view(-1, num_columns).to(torch.int32)


def _unit(bits: int) -> tuple[int, int]:
    """(values, words) of the shortest run of values that ends with a word."""
    num_bits = lcm(bits, WORD_BITS)
    return num_bits // bits, num_bits // WORD_BITS


def pack_matrix(matrix: QuantizedMatrix, bits: int, checkpoint_format: str) -> PackedMatrix:
    """ValueError where the format cannot hold the matrix."""
    zeros = matrix.zeros
    if checkpoint_format == V1:
        if (zeros == 0).any():
            raise ValueError(
                "checkpoint_format 'gptq' stores zero points less one and cannot hold a zero "
                "point of 0; write 'gptq_v2', or quantise with sym"
            )
        zeros = zeros - 1
    return PackedMatrix(
        qweight=pack(matrix.q.t(), bits),
        qzeros=pack(zeros.t(), bits).t().contiguous(),
        scales=matrix.scales.to(torch.float16),
        g_idx=matrix.g_idx.to(torch.int32),
    )


def unpack_matrix(packed: PackedMatrix, bits: int, checkpoint_format: str) -> QuantizedMatrix:
    """What `pack_matrix` was given, with the scales that were stored."""
    zeros = unpack(packed.qzeros.t().contiguous(), bits).t().contiguous()
    if checkpoint_format == V1:
        zeros = zeros + 1
    return QuantizedMatrix(
        q=unpack(packed.qweight, bits).t().contiguous().to(torch.uint8),
        scales=packed.scales.to(torch.float32),
        zeros=zeros,
        g_idx=packed.g_idx,
    )
