"""Which programs work for which request, given out by length once per step (Triton)."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_requests"])
def plan_kernel(
    cu_seqlens_ptr,
    seq_lens_ptr,
    split_starts_ptr,
    tile_starts_ptr,
    part_starts_ptr,
    num_requests,
    NUM_PROGRAMS: tl.constexpr,
    TILE_K: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILE_Q: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_TILE_SPLITS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Write which programs of a head each request gets, in both kernels; see `start_step`.

    NUM_PROGRAMS are divided among single queries by their keys, NUM_TILES among the tiles of all
    others, rounded down; but one at least, and none with less than a TILE_K or MIN_SPLIT of keys.
    """
    num_keys, num_tile_keys = tl.zeros([], dtype=tl.int64), tl.zeros([], dtype=tl.int64)
    for first in range(0, num_requests, 128):
        requests = first + tl.arange(0, 128)
        query_len, keys = _lengths(cu_seqlens_ptr, seq_lens_ptr, requests, num_requests)
        num_keys += tl.sum(tl.where(query_len == 1, keys, 0), axis=0)
        tiles = tl.where(query_len > 1, tl.cdiv(query_len, TILE_Q), 0)
        num_tile_keys += tl.sum(keys * tiles, axis=0)
    split_start, tile_start, part_start = 0, 0, 0
    for first in range(0, num_requests, 128):
        requests = first + tl.arange(0, 128)
        is_request = requests < num_requests
        query_len, keys = _lengths(cu_seqlens_ptr, seq_lens_ptr, requests, num_requests)
        splits = tl.minimum(keys * NUM_PROGRAMS // tl.maximum(num_keys, 1), tl.cdiv(keys, TILE_K))
        splits = tl.minimum(tl.maximum(splits, 1), MAX_SPLITS).to(tl.int32)
        splits = tl.where(query_len == 1, splits, 0)
        tl.store(split_starts_ptr + 1 + requests, split_start + tl.cumsum(splits), mask=is_request)
        split_start += tl.sum(splits, axis=0)
        splits = tl.minimum(keys * NUM_TILES // tl.maximum(num_tile_keys, 1), keys // MIN_SPLIT)
        splits = tl.minimum(tl.maximum(splits, 1), MAX_TILE_SPLITS).to(tl.int32)
        tiles = tl.where(query_len > 1, tl.cdiv(query_len, TILE_Q) * splits, 0).to(tl.int32)
        tl.store(tile_starts_ptr + 1 + requests, tile_start + tl.cumsum(tiles), mask=is_request)
        tile_start += tl.sum(tiles, axis=0)
        parts = tl.where(splits > 1, tiles, 0)
        starts = part_start + tl.cumsum(parts) - parts
        tl.store(part_starts_ptr + requests, starts, mask=is_request)
        part_start += tl.sum(parts, axis=0)


@triton.jit
def _lengths(cu_seqlens_ptr, seq_lens_ptr, requests, num_requests):
    """Queries, and keys in the cache (int64), of some requests; 0 and 0 of those that only pad."""
    is_request = requests < num_requests
    start = tl.load(cu_seqlens_ptr + requests, mask=is_request, other=0)
    end = tl.load(cu_seqlens_ptr + requests + 1, mask=is_request, other=0)
    seq_len = tl.load(seq_lens_ptr + requests, mask=is_request, other=0)
    query_len = tl.where(seq_len > 0, end - start, 0)
    return query_len, (seq_len - query_len).to(tl.int64)


@triton.jit
def find_request(starts_ptr, num_requests, program):
    """The request that owns a program, by the plan of `start_step`; num_requests: nobody does."""
    num_before = tl.zeros([], dtype=tl.int32)
    for first in range(0, num_requests, 256):
        requests = first + tl.arange(0, 256)
        is_request = requests < num_requests
        ends = tl.load(starts_ptr + 1 + requests, mask=is_request, other=1 << 30)
        num_before += tl.sum((ends <= program).to(tl.int32), axis=0)
    return num_before
