"""Block tables: growth, copy on write, sharing, swapping; exact block ids."""

import pytest

from folovllm.request import Request, SamplingParams
from folovllm.testing.driver import make_requests
from m6_prefix.config import EngineConfig, PreemptionMode
from m6_prefix.kv_cache_manager import BlockCopy, CopyKind, KVCacheManager


def make_manager(num_blocks: int = 6, num_swap_blocks: int = 0) -> KVCacheManager:
    config = EngineConfig(
        max_model_len=16,
        block_size=4,
        preemption_mode=PreemptionMode.SWAP,
        swap_cache_tokens=4 * num_swap_blocks,
    )
    return KVCacheManager(config, num_tokens=4 * num_blocks)


def requests(count: int) -> list[Request]:
    return make_requests([[1] * 6] * count, SamplingParams(max_tokens=4))


def compute(manager: KVCacheManager, request: Request, num_tokens: int) -> list[BlockCopy]:
    copies = manager.allocate_slots(request, num_tokens)
    assert copies is not None
    request.num_computed_tokens += num_tokens
    return copies


def test_table_grows_by_a_block_only_when_the_last_is_full() -> None:
    manager, (request,) = make_manager(), requests(1)
    compute(manager, request, 6)
    assert manager.block_tables == {"r0": [0, 1]}
    compute(manager, request, 2)
    assert manager.block_tables == {"r0": [0, 1]}
    compute(manager, request, 1)
    assert manager.block_tables == {"r0": [0, 1, 2]}
    assert manager.num_reserved_tokens == 12


def test_allocation_is_all_or_nothing() -> None:
    manager, (first, second) = make_manager(num_blocks=3), requests(2)
    compute(manager, first, 6)
    assert manager.allocate_slots(second, 5) is None
    assert manager.block_tables == {"r0": [0, 1]}
    assert manager.pool.num_free_blocks == 1


def test_spare_blocks_stay_free() -> None:
    manager, (request,) = make_manager(num_blocks=3), requests(1)
    assert manager.allocate_slots(request, 6, num_spare_blocks=2) is None
    assert manager.allocate_slots(request, 6, num_spare_blocks=1) == []
    request.num_computed_tokens = 6
    # The table has room for more, but now only one block is free.
    assert manager.allocate_slots(request, 1, num_spare_blocks=2) is None
    assert manager.allocate_slots(request, 1, num_spare_blocks=1) == []


def test_fork_shares_blocks_and_copies_only_what_it_writes() -> None:
    manager, (parent, child) = make_manager(), requests(2)
    compute(manager, parent, 6)
    manager.share(parent, child, 5)
    assert child.num_computed_tokens == 5
    assert manager.block_tables["r1"] == [0, 1]
    assert manager.num_reserved_tokens == 8
    assert compute(manager, child, 1) == [BlockCopy(CopyKind.COPY_ON_WRITE, 1, 2)]
    assert manager.block_tables == {"r0": [0, 1], "r1": [0, 2]}
    assert compute(manager, parent, 1) == []
    assert manager.num_live_tokens([parent, child]) == 4 + 3 + 2


def test_parent_that_writes_a_shared_block_copies_it_too() -> None:
    manager, (parent, child) = make_manager(), requests(2)
    compute(manager, parent, 6)
    manager.share(parent, child, 5)
    assert compute(manager, parent, 1) == [BlockCopy(CopyKind.COPY_ON_WRITE, 1, 2)]
    assert compute(manager, child, 1) == []
    assert manager.block_tables == {"r0": [0, 2], "r1": [0, 1]}


def test_copy_on_write_counts_against_the_free_blocks() -> None:
    manager, (parent, child) = make_manager(num_blocks=2), requests(2)
    compute(manager, parent, 6)
    manager.share(parent, child, 5)
    assert manager.allocate_slots(child, 1) is None
    assert manager.block_tables["r1"] == [0, 1]
    manager.free(parent)
    assert manager.allocate_slots(child, 1) == []


def test_freeing_one_of_two_sharers_keeps_the_blocks() -> None:
    manager, (parent, child) = make_manager(), requests(2)
    compute(manager, parent, 6)
    manager.share(parent, child, 5)
    manager.free(parent)
    assert manager.pool.num_used_blocks == 2
    manager.free(child)
    manager.free(child)
    assert manager.pool.num_used_blocks == 0


def test_swapping_out_and_in_keeps_the_order_of_the_table() -> None:
    manager, (request, other) = make_manager(num_swap_blocks=4), requests(2)
    compute(manager, request, 6)
    assert manager.swap_out(request) == [
        BlockCopy(CopyKind.SWAP_OUT, 0, 0),
        BlockCopy(CopyKind.SWAP_OUT, 1, 1),
    ]
    assert manager.num_reserved_tokens == 0
    compute(manager, other, 6)
    assert manager.swap_in(request, num_spare_blocks=1) == [
        BlockCopy(CopyKind.SWAP_IN, 0, 4),
        BlockCopy(CopyKind.SWAP_IN, 1, 5),
    ]
    assert manager.block_tables == {"r1": [2, 3], "r0": [4, 5]}
    assert manager.swap_pool.num_used_blocks == 0


def test_swap_that_does_not_fit_changes_nothing() -> None:
    manager, (request,) = make_manager(num_blocks=2, num_swap_blocks=1), requests(1)
    compute(manager, request, 6)
    assert manager.swap_out(request) is None
    assert manager.block_tables == {"r0": [0, 1]}
    manager = make_manager(num_blocks=2, num_swap_blocks=2)
    (request,) = requests(1)
    compute(manager, request, 6)
    manager.swap_out(request)
    assert manager.swap_in(request, num_spare_blocks=1) is None
    assert manager.swapped_block_tables == {"r0": [0, 1]}
    manager.free(request)
    assert manager.swap_pool.num_used_blocks == 0


def test_cleared_manager_knows_nobody_and_finds_nothing() -> None:
    manager, (request, twin) = make_manager(), requests(2)
    compute(manager, request, 5)
    manager.publish([request])
    assert manager.num_cached_blocks == {"r0": 1}
    manager.clear()
    assert manager.num_cached_blocks == manager.block_tables == {}
    assert manager.num_free_blocks == 6
    manager.share_cached(twin)
    assert twin.num_computed_tokens == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"swap_cache_tokens": -1}, "swap_cache_tokens must be at least 0, got -1"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"max_num_batched_tokens": 15}, r"max_num_batched_tokens \(15\) must be at least"),
        ({"gpu_memory_utilization": 0.0}, r"gpu_memory_utilization must be in \(0, 1\]"),
    ],
)
def test_option_that_cannot_work_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**{"max_model_len": 16, **options})
