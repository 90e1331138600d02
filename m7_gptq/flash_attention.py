"""Attention kernels that read and write the paged KV cache in place (Triton).

Scores never reach memory: a program walks over the keys tile by tile and keeps, per query, the
largest score so far, the sum of exponentials and the weighted sum of values, all corrected when
the maximum grows (online softmax, Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022).
Everything is accumulated in float32, and exponentials are powers of 2, which the hardware has.

Two kernels, because two things limit. A prompt is bound by arithmetic: large tiles of queries
share every key. A single query is bound by memory: its heads that share a key are stacked into
one tile. In both a cached context is split over programs where there are too few to occupy the
device (Flash-Decoding, Dao et al. 2023). Programs are given out by length, once per step, so that
a long context among short ones gets the most. All lengths come from device tensors: the grid
depends on shapes alone, so that one captured launch serves any mix of lengths.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from folovllm.kernels.overlap import let_next_start, overlap_options, wait_for_previous

from .attention import AttentionMetadata
from .kv_cache import KVCache

_LOG2_E = math.log2(math.e)
MAX_SPLITS = 32
"""Most programs that share one query's context."""
_PROGRAMS_PER_MULTIPROCESSOR = 3
"""Among these the keys of single queries are divided; more cost merging."""
_TILES_PER_MULTIPROCESSOR = 2
"""As many tiles of queries have room at a time; with fewer, contexts are split."""
_MIN_SPLIT_TILES = 8
"""Tiles of keys in a part of a prompt's context, at least: a part costs a tile of float32."""
_INTERPRETER_MULTIPROCESSORS = 4
_MAX_STACK = 2
"""Most heads that are stacked in a tile; with 4 a cached context was slower, not faster."""


@triton.jit
def _online_softmax(scores, scale, values, acc, row_max, row_sum):
    """Add a tile of keys to the running state of every query.

    scores: [queries, keys], -inf where a query may not look (but every query has seen a key by the
    end of its first tile); scale: what brings them to units of log 2; values: [keys, dims].
    """
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale)
    correction = tl.exp2(row_max - new_max)
    weights = tl.exp2(scores * scale - new_max[:, None])
    row_sum = row_sum * correction + tl.sum(weights, axis=1)
    acc = acc * correction[:, None]
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit
def _find_request(starts_ptr, num_requests, program):
    """The request that owns a program, by the plan of `start_step`; num_requests: nobody does."""
    num_before = tl.zeros([], dtype=tl.int32)
    for first in range(0, num_requests, 256):
        requests = first + tl.arange(0, 256)
        is_request = requests < num_requests
        ends = tl.load(starts_ptr + 1 + requests, mask=is_request, other=1 << 30)
        num_before += tl.sum((ends <= program).to(tl.int32), axis=0)
    return num_before


@triton.jit(do_not_specialize=["num_requests"])
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    cu_seqlens_ptr,
    seq_lens_ptr,
    block_tables_ptr,
    slot_mapping_ptr,
    q_stride,
    k_stride,
    v_stride,
    block_stride,
    slot_stride,
    table_stride,
    scale,
    tile_starts_ptr,
    part_starts_ptr,
    partial_ptr,
    lse_ptr,
    num_arrived_ptr,
    num_requests,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    STACK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    OFFSET_TYPE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """STACK heads of TILE_Q queries of one request: first its cached keys, then those of this step.

    The heads share their keys: stacked into one tile, TILE_Q * STACK rows long, they load them
    once. Row r is query r // STACK and head r % STACK. Cached keys may be split over programs,
    of which the last takes the keys of this step as well. Requests with a single query are the
    decode kernel's.
    """
    let_next_start(OVERLAP)
    head = tl.program_id(0) * STACK
    kv_head = head // GROUP
    # The last tiles of a prompt see the most keys: started first, they do not end last.
    program = tl.num_programs(1) - 1 - tl.program_id(1)
    request = _find_request(tile_starts_ptr, num_requests, program)
    if request == num_requests:  # more programs than tiles
        wait_for_previous(OVERLAP)
        return
    start = tl.load(cu_seqlens_ptr + request)
    query_len = tl.load(cu_seqlens_ptr + request + 1) - start
    num_cached = tl.load(seq_lens_ptr + request) - query_len
    first_program = tl.load(tile_starts_ptr + request)
    num_programs = tl.load(tile_starts_ptr + request + 1) - first_program
    num_splits, split, begin, end = 1, 0, 0, num_cached
    if MAX_SPLITS > 1:
        num_splits = num_programs // tl.cdiv(query_len, TILE_Q)
        split = (program - first_program) % num_splits
        split_len = tl.cdiv(tl.cdiv(num_cached, num_splits), TILE_K) * TILE_K
        begin = tl.minimum(split * split_len, num_cached)
        end = tl.minimum(begin + split_len, num_cached)
    first_query = (program - first_program) // num_splits * TILE_Q
    is_last = split == num_splits - 1
    num_queries = tl.minimum(query_len - first_query, TILE_Q)
    first_token = (start + first_query).to(tl.int64)
    rows = tl.arange(0, TILE_Q * STACK)
    dims = tl.arange(0, DIM_BLOCK)
    lanes = tl.arange(0, TILE_K)
    is_dim = (dims < HEAD_DIM)[None, :]
    is_row = (rows < num_queries * STACK)[:, None] & is_dim
    k_ptr += start.to(tl.int64) * k_stride + kv_head * HEAD_DIM
    v_ptr += start.to(tl.int64) * v_stride + kv_head * HEAD_DIM
    k_cache_ptr += kv_head * HEAD_DIM
    v_cache_ptr += kv_head * HEAD_DIM
    table_ptr = block_tables_ptr + request.to(tl.int64) * table_stride
    # Read one tile ahead, here and below, so that the loads of keys and values wait for no other.
    keys = begin + lanes
    block_ids = tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < end, other=0)
    wait_for_previous(OVERLAP)

    if is_last and head % GROUP == 0:
        queries = tl.arange(0, TILE_Q)
        is_query = queries < num_queries
        slots = tl.load(slot_mapping_ptr + first_token + queries, mask=is_query, other=-1)
        stored = (slots // BLOCK_SIZE) * block_stride + (slots % BLOCK_SIZE) * slot_stride
        is_stored = (slots >= 0)[:, None] & is_dim
        mask = is_query[:, None] & is_dim
        tokens = first_query + queries
        k = tl.load(k_ptr + (tokens * k_stride)[:, None] + dims[None, :], mask=mask)
        tl.store(k_cache_ptr + stored[:, None] + dims[None, :], k, mask=is_stored)
        v = tl.load(v_ptr + (tokens * v_stride)[:, None] + dims[None, :], mask=mask)
        tl.store(v_cache_ptr + stored[:, None] + dims[None, :], v, mask=is_stored)

    # Offsets from one pointer, here and at the end: whatever a row keeps, it keeps in a register
    # through all loops.
    q_ptr += first_token * q_stride + head * HEAD_DIM
    row_offsets = rows // STACK * q_stride + rows % STACK * HEAD_DIM
    q = tl.load(q_ptr + row_offsets[:, None] + dims[None, :], mask=is_row, other=0.0)
    acc = tl.zeros([TILE_Q * STACK, DIM_BLOCK], dtype=tl.float32)
    row_max = tl.full([TILE_Q * STACK], -float("inf"), dtype=tl.float32)
    row_sum = tl.zeros([TILE_Q * STACK], dtype=tl.float32)

    # Whole tiles of cached keys need no mask; the rest, if there is one, is a tile of its own.
    num_whole = begin + (end - begin) // TILE_K * TILE_K
    for first_key in tl.range(begin, num_whole, TILE_K, num_stages=NUM_STAGES):
        keys = first_key + lanes
        slots = block_ids.to(OFFSET_TYPE) * block_stride + keys % BLOCK_SIZE * slot_stride
        k = tl.load(k_cache_ptr + slots[:, None] + dims[None, :], mask=is_dim, other=0.0)
        v = tl.load(v_cache_ptr + slots[:, None] + dims[None, :], mask=is_dim, other=0.0)
        keys += TILE_K
        block_ids = tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < end, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        acc, row_max, row_sum = _online_softmax(scores, scale, v, acc, row_max, row_sum)
    if num_whole < end:
        keys = num_whole + lanes
        is_cached = keys < end
        slots = block_ids.to(OFFSET_TYPE) * block_stride + keys % BLOCK_SIZE * slot_stride
        mask = is_cached[:, None] & is_dim
        k = tl.load(k_cache_ptr + slots[:, None] + dims[None, :], mask=mask, other=0.0)
        v = tl.load(v_cache_ptr + slots[:, None] + dims[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(is_cached[None, :], scores, -float("inf"))
        acc, row_max, row_sum = _online_softmax(scores, scale, v, acc, row_max, row_sum)

    # Keys of this step come from the packed input, not from the cache: contiguous, and no other
    # program has to have stored them. Before the diagonal every query sees every key.
    num_unmasked = tl.where(is_last, first_query // TILE_K * TILE_K, 0)
    end = tl.where(is_last, first_query + num_queries, 0)
    key_offsets = (lanes * k_stride)[:, None] + dims[None, :]
    value_offsets = (lanes * v_stride)[:, None] + dims[None, :]
    for _ in tl.range(0, num_unmasked, TILE_K, num_stages=NUM_STAGES):
        k = tl.load(k_ptr + key_offsets, mask=is_dim, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        v = tl.load(v_ptr + value_offsets, mask=is_dim, other=0.0)
        acc, row_max, row_sum = _online_softmax(scores, scale, v, acc, row_max, row_sum)
        k_ptr += TILE_K * k_stride
        v_ptr += TILE_K * v_stride
    for first_key in tl.range(num_unmasked, end, TILE_K, num_stages=NUM_STAGES):
        keys = first_key + lanes
        mask = (keys < end)[:, None] & is_dim
        k = tl.load(k_ptr + key_offsets, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        is_visible = keys[None, :] <= (first_query + rows // STACK)[:, None]
        scores = tl.where(is_visible, scores, -float("inf"))
        v = tl.load(v_ptr + value_offsets, mask=mask, other=0.0)
        acc, row_max, row_sum = _online_softmax(scores, scale, v, acc, row_max, row_sum)
        k_ptr += TILE_K * k_stride
        v_ptr += TILE_K * v_stride

    # A part without keys weighs nothing.
    acc = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
    out_ptr += (first_token * NUM_HEADS + head) * HEAD_DIM
    row_offsets = (rows // STACK * NUM_HEADS + rows % STACK) * HEAD_DIM
    out_ptrs = out_ptr + row_offsets[:, None] + dims[None, :]
    if MAX_SPLITS == 1 or num_splits == 1:
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=is_row)
    else:  # meet as the programs of the decode kernel do
        first_part = tl.load(part_starts_ptr + request) + program - first_program - split
        partial_rows = tl.arange(0, TILE_Q * STACK)[:, None] * HEAD_DIM + dims[None, :]
        part = (first_part + split) * tl.num_programs(0) + tl.program_id(0)
        lse = row_max + tl.log2(row_sum)
        tl.store(lse_ptr + part * (TILE_Q * STACK) + rows, lse)
        part_ptr = partial_ptr + part.to(tl.int64) * (TILE_Q * STACK * HEAD_DIM)
        tl.store(part_ptr + partial_rows, acc, mask=is_dim)
        tl.debug_barrier()
        meeting_ptr = num_arrived_ptr + first_part * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(meeting_ptr, 1, sem="acq_rel") == num_splits - 1:
            tl.store(meeting_ptr, 0)
            acc = tl.zeros([TILE_Q * STACK, DIM_BLOCK], dtype=tl.float32)
            row_max = tl.full([TILE_Q * STACK], -float("inf"), dtype=tl.float32)
            row_sum = tl.zeros([TILE_Q * STACK], dtype=tl.float32)
            # From the last part on, which has a key for every query.
            for back in range(num_splits):
                part = (first_part + num_splits - 1 - back) * tl.num_programs(0) + tl.program_id(0)
                lse = tl.load(lse_ptr + part * (TILE_Q * STACK) + rows, cache_modifier=".cg")
                part_ptr = partial_ptr + part.to(tl.int64) * (TILE_Q * STACK * HEAD_DIM)
                values = tl.load(
                    part_ptr + partial_rows, mask=is_dim, other=0.0, cache_modifier=".cg"
                )
                new_max = tl.maximum(row_max, lse)
                correction, weights = tl.exp2(row_max - new_max), tl.exp2(lse - new_max)
                acc = acc * correction[:, None] + values * weights[:, None]
                row_sum = row_sum * correction + weights
                row_max = new_max
            acc = acc / row_sum[:, None]
            tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=is_row)


@triton.jit(do_not_specialize=["num_requests"])
def _plan_kernel(
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


@triton.jit(do_not_specialize=["num_requests"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    cu_seqlens_ptr,
    seq_lens_ptr,
    block_tables_ptr,
    slot_mapping_ptr,
    q_stride,
    k_stride,
    v_stride,
    block_stride,
    slot_stride,
    table_stride,
    scale,
    split_starts_ptr,
    partial_ptr,
    lse_ptr,
    num_arrived_ptr,
    num_requests,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_K: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """All query heads of one key/value head of a request's single query, over part of its keys."""
    let_next_start(OVERLAP)
    kv_head, program = tl.program_id(0), tl.program_id(1)
    request = _find_request(split_starts_ptr, num_requests, program)
    if request == num_requests:  # more programs than parts
        wait_for_previous(OVERLAP)
        return
    first_program = tl.load(split_starts_ptr + request)
    num_programs = tl.load(split_starts_ptr + request + 1) - first_program
    split = program - first_program
    token = tl.load(cu_seqlens_ptr + request)
    num_cached = tl.load(seq_lens_ptr + request) - 1
    split_len = tl.maximum(tl.cdiv(tl.cdiv(num_cached, num_programs), TILE_K), 1) * TILE_K
    num_splits = tl.maximum(tl.cdiv(num_cached, split_len), 1)
    if split >= num_splits:  # whole tiles need fewer programs than there are
        wait_for_previous(OVERLAP)
        return
    heads = tl.arange(0, GROUP_BLOCK)
    dims = tl.arange(0, DIM_BLOCK)
    is_dim = dims < HEAD_DIM
    is_head = (heads < GROUP)[:, None] & is_dim[None, :]
    head_rows = (kv_head * GROUP + heads)[:, None] * HEAD_DIM + dims[None, :]
    wait_for_previous(OVERLAP)
    q = tl.load(q_ptr + token.to(tl.int64) * q_stride + head_rows, mask=is_head, other=0.0)
    k_cache_ptr += kv_head * HEAD_DIM
    v_cache_ptr += kv_head * HEAD_DIM

    row_max = tl.full([GROUP_BLOCK], -float("inf"), dtype=tl.float32)
    row_sum = tl.zeros([GROUP_BLOCK], dtype=tl.float32)
    acc = tl.zeros([GROUP_BLOCK, DIM_BLOCK], dtype=tl.float32)
    if split == num_splits - 1:  # the new token: attended to from registers, and stored
        new = kv_head * HEAD_DIM + dims
        k = tl.load(k_ptr + token.to(tl.int64) * k_stride + new, mask=is_dim, other=0.0)
        v = tl.load(v_ptr + token.to(tl.int64) * v_stride + new, mask=is_dim, other=0.0)
        slot = tl.load(slot_mapping_ptr + token)
        stored = (slot // BLOCK_SIZE) * block_stride + (slot % BLOCK_SIZE) * slot_stride + dims
        if slot >= 0:
            tl.store(k_cache_ptr + stored, k, mask=is_dim)
            tl.store(v_cache_ptr + stored, v, mask=is_dim)
        row_max = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1) * scale
        row_sum += 1.0
        acc += v.to(tl.float32)[None, :]

    table_ptr = block_tables_ptr + request.to(tl.int64) * table_stride
    begin = split * split_len
    end = tl.minimum(begin + split_len, num_cached)
    keys = begin + tl.arange(0, TILE_K)
    # Read one tile ahead, here and below, so that the loads of keys and values wait for no other.
    # The first of them could be loaded before the wait, but then the compiler takes fewer
    # registers and the loop is slower (docs/dev/milestone_4.md).
    block_ids = tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < end, other=0)
    for first_key in tl.range(begin, end, TILE_K, num_stages=NUM_STAGES):
        keys = first_key + tl.arange(0, TILE_K)
        is_visible = keys < end
        offsets = block_ids.to(tl.int64) * block_stride + (keys % BLOCK_SIZE) * slot_stride
        mask = is_visible[:, None] & is_dim[None, :]
        k = tl.load(k_cache_ptr + offsets[:, None] + dims[None, :], mask=mask, other=0.0)
        v = tl.load(v_cache_ptr + offsets[:, None] + dims[None, :], mask=mask, other=0.0)
        next_keys = keys + TILE_K
        block_ids = tl.load(table_ptr + next_keys // BLOCK_SIZE, mask=next_keys < end, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(is_visible[None, :], scores, -float("inf"))
        acc, row_max, row_sum = _online_softmax(scores, scale, v, acc, row_max, row_sum)

    out_ptr += token.to(tl.int64) * (NUM_KV_HEADS * GROUP * HEAD_DIM)
    acc = acc / row_sum[:, None]
    if num_splits == 1:
        tl.store(out_ptr + head_rows, acc.to(out_ptr.dtype.element_ty), mask=is_head)
    else:
        pair = request * NUM_KV_HEADS + kv_head
        part = program * NUM_KV_HEADS + kv_head
        lse = row_max + tl.log2(row_sum)
        tl.store(lse_ptr + part * GROUP + heads, lse, mask=heads < GROUP)
        rows = (part.to(tl.int64) * GROUP + heads)[:, None] * HEAD_DIM
        tl.store(partial_ptr + rows + dims[None, :], acc, mask=is_head)
        # Whoever comes last finds all parts in memory and merges them: no second launch. The
        # barrier puts every thread's stores before the release of the one that counts.
        tl.debug_barrier()
        num_arrived = tl.atomic_add(num_arrived_ptr + pair, 1, sem="acq_rel")
        if num_arrived == num_splits - 1:
            tl.store(num_arrived_ptr + pair, 0)
            splits = tl.arange(0, MAX_SPLITS)
            is_split = splits < num_splits
            first_parts = (first_program + splits) * NUM_KV_HEADS + kv_head
            for head in tl.static_range(GROUP):
                parts = first_parts.to(tl.int64) * GROUP + head
                lses = tl.load(
                    lse_ptr + parts, mask=is_split, other=-float("inf"), cache_modifier=".cg"
                )
                weights = tl.exp2(lses - tl.max(lses, axis=0))
                values = tl.load(
                    partial_ptr + parts[:, None] * HEAD_DIM + dims[None, :],
                    mask=is_split[:, None] & is_dim[None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
                merged = tl.sum(values * weights[:, None], axis=0) / tl.sum(weights, axis=0)
                out_row = out_ptr + (kv_head * GROUP + head) * HEAD_DIM + dims
                tl.store(out_row, merged.to(out_ptr.dtype.element_ty), mask=is_dim)


class _Tiles(NamedTuple):
    """How a kernel cuts its work; chosen by measuring on an H200."""

    rows: int
    """Queries times the heads that are stacked."""
    keys: int
    num_warps: int
    num_stages: int
    """Tiles of keys and values on their way from memory while one is computed, plus that one."""
    max_registers: int | None = None
    """Of a thread; None leaves it to the compiler."""
    max_splits: int = MAX_SPLITS
    """Most programs that share a tile's context."""


def _prefill_tiles(dim_block: int, dtype: torch.dtype) -> tuple[_Tiles, _Tiles]:
    """For steps that have not enough rows to fill the device with large tiles, and for others.

    Large tiles read every key half as often. With 128 registers a thread two of them fit on a
    multiprocessor and one computes weights while the other multiplies (docs/dev/milestone_4.md).
    """
    if dtype == torch.float32:  # for comparisons, not for speed: no tensor core computes it
        tiles = _Tiles(rows=16, keys=32, num_warps=4, num_stages=1)
        return tiles, tiles
    if dim_block > 128:
        tiles = _Tiles(rows=64, keys=32, num_warps=4, num_stages=3)
        return tiles, tiles
    return (
        _Tiles(rows=64, keys=64, num_warps=4, num_stages=3),
        # Chosen where they fill the device: no context is split, and no register is lost to it.
        _Tiles(rows=128, keys=64, num_warps=8, num_stages=2, max_registers=128, max_splits=1),
    )


def _decode_tiles(dim_block: int, group_block: int, dtype: torch.dtype) -> _Tiles:
    if dtype == torch.float32:
        return _Tiles(rows=group_block, keys=32, num_warps=4, num_stages=1)
    keys = 64 if dim_block <= 128 else 32
    return _Tiles(rows=group_block, keys=keys, num_warps=4, num_stages=2)


class TritonAttention:
    """The two kernels over one model's cache; `Attention` has the contract."""

    def __init__(self, kv_cache: KVCache, num_heads: int, max_num_requests: int) -> None:
        self.kv_cache = kv_cache
        _, _, self.block_size, self.num_kv_heads, self.head_dim = kv_cache.keys.shape
        self.num_heads, self.group = num_heads, num_heads // self.num_kv_heads
        self.dim_block = max(16, triton.next_power_of_2(self.head_dim))
        group_block = max(16, triton.next_power_of_2(self.group))  # a matrix unit's least rows
        self.scale = self.head_dim**-0.5 * _LOG2_E
        device, dtype = kv_cache.keys.device, kv_cache.keys.dtype
        self.constants = {
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "DIM_BLOCK": self.dim_block,
            "BLOCK_SIZE": self.block_size,
            **overlap_options(device),
        }
        self.small_tiles, self.large_tiles = _prefill_tiles(self.dim_block, dtype)
        # As many of a group's heads as divide it and are a power of 2: rows of a tile are one.
        self.stack = min(self.group & -self.group, _MAX_STACK)
        # Slots of a cache of less than 2^31 elements, the usual case, take half the registers.
        is_small = kv_cache.keys[0].numel() < 1 << 31
        self.offset_type = tl.int32 if is_small else tl.int64
        self.decode_tiles = _decode_tiles(self.dim_block, group_block, dtype)
        self.num_programs = _PROGRAMS_PER_MULTIPROCESSOR * (
            torch.cuda.get_device_properties(device).multi_processor_count
            if device.type == "cuda"
            else _INTERPRETER_MULTIPROCESSORS
        )
        self.programs_per_head = -(-self.num_programs // self.num_kv_heads)
        self.num_head_tiles = num_heads // self.stack
        num_tiles = self.num_programs // _PROGRAMS_PER_MULTIPROCESSOR * _TILES_PER_MULTIPROCESSOR
        self.tiles_per_head = -(-num_tiles // self.num_head_tiles)
        # Programs that share a context meet here; fixed addresses, so that a graph can hold them.
        starts = torch.zeros((3, max_num_requests + 1), dtype=torch.int32, device=device)
        self.split_starts, self.tile_starts, self.part_starts = starts
        num_parts = (self.programs_per_head + max_num_requests) * self.num_kv_heads
        num_tile_parts = self.tiles_per_head * self.num_head_tiles
        num_rows = max(num_parts * self.group, num_tile_parts * self.large_tiles.rows)
        self.partial = torch.empty((num_rows, self.head_dim), dtype=torch.float32, device=device)
        self.lse = torch.empty(num_rows, dtype=torch.float32, device=device)
        num_pairs = max(max_num_requests * self.num_kv_heads, num_tile_parts)
        self.num_arrived = torch.zeros(num_pairs, dtype=torch.int32, device=device)

    def start_step(self, metadata: AttentionMetadata) -> None:
        """Give programs to requests, of each head or the heads that are stacked.

        Request r gets programs [split_starts[r], split_starts[r + 1]) of the decode kernel, or
        [tile_starts[r], tile_starts[r + 1]) of the prefill kernel: its tiles, each as often as its
        context is split. part_starts[r] are the parts before it (all int32). A launch per step;
        the model begins with others that take no part in overlap, so that every layer may read it
        before it waits.
        """
        tiles = self._prefill_tiles_of(metadata, len(metadata.slot_mapping))
        _plan_kernel[(1,)](
            metadata.cu_seqlens_q,
            metadata.seq_lens,
            self.split_starts,
            self.tile_starts,
            self.part_starts,
            len(metadata.seq_lens),
            NUM_PROGRAMS=self.programs_per_head,
            TILE_K=self.decode_tiles.keys,
            NUM_TILES=self.tiles_per_head,
            TILE_Q=tiles.rows // self.stack,
            MIN_SPLIT=_MIN_SPLIT_TILES * tiles.keys,
            MAX_TILE_SPLITS=tiles.max_splits,
            MAX_SPLITS=MAX_SPLITS,
        )

    def _prefill_tiles_of(self, metadata: AttentionMetadata, num_tokens: int) -> _Tiles:
        """Large tiles where there are enough of them to fill the device evenly.

        Programs behind a long context take about the same time, those of prompts do not.
        """
        num_large = self.num_heads * num_tokens // self.large_tiles.rows
        is_even = metadata.max_seq_len > 2 * metadata.max_query_len
        least = self.num_programs // 2 if is_even else 3 * self.num_programs
        return self.large_tiles if num_large >= least else self.small_tiles

    def forward(
        self,
        metadata: AttentionMetadata,
        layer_idx: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        """Launches what the step's query lengths call for: one kernel, or for a mix both.

        Between `start_step` of the same metadata and that of the next.
        """
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        keys, values = self.kv_cache.keys[layer_idx], self.kv_cache.values[layer_idx]
        tables = metadata.block_tables
        tensors = (q, k, v, out, keys, values, metadata.cu_seqlens_q, metadata.seq_lens, tables)
        strides = (q.stride(0), k.stride(0), v.stride(0), *keys.stride()[:2], tables.stride(0))
        arguments = (*tensors, metadata.slot_mapping, *strides, self.scale)
        if metadata.max_query_len > 1:
            self._prefill(metadata, len(q), arguments)
        if metadata.min_query_len == 1:
            self._decode(len(metadata.seq_lens), arguments)
        return out

    def _prefill(
        self, metadata: AttentionMetadata, num_tokens: int, arguments: tuple[Any, ...]
    ) -> None:
        tiles, num_requests = self._prefill_tiles_of(metadata, num_tokens), len(metadata.seq_lens)
        tile_q = tiles.rows // self.stack
        # At most one tile per request is not full; parts of contexts come on top.
        num_tiles = num_tokens // tile_q + num_requests + self.tiles_per_head
        _prefill_kernel[(self.num_head_tiles, num_tiles)](
            *arguments,
            self.tile_starts,
            self.part_starts,
            self.partial,
            self.lse,
            self.num_arrived,
            num_requests,
            NUM_HEADS=self.num_heads,
            STACK=self.stack,
            TILE_Q=tile_q,
            TILE_K=tiles.keys,
            MAX_SPLITS=tiles.max_splits,
            OFFSET_TYPE=self.offset_type,
            NUM_STAGES=tiles.num_stages,
            num_warps=tiles.num_warps,
            maxnreg=tiles.max_registers,
            **self.constants,
        )

    def _decode(self, num_requests: int, arguments: tuple[Any, ...]) -> None:
        tiles = self.decode_tiles
        # With a part per request beside the whole ones, what is rounded up has room too.
        _decode_kernel[(self.num_kv_heads, self.programs_per_head + num_requests)](
            *arguments,
            self.split_starts,
            self.partial,
            self.lse,
            self.num_arrived,
            num_requests,
            NUM_KV_HEADS=self.num_kv_heads,
            GROUP_BLOCK=tiles.rows,
            TILE_K=tiles.keys,
            MAX_SPLITS=MAX_SPLITS,
            NUM_STAGES=tiles.num_stages,
            num_warps=tiles.num_warps,
            **self.constants,
        )
