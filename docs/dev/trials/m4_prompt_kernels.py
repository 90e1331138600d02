"""Variants of m4_flash's prompt kernel that were tried; m4_prompt_attention.py times them."""

import triton
import triton.language as tl


@triton.jit
def _softmax(scores, scale, acc, row_max, row_sum):
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale)
    correction = tl.exp2(row_max - new_max)
    weights = tl.exp2(scores * scale - new_max[:, None])
    row_sum = row_sum * correction + tl.sum(weights, axis=1)
    acc = acc * correction[:, None]
    return weights, acc, new_max, row_sum


@triton.jit
def _weigh(scores, scale, row_max, row_sum):
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale)
    correction = tl.exp2(row_max - new_max)
    weights = tl.exp2(scores * scale - new_max[:, None])
    row_sum = row_sum * correction + tl.sum(weights, axis=1)
    return weights, correction, new_max, row_sum


@triton.jit
def _take(weights, P16: tl.constexpr):
    if P16:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [weights], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return weights.to(tl.bfloat16)


@triton.jit
def _find_request(cu_seqlens_ptr, num_requests, tile, TILE_Q: tl.constexpr):
    num_before = 0
    for first in range(0, num_requests, 64):
        requests = first + tl.arange(0, 64)
        starts = tl.load(cu_seqlens_ptr + requests, mask=requests < num_requests, other=1 << 30)
        first_tiles = starts // TILE_Q + requests
        num_before += tl.sum((first_tiles <= tile).to(tl.int32), axis=0)
    return num_before - 1


@triton.jit(do_not_specialize=["num_requests"])
def prefill(
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
    num_requests,
    q_stride,
    k_stride,
    v_stride,
    block_stride,
    slot_stride,
    table_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    STACK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    DELAY: tl.constexpr,
    P16: tl.constexpr,
    WHOLE: tl.constexpr,
    I32: tl.constexpr,
    OVERLAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    DIM: tl.constexpr = HEAD_DIM
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0) * STACK
    kv_head = head // GROUP
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    request = _find_request(cu_seqlens_ptr, num_requests, tile, TILE_Q)
    start = tl.load(cu_seqlens_ptr + request)
    query_len = tl.load(cu_seqlens_ptr + request + 1) - start
    first_query = (tile - start // TILE_Q - request) * TILE_Q
    if first_query >= query_len or query_len == 1:
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        return
    rows = tl.arange(0, TILE_Q * STACK)
    queries = first_query + rows // STACK
    heads = head + rows % STACK
    dims = tl.arange(0, DIM)
    is_query = (queries < query_len)[:, None]
    q_rows = (start + queries).to(tl.int64)[:, None]
    k_ptr += start.to(tl.int64) * k_stride + kv_head * HEAD_DIM
    v_ptr += start.to(tl.int64) * v_stride + kv_head * HEAD_DIM
    k_cache_ptr += kv_head * HEAD_DIM
    v_cache_ptr += kv_head * HEAD_DIM
    lanes = tl.arange(0, TILE_K)
    num_cached = tl.load(seq_lens_ptr + request) - query_len
    table_ptr = block_tables_ptr + request.to(tl.int64) * table_stride
    block_ids = tl.load(table_ptr + lanes // BLOCK_SIZE, mask=lanes < num_cached, other=0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()

    if head % GROUP == 0:
        own = first_query + tl.arange(0, TILE_Q)
        is_own = (own < query_len)[:, None]
        slots = tl.load(slot_mapping_ptr + start + own, mask=own < query_len, other=-1)
        stored = (slots // BLOCK_SIZE) * block_stride + (slots % BLOCK_SIZE) * slot_stride
        is_stored = (slots >= 0)[:, None]
        source = own.to(tl.int64)[:, None]
        k = tl.load(k_ptr + source * k_stride + dims[None, :], mask=is_own)
        tl.store(k_cache_ptr + stored[:, None] + dims[None, :], k, mask=is_stored)
        v = tl.load(v_ptr + source * v_stride + dims[None, :], mask=is_own)
        tl.store(v_cache_ptr + stored[:, None] + dims[None, :], v, mask=is_stored)

    q_ptrs = q_ptr + q_rows * q_stride + (heads * HEAD_DIM)[:, None] + dims[None, :]
    q = tl.load(q_ptrs, mask=is_query, other=0.0)
    acc = tl.zeros([TILE_Q * STACK, DIM], dtype=tl.float32)
    row_max = tl.full([TILE_Q * STACK], -float("inf"), dtype=tl.float32)
    row_sum = tl.zeros([TILE_Q * STACK], dtype=tl.float32)

    if WHOLE and DELAY:
        num_whole = num_cached // TILE_K * TILE_K
        if num_whole > 0:
            weights = tl.zeros([TILE_Q * STACK, TILE_K], dtype=tl.bfloat16 if P16 else tl.float32)
            correction = tl.full([TILE_Q * STACK], 1.0, dtype=tl.float32)
            value_offsets = block_ids * block_stride + (lanes % BLOCK_SIZE) * slot_stride
            for first_key in tl.range(0, num_whole, TILE_K, num_stages=STAGES):
                keys = first_key + lanes
                offsets = block_ids * block_stride + (keys % BLOCK_SIZE) * slot_stride
                k = tl.load(k_cache_ptr + offsets[:, None] + dims[None, :])
                v = tl.load(v_cache_ptr + value_offsets[:, None] + dims[None, :])
                value_offsets = offsets
                next_keys = keys + TILE_K
                block_ids = tl.load(
                    table_ptr + next_keys // BLOCK_SIZE, mask=next_keys < num_cached, other=0
                )
                scores = tl.dot(q, tl.trans(k))
                acc = acc * correction[:, None]
                acc = tl.dot(_take(weights, P16), v, acc)
                weights, correction, row_max, row_sum = _weigh(scores, scale, row_max, row_sum)
                if P16:
                    weights = weights.to(tl.bfloat16)
            v = tl.load(v_cache_ptr + value_offsets[:, None] + dims[None, :])
            acc = tl.dot(_take(weights, P16), v, acc * correction[:, None])
    elif WHOLE:
        num_whole = num_cached // TILE_K * TILE_K
        for first_key in tl.range(0, num_whole, TILE_K, num_stages=STAGES):
            keys = first_key + lanes
            if I32:
                offsets = block_ids * block_stride + (keys % BLOCK_SIZE) * slot_stride
            else:
                offsets = block_ids.to(tl.int64) * block_stride + (keys % BLOCK_SIZE) * slot_stride
            k = tl.load(k_cache_ptr + offsets[:, None] + dims[None, :])
            v = tl.load(v_cache_ptr + offsets[:, None] + dims[None, :])
            next_keys = keys + TILE_K
            block_ids = tl.load(
                table_ptr + next_keys // BLOCK_SIZE, mask=next_keys < num_cached, other=0
            )
            scores = tl.dot(q, tl.trans(k))
            weights, acc, row_max, row_sum = _softmax(scores, scale, acc, row_max, row_sum)
            acc = tl.dot(weights.to(v.dtype), v, acc)
    else:
        num_whole = 0
    for first_key in tl.range(num_whole, num_cached, TILE_K, num_stages=1 if WHOLE else STAGES):
        keys = first_key + lanes
        is_visible = keys < num_cached
        offsets = block_ids.to(tl.int64) * block_stride + (keys % BLOCK_SIZE) * slot_stride
        mask = is_visible[:, None]
        k = tl.load(k_cache_ptr + offsets[:, None] + dims[None, :], mask=mask, other=0.0)
        v = tl.load(v_cache_ptr + offsets[:, None] + dims[None, :], mask=mask, other=0.0)
        next_keys = keys + TILE_K
        block_ids = tl.load(
            table_ptr + next_keys // BLOCK_SIZE, mask=next_keys < num_cached, other=0
        )
        scores = tl.dot(q, tl.trans(k))
        scores = tl.where(is_visible[None, :], scores, -float("inf"))
        weights, acc, row_max, row_sum = _softmax(scores, scale, acc, row_max, row_sum)
        acc = tl.dot(weights.to(v.dtype), v, acc)

    num_unmasked = first_query // TILE_K * TILE_K
    key_offsets = lanes[:, None] * k_stride + dims[None, :]
    value_offsets = lanes[:, None] * v_stride + dims[None, :]
    if DELAY:
        if num_unmasked > 0:
            weights = tl.zeros([TILE_Q * STACK, TILE_K], dtype=tl.bfloat16 if P16 else tl.float32)
            correction = tl.full([TILE_Q * STACK], 1.0, dtype=tl.float32)
            for first_key in tl.range(0, num_unmasked, TILE_K, num_stages=STAGES):
                k = tl.load(k_ptr + key_offsets)
                k_ptr += TILE_K * k_stride
                v = tl.load(v_ptr + value_offsets)
                v_ptr += tl.minimum(first_key, TILE_K) * v_stride
                scores = tl.dot(q, tl.trans(k))
                acc = acc * correction[:, None]
                acc = tl.dot(_take(weights, P16), v, acc)
                weights, correction, row_max, row_sum = _weigh(scores, scale, row_max, row_sum)
                if P16:
                    weights = weights.to(tl.bfloat16)
            v = tl.load(v_ptr + value_offsets)
            acc = tl.dot(_take(weights, P16), v, acc * correction[:, None])
            v_ptr += TILE_K * v_stride
    else:
        for _ in tl.range(0, num_unmasked, TILE_K, num_stages=STAGES):
            k = tl.load(k_ptr + key_offsets)
            scores = tl.dot(q, tl.trans(k))
            v = tl.load(v_ptr + value_offsets)
            weights, acc, row_max, row_sum = _softmax(scores, scale, acc, row_max, row_sum)
            acc = tl.dot(weights.to(v.dtype), v, acc)
            k_ptr += TILE_K * k_stride
            v_ptr += TILE_K * v_stride
    for first_key in tl.range(
        num_unmasked, tl.minimum(first_query + TILE_Q, query_len), TILE_K, num_stages=STAGES
    ):
        keys = first_key + lanes
        mask = (keys < query_len)[:, None]
        k = tl.load(k_ptr + key_offsets, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k))
        is_visible = (keys[None, :] <= queries[:, None]) & (keys < query_len)[None, :]
        scores = tl.where(is_visible, scores, -float("inf"))
        v = tl.load(v_ptr + value_offsets, mask=mask, other=0.0)
        weights, acc, row_max, row_sum = _softmax(scores, scale, acc, row_max, row_sum)
        acc = tl.dot(weights.to(v.dtype), v, acc)
        k_ptr += TILE_K * k_stride
        v_ptr += TILE_K * v_stride

    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    out_ptrs = out_ptr + (q_rows * NUM_HEADS + heads[:, None]) * HEAD_DIM + dims[None, :]
    tl.store(out_ptrs, out, mask=is_query)
