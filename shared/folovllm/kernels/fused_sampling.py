"""The choice of a token as Triton kernels: one read of the logits, noise made in registers.

A row is cut into slices so that a single request still occupies many multiprocessors; a second,
small kernel takes the best slice of every row. The random words are bit for bit those of `random`;
the logarithms after them may differ in the last place.
"""

import torch
import triton
import triton.language as tl

_SLICE = 2048
"""Tokens per program; a multiple of 4, since four tokens share one Philox counter."""


@triton.jit
def _random_words(seed, position, first_group, NUM_GROUPS: tl.constexpr):
    """Words of tokens [4 * first_group, 4 * (first_group + NUM_GROUPS)), in order, as uint32."""
    groups = first_group + tl.arange(0, NUM_GROUPS)
    zero = groups * 0
    w0, w1, w2, w3 = tl.philox(seed, groups, zero + position.to(tl.int32), zero, zero)
    # interleave(a, b) is a0 b0 a1 b1 …, so two levels of it restore 0 1 2 3 within each group.
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def _gumbel_from_words(words):
    """See `random.gumbel_from_words`, of which this is the twin."""
    v = (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v * (1 / 5 + v * (1 / 6))))))
    floor = 2.9802322387695312e-08
    exponential = tl.where(v < 0.0625, series, -tl.log(tl.maximum(1 - v, floor)))
    return -tl.log(exponential)


@triton.jit
def _best_of_slice_kernel(
    logits_ptr,
    temperatures_ptr,
    seeds_ptr,
    positions_ptr,
    best_ptr,
    best_id_ptr,
    row_stride,
    vocab_size,
    WITH_NOISE: tl.constexpr,
    SLICE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slice_idx = tl.program_id(1)
    token_ids = slice_idx * SLICE + tl.arange(0, SLICE)
    mask = token_ids < vocab_size
    logits = tl.load(logits_ptr + row * row_stride + token_ids, mask=mask, other=-float("inf"))
    logits = logits.to(tl.float32)
    if WITH_NOISE:
        temperature = tl.load(temperatures_ptr + row)
        if temperature > 0:
            seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
            words = _random_words(seed, position, slice_idx * (SLICE // 4), SLICE // 4)
            logits = logits + temperature * _gumbel_from_words(words)
    # What a comparison makes of NaN depends on the order of the reduction: count them apart.
    is_nan = logits != logits
    best, best_idx = tl.max(tl.where(is_nan, -float("inf"), logits), axis=0, return_indices=True)
    best = tl.where(tl.max(is_nan.to(tl.int32), axis=0) > 0, float("nan"), best)
    out = row * tl.num_programs(1) + slice_idx
    tl.store(best_ptr + out, best)
    tl.store(best_id_ptr + out, slice_idx * SLICE + best_idx)


@triton.jit
def _best_of_row_kernel(
    best_ptr, best_id_ptr, choices_ptr, num_rows, num_slices, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    slices = tl.arange(0, BLOCK)
    best = tl.load(
        best_ptr + row * num_slices + slices, mask=slices < num_slices, other=-float("inf")
    )
    has_nan = tl.max((best != best).to(tl.int32), axis=0) > 0
    best = tl.where(best != best, -float("inf"), best)
    # Slices are in the order of token ids, so the leftmost of equals has the lowest id.
    value, slice_idx = tl.max(best, axis=0, return_indices=True)
    token_id = tl.load(best_id_ptr + row * num_slices + slice_idx)
    is_valid = (value > -float("inf")) & (has_nan == 0)
    tl.store(choices_ptr + row, token_id.to(tl.int64))
    tl.store(choices_ptr + num_rows + row, is_valid.to(tl.int64))


@triton.jit
def _random_words_kernel(seeds_ptr, positions_ptr, out_ptr, vocab_size, SLICE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token_ids = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
    words = _random_words(seed, position, tl.program_id(1) * (SLICE // 4), SLICE // 4)
    out_ptrs = out_ptr + row * vocab_size + token_ids
    tl.store(out_ptrs, words.to(tl.int64), mask=token_ids < vocab_size)


def random_words(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Twin of `random.random_words`, which documents it; lets tests compare bit for bit."""
    words = torch.empty((len(seeds), vocab_size), dtype=torch.int64, device=seeds.device)
    grid = (len(seeds), triton.cdiv(vocab_size, _SLICE))
    _random_words_kernel[grid](seeds, positions, words, vocab_size, SLICE=_SLICE)
    return words


def choose_tokens(
    logits: torch.Tensor,
    temperatures: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Twin of `random.choose_tokens`, which documents it; rows of `logits` may be strided.

    Launches and sizes depend on shapes alone, so a CUDA graph can capture it.
    """
    num_rows, vocab_size = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    num_slices = triton.cdiv(vocab_size, _SLICE)
    best = torch.empty((num_rows, num_slices), dtype=torch.float32, device=logits.device)
    best_ids = torch.empty((num_rows, num_slices), dtype=torch.int32, device=logits.device)
    choices = torch.empty((2, num_rows), dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return choices
    _best_of_slice_kernel[(num_rows, num_slices)](
        logits,
        temperatures,
        seeds,
        positions,
        best,
        best_ids,
        logits.stride(0),
        vocab_size,
        WITH_NOISE=temperatures is not None,
        SLICE=_SLICE,
    )
    block = triton.next_power_of_2(num_slices)
    _best_of_row_kernel[(num_rows,)](best, best_ids, choices, num_rows, num_slices, BLOCK=block)
    return choices
