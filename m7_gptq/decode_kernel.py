"""Attention of single queries over the paged KV cache, read and written in place (Triton).

Bound by memory: the heads of a query that share a key are stacked into one tile, and a context is
split over programs where there are too few to occupy the device (Flash-Decoding, Dao et al. 2023).
"""

import triton
import triton.language as tl

from folovllm.kernels.overlap import let_next_start, wait_for_previous

from .attention_plan import find_request
from .online_softmax import online_softmax


@triton.jit(do_not_specialize=["num_requests"])
def decode_kernel(
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
    request = find_request(split_starts_ptr, num_requests, program)
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
        acc, row_max, row_sum = online_softmax(scores, scale, v, acc, row_max, row_sum)

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
