"""Softmax over keys that come tile by tile: what both attention kernels are built around (Triton).

Scores never reach memory: a program keeps, per query, the largest score so far, the sum of
exponentials and the weighted sum of values, all corrected when the maximum grows (Milakov &
Gimelshein 2018; FlashAttention, Dao et al. 2022). Everything is accumulated in float32, and
exponentials are powers of 2, which the hardware has.
"""

import triton
import triton.language as tl


@triton.jit
def online_softmax(scores, scale, values, acc, row_max, row_sum):
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
