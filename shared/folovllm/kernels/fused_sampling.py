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
    num_tokens,
    first_group,
    WITH_NOISE: tl.constexpr,
    SLICE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slice_idx = tl.program_id(1)
    columns = slice_idx * SLICE + tl.arange(0, SLICE)
    mask = columns < num_tokens
    logits = tl.load(logits_ptr + row * row_stride + columns, mask=mask, other=-float("inf"))
    logits = logits.to(tl.float32)
    if WITH_NOISE:
        temperature = tl.load(temperatures_ptr + row)
        if temperature > 0:
            seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
            group = first_group + slice_idx * (SLICE // 4)
            words = _random_words(seed, position, group, SLICE // 4)
            logits = logits + temperature * _gumbel_from_words(words)
    # What a comparison makes of NaN depends on the order of the reduction: count them apart.
    is_nan = logits != logits
    best, best_idx = tl.max(tl.where(is_nan, -float("inf"), logits), axis=0, return_indices=True)
    best = tl.where(tl.max(is_nan.to(tl.int32), axis=0) > 0, float("nan"), best)
    out = row * tl.num_programs(1) + slice_idx
    tl.store(best_ptr + out, best)
    tl.store(best_id_ptr + out, slice_idx * SLICE + best_idx)


@triton.jit
def _best_of_row(best_ptr, best_id_ptr, row, num_slices, BLOCK: tl.constexpr):
    """The largest of a row's slices, the first column that has it, and whether there is a NaN."""
    slices = tl.arange(0, BLOCK)
    best = tl.load(
        best_ptr + row * num_slices + slices, mask=slices < num_slices, other=-float("inf")
    )
    has_nan = tl.max((best != best).to(tl.int32), axis=0) > 0
    best = tl.where(best != best, -float("inf"), best)
    # Slices are in the order of token ids, so the leftmost of equals has the lowest id.
    value, slice_idx = tl.max(best, axis=0, return_indices=True)
    column = tl.load(best_id_ptr + row * num_slices + slice_idx)
    return value, column.to(tl.int64), has_nan


@triton.jit
def _choice_kernel(best_ptr, best_id_ptr, choices_ptr, num_rows, num_slices, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    value, token_id, has_nan = _best_of_row(best_ptr, best_id_ptr, row, num_slices, BLOCK)
    is_valid = (value > -float("inf")) & (has_nan == 0)
    tl.store(choices_ptr + row, token_id)
    tl.store(choices_ptr + num_rows + row, is_valid.to(tl.int64))


@triton.jit
def _candidate_kernel(
    best_ptr, best_id_ptr, candidates_ptr, first_token, num_slices, BLOCK: tl.constexpr
):
    """See `random.best_candidates` for what a candidate is."""
    row = tl.program_id(0).to(tl.int64)
    value, column, has_nan = _best_of_row(best_ptr, best_id_ptr, row, num_slices, BLOCK)
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    candidate = (score << 32) | (0xFFFFFFFF - (first_token + column))
    tl.store(candidates_ptr + row, tl.where(has_nan, 0x7FFFFFFFFFFFFFFF, candidate))


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
    num_rows = len(logits)
    choices = torch.empty((2, num_rows), dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return choices
    best, columns = _best_of_slices(logits, 0, temperatures, seeds, positions)
    num_slices = best.shape[1]
    block = triton.next_power_of_2(num_slices)
    _choice_kernel[(num_rows,)](best, columns, choices, num_rows, num_slices, BLOCK=block)
    return choices


def best_candidates(
    logits: torch.Tensor,
    first_token: int,
    temperatures: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Twin of `random.best_candidates`; otherwise like `choose_tokens`."""
    num_rows = len(logits)
    candidates = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return candidates
    best, columns = _best_of_slices(logits, first_token, temperatures, seeds, positions)
    num_slices = best.shape[1]
    block = triton.next_power_of_2(num_slices)
    _candidate_kernel[(num_rows,)](best, columns, candidates, first_token, num_slices, BLOCK=block)
    return candidates


def _best_of_slices(
    logits: torch.Tensor,
    first_token: int,
    temperatures: torch.Tensor | None,
    seeds: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_rows, num_slices]: the largest of each slice with its noise, and its column."""
    num_rows, num_tokens = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    num_slices = triton.cdiv(num_tokens, _SLICE)
    best = torch.empty((num_rows, num_slices), dtype=torch.float32, device=logits.device)
    columns = torch.empty((num_rows, num_slices), dtype=torch.int32, device=logits.device)
    _best_of_slice_kernel[(num_rows, num_slices)](
        logits,
        temperatures,
        seeds,
        positions,
        best,
        columns,
        logits.stride(0),
        num_tokens,
        first_token // 4,
        WITH_NOISE=temperatures is not None,
        SLICE=_SLICE,
    )
    return best, columns
