"""Attention of prompts and chunks over the paged KV cache, read and written in place (Triton).

Bound by arithmetic: large tiles of queries share every key.
"""

import triton
import triton.language as tl

from folovllm.kernels.overlap import let_next_start, wait_for_previous

from .attention_plan import find_request
from .online_softmax import online_softmax


@triton.jit(do_not_specialize=["num_requests"])
def prefill_kernel(
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
    request = find_request(tile_starts_ptr, num_requests, program)
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
        acc, row_max, row_sum = online_softmax(scores, scale, v, acc, row_max, row_sum)
    if num_whole < end:
        keys = num_whole + lanes
        is_cached = keys < end
        slots = block_ids.to(OFFSET_TYPE) * block_stride + keys % BLOCK_SIZE * slot_stride
        mask = is_cached[:, None] & is_dim
        k = tl.load(k_cache_ptr + slots[:, None] + dims[None, :], mask=mask, other=0.0)
        v = tl.load(v_cache_ptr + slots[:, None] + dims[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(is_cached[None, :], scores, -float("inf"))
        acc, row_max, row_sum = online_softmax(scores, scale, v, acc, row_max, row_sum)

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
        acc, row_max, row_sum = online_softmax(scores, scale, v, acc, row_max, row_sum)
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
        acc, row_max, row_sum = online_softmax(scores, scale, v, acc, row_max, row_sum)
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
