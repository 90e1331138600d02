"""Free list and reference counts."""

import random

import pytest

from m6_prefix.block_pool import BlockPool
from m6_prefix.prefix_cache import PrefixCache


def make_pool(num_blocks: int) -> BlockPool:
    return BlockPool(num_blocks, PrefixCache(block_size=4))


def test_blocks_are_handed_out_in_order_and_the_longest_free_goes_first() -> None:
    pool = make_pool(3)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2]
    pool.free(1)
    pool.free(0)
    assert [pool.allocate(), pool.allocate()] == [1, 0]


def test_shared_block_returns_with_its_last_reference() -> None:
    pool = make_pool(1)
    block_id = pool.allocate()
    pool.share(block_id)
    assert pool.is_shared(block_id)
    pool.free(block_id)
    assert not pool.is_shared(block_id)
    assert pool.num_free_blocks == 0
    pool.free(block_id)
    assert pool.num_free_blocks == 1


def test_double_free_is_an_error() -> None:
    pool = make_pool(2)
    block_id = pool.allocate()
    pool.free(block_id)
    with pytest.raises(RuntimeError, match="block 0 was freed twice"):
        pool.free(block_id)
    assert pool.num_free_blocks == 2


def test_free_block_cannot_be_shared() -> None:
    with pytest.raises(RuntimeError, match="block 1 is free"):
        make_pool(2).share(1)


def test_empty_pool_says_so() -> None:
    with pytest.raises(RuntimeError, match="no free KV cache block"):
        make_pool(0).allocate()


def test_pool_agrees_with_a_simple_model_under_random_use() -> None:
    rng = random.Random(0)
    pool, counts = make_pool(7), [0] * 7
    for _ in range(3000):
        used = [block_id for block_id, count in enumerate(counts) if count]
        action = rng.choice(["allocate", "share", "free"])
        if action == "allocate" and len(used) < 7:
            block_id = pool.allocate()
            assert counts[block_id] == 0
            counts[block_id] = 1
        elif used:
            block_id = rng.choice(used)
            if action == "share":
                pool.share(block_id)
                counts[block_id] += 1
            else:
                pool.free(block_id)
                counts[block_id] -= 1
        assert pool.ref_counts == counts
        assert pool.num_free_blocks == counts.count(0)
