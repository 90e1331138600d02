"""The Triton kernels against plain torch: every mix of lengths, head sizes and block sizes."""

import os
from itertools import accumulate, pairwise

import pytest
import torch

from folovllm.kernels.reference import causal_attention
from m6_prefix.attention import AttentionMetadata

pytest.importorskip("triton")

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1 before start", allow_module_level=True)

from m6_prefix.flash_attention import MAX_SPLITS, TritonAttention  # noqa: E402

DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
# The interpreter computes bf16 wrongly without saying so: there only float32 and float16.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if HAS_CUDA else [])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
EDGE_SHARES = [
    [(0, 1)],
    [(0, 16), (0, 17), (0, 15)],
    [(7, 1), (0, 1), (15, 1), (16, 1), (47, 1), (63, 1), (64, 1)],
    [(3, 5), (16, 16), (0, 33), (31, 1), (1, 2)],
    [(0, 130), (40, 1), (70, 3)],
    [(64, 5), (128, 2), (96, 40)],
]
"""Lists of (tokens in the cache, tokens of this step) per request."""


class FakeCache:
    """The two tensors that attention reads, full of NaN, with blocks handed out at random."""

    def __init__(self, shares, block_size, num_kv_heads, head_dim, dtype, num_layers=2) -> None:
        generator = torch.Generator().manual_seed(0)
        needed = [-(-(cached + new) // block_size) for cached, new in shares]
        shape = (num_layers, sum(needed) + 2, block_size, num_kv_heads, head_dim)
        kv = torch.full((2, *shape), float("nan"), dtype=dtype, device=DEVICE)
        self.keys, self.values = kv
        ids = iter(torch.randperm(shape[1], generator=generator).tolist())
        self.tables = [[next(ids) for _ in range(count)] for count in needed]

    def slot(self, row: int, position: int) -> int:
        block_size = self.keys.shape[2]
        return self.tables[row][position // block_size] * block_size + position % block_size

    def rows(self, tensor: torch.Tensor, row: int, end: int) -> torch.Tensor:
        """Tokens [0, end) of a request in layer 1."""
        slots = [self.slot(row, position) for position in range(end)]
        return tensor[1].flatten(0, 1)[slots]


def metadata_of(shares, cache: FakeCache) -> AttentionMetadata:
    width = max(map(len, cache.tables)) + 1
    query_lens = [new for _, new in shares]
    return AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32, device=DEVICE),
        seq_lens=torch.tensor([c + n for c, n in shares], dtype=torch.int32, device=DEVICE),
        block_tables=torch.tensor(
            # What lies behind the end of a table must not be looked up: ids that do not exist.
            [table + [10**6] * (width - len(table)) for table in cache.tables],
            dtype=torch.int32,
            device=DEVICE,
        ),
        slot_mapping=torch.tensor(
            [cache.slot(row, c + i) for row, (c, n) in enumerate(shares) for i in range(n)],
            device=DEVICE,
        ),
        min_query_len=min(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(c + n for c, n in shares),
    )


def check(shares, num_heads, num_kv_heads, head_dim, block_size, dtype) -> None:
    """One layer of TritonAttention against the reference, stored keys and values included."""
    cache = FakeCache(shares, block_size, num_kv_heads, head_dim, dtype)
    generator = torch.Generator().manual_seed(1)
    histories = []
    for row, (cached, new) in enumerate(shares):
        kv = torch.randn(2, cached + new, num_kv_heads, head_dim, generator=generator)
        kv = kv.to(dtype).to(DEVICE)
        for position in range(cached):
            block_id, offset = divmod(cache.slot(row, position), block_size)
            cache.keys[1, block_id, offset], cache.values[1, block_id, offset] = kv[:, position]
        histories.append(kv)
    untouched = cache.keys[0].clone()
    num_tokens = sum(new for _, new in shares)
    # As in the model: one buffer of heads of q, k and v, so rows are strided.
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=generator)
    qkv = qkv.to(dtype).to(DEVICE)
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    news = [kv[:, cached:] for kv, (cached, _) in zip(histories, shares, strict=True)]
    k.copy_(torch.cat([new[0] for new in news]))
    v.copy_(torch.cat([new[1] for new in news]))
    attention = TritonAttention(cache, num_heads, max_num_requests=len(shares))
    metadata = metadata_of(shares, cache)
    attention.start_step(metadata)
    out = attention.forward(metadata, 1, q, k, v)
    expected = torch.cat(
        [
            causal_attention(part, kv[0], kv[1])
            for part, kv in zip(q.split([n for _, n in shares]), histories, strict=True)
        ]
    )
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for row, ((cached, new), kv) in enumerate(zip(shares, histories, strict=True)):
        assert torch.equal(cache.rows(cache.keys, row, cached + new), kv[0])
        assert torch.equal(cache.rows(cache.values, row, cached + new), kv[1])
    assert torch.equal(cache.keys[0].isnan(), untouched.isnan()), "another layer was written to"
    num_written = sum(cached + new for cached, new in shares) * num_kv_heads * head_dim
    assert cache.keys[1].isfinite().sum() == num_written, "a slot of nobody was written to"


@pytest.mark.no_cover
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shares", EDGE_SHARES)
def test_attention_equals_reference_for_any_mix_of_lengths(shares, dtype) -> None:
    check(shares, num_heads=4, num_kv_heads=2, head_dim=32, block_size=16, dtype=dtype)


@pytest.mark.parametrize("head_dim", [24, 64, 96, 128, 256])
def test_attention_equals_reference_for_every_head_size(head_dim) -> None:
    for dtype in DTYPES:
        check([(5, 3), (20, 1), (0, 19)], 2, 1, head_dim, block_size=16, dtype=dtype)


@pytest.mark.no_cover
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (9, 3), (8, 1), (20, 1)])
def test_attention_equals_reference_for_every_grouping_of_heads(num_heads, num_kv_heads) -> None:
    check([(5, 3), (20, 1), (0, 19)], num_heads, num_kv_heads, 16, 16, torch.float32)


@pytest.mark.no_cover
@pytest.mark.parametrize("block_size", [1, 7, 32, 256])
def test_attention_equals_reference_for_every_block_size(block_size) -> None:
    check([(40, 1), (9, 4), (0, 18), (70, 3)], 4, 2, 16, block_size, torch.float32)


@pytest.mark.no_cover
@pytest.mark.parametrize("context_len", [31, 32, 33, 64, 65, 500])
def test_context_split_over_programs_equals_reference(context_len) -> None:
    """The interpreter's few multiprocessors still give one request as many splits as it takes."""
    for _ in range(2):  # the meeting points are left as they were found
        check([(context_len, 1)], 2, 1, 16, 16, torch.float32)
    check([(context_len, 1), (3, 1)], 2, 1, 16, 16, torch.float32)


@pytest.mark.parametrize(
    "shares",
    [
        [(511, 3)],
        [(512, 3)],
        [(1100, 8)],
        [(1027, 9), (0, 7)],
        [(1030, 2), (300, 1), (700, 4), (0, 40)],
    ],
)
def test_context_of_a_chunk_split_over_programs_equals_reference(shares) -> None:
    check(shares, 2, 1, 16, 16, torch.float32)


def test_large_tiles_split_no_context_and_equal_the_reference() -> None:
    num_queries = 192 if not HAS_CUDA else 128 * 200
    shares = [(2 * num_queries + 5, num_queries), (40, 1)]
    cache = FakeCache([(0, 1)], 16, 2, 16, torch.float16)
    attention = TritonAttention(cache, 4, max_num_requests=2)
    metadata = metadata_of(shares, FakeCache(shares, 16, 2, 16, torch.float16))
    assert attention._prefill_tiles_of(metadata, num_queries) is attention.large_tiles
    if not HAS_CUDA:  # the reference would take all scores of as many queries as fill a GPU
        check(shares, 4, 2, 16, 16, torch.float16)


@pytest.mark.parametrize("shares", [[(300, 1), (2, 1)], [(1100, 2), (300, 1)]])
def test_meeting_points_are_zero_again_after_every_launch(shares) -> None:
    cache = FakeCache(shares, 16, 2, 16, torch.float32)
    cache.keys.normal_()
    cache.values.normal_()
    attention = TritonAttention(cache, 4, max_num_requests=2)
    num_tokens = sum(new for _, new in shares)
    q = torch.randn(num_tokens, 4, 16, device=DEVICE)
    k, v = torch.randn(2, num_tokens, 2, 16, device=DEVICE)
    metadata = metadata_of(shares, cache)
    attention.start_step(metadata)
    outs = [attention.forward(metadata, 1, q, k, v) for _ in range(3)]
    assert not attention.num_arrived.any()
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_padding_rows_store_nothing_and_read_nothing() -> None:
    shares = [(20, 1), (5, 1)]
    cache = FakeCache(shares, 16, 1, 16, torch.float32)
    metadata = metadata_of(shares, cache)
    metadata.seq_lens[1] = 0
    metadata.slot_mapping[1] = -1
    metadata.block_tables[1] = 10**6
    attention = TritonAttention(cache, 2, max_num_requests=2)
    cache.keys[1, cache.tables[0]], cache.values[1, cache.tables[0]] = 1.0, 1.0
    before = cache.keys.clone()
    q = torch.randn(2, 2, 16, device=DEVICE)
    k = v = torch.ones(2, 1, 16, device=DEVICE)
    attention.start_step(metadata)
    out = attention.forward(metadata, 1, q, k, v)
    torch.testing.assert_close(out[0], torch.ones(2, 16, device=DEVICE))
    before[1].flatten(0, 1)[cache.slot(0, 20)] = 1.0
    assert torch.equal(cache.keys.nan_to_num(7), before.nan_to_num(7))


def planned(shares: list[tuple[int, int]]) -> tuple[TritonAttention, list[int], list[int]]:
    """Programs that each request gets of the decode kernel, and of the prefill kernel, per head."""
    attention = TritonAttention(FakeCache([(0, 1)], 16, 2, 16, torch.float32), 4, 300)
    query_lens = [new for _, new in shares]
    metadata = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *accumulate(query_lens)], device=DEVICE).int(),
        seq_lens=torch.tensor([c + n for c, n in shares], device=DEVICE).int(),
        block_tables=torch.zeros(0, device=DEVICE),
        slot_mapping=torch.zeros(sum(query_lens), device=DEVICE),
        min_query_len=1,
        max_query_len=max(query_lens),
        max_seq_len=max(c + n for c, n in shares),
    )
    attention.start_step(metadata)
    starts = attention.split_starts[: len(shares) + 1].tolist()
    tile_starts = attention.tile_starts[: len(shares) + 1].tolist()
    assert starts[0] == tile_starts[0] == 0
    assert starts[-1] <= attention.programs_per_head + len(shares), "the grid has not so many"
    assert starts[-1] * attention.num_kv_heads * attention.group <= len(attention.lse)
    num_tiles = sum(query_lens) // tile_q(attention) + len(shares) + attention.tiles_per_head
    assert tile_starts[-1] <= num_tiles, "the grid has not so many"
    return (
        attention,
        [end - start for start, end in pairwise(starts)],
        [end - start for start, end in pairwise(tile_starts)],
    )


def planned_splits(shares: list[tuple[int, int]]) -> list[int]:
    return planned(shares)[1]


def tile_q(attention: TritonAttention) -> int:
    return attention.small_tiles.rows // attention.stack


def test_programs_are_given_out_by_the_length_of_contexts() -> None:
    attention = TritonAttention(FakeCache([(0, 1)], 16, 2, 16, torch.float32), 4, 1)
    per_head, tile = attention.programs_per_head, attention.decode_tiles.keys
    most = min(per_head, MAX_SPLITS)
    assert planned_splits([(100_000, 1)]) == [most]
    assert planned_splits([(tile, 1)]) == planned_splits([(0, 1)]) == [1]
    assert planned_splits([(tile + 1, 1)]) == [2], "a program per tile at most"
    long, *short = planned_splits([(100_000, 1), *[(100, 1)] * 3])
    assert short == [1] * 3
    assert min(per_head - 1, MAX_SPLITS) == long
    assert planned_splits([(50_000, 1)] * 2) == [min(per_head // 2, MAX_SPLITS)] * 2
    assert planned_splits([(1000, 1)] * (per_head + 1)) == [1] * (per_head + 1)


def test_chunks_and_padding_get_no_program_of_the_decode_kernel() -> None:
    assert planned_splits([(9, 1), (500, 7), (9, 1), (0, 0), (9, 1)]) == [1, 0, 1, 0, 1]
    padding = [(-1, 1)] * 2  # a captured decode step pads with queries of requests without tokens
    assert planned_splits([(9, 1), *padding]) == [1, 0, 0]


def test_contexts_of_chunks_are_split_where_tiles_do_not_fill_the_device() -> None:
    attention, splits, tiles = planned([(100_000, 3)])
    per_head, part = attention.tiles_per_head, 8 * attention.small_tiles.keys
    assert (splits, tiles) == ([0], [min(per_head, MAX_SPLITS)])
    size = tile_q(attention)
    assert planned([(0, 3), (0, size + 1), (50, 1)])[2] == [1, 2, 0]
    assert planned([(2 * part - 1, 3)])[2] == [1], "a part is worth its merging"
    assert planned([(2 * part, 3)])[2] == [2]
    assert planned([(100_000, per_head * size)])[2] == [per_head], "enough tiles: no parts"
    assert planned([(100_000, 3), (0, 3)])[2] == [min(per_head, MAX_SPLITS), 1]
    attention, _, tiles = planned([(100_000, 2), (0, 5), (100_000, 2), (40_000, 2)])
    num_parts = [0 if count == 1 else count for count in tiles]
    assert attention.part_starts[:4].tolist() == [0, *accumulate(num_parts[:3])]
    assert sum(num_parts) <= per_head


def test_plan_of_more_requests_than_a_program_looks_at_in_one_go() -> None:
    lengths = [(i * 37 % 500, 1 if i % 5 else 3) for i in range(300)]
    assert planned_splits(lengths) == [0 if new > 1 else 1 for _, new in lengths]
    assert planned(lengths)[2] == [1 if new > 1 else 0 for _, new in lengths]
    check([(i % 7, 1) for i in range(270)], 2, 1, 16, 16, torch.float32)
