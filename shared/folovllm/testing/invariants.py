"""What must hold between the queues of a scheduler and the tables of its KV cache manager."""

from array import array
from collections import Counter
from typing import Any

from ..request import Request, RequestStatus


class Progress:
    """How far a request that holds blocks is between two steps: all but its newest token."""

    def check(self, request: Request) -> None:
        assert request.num_computed_tokens == request.num_tokens - 1

    def check_table(self, request: Request, table_len: int, block_size: int) -> None:
        """table_len: blocks that the request holds."""
        assert table_len == -(-request.num_computed_tokens // block_size)


class ChunkedProgress(Progress):
    """Where prompts are computed in chunks, and a prompt has all its blocks from the start."""

    def check(self, request: Request) -> None:
        assert 0 <= request.num_computed_tokens < request.num_tokens

    def check_table(self, request: Request, table_len: int, block_size: int) -> None:
        fewest = -(-request.num_computed_tokens // block_size)
        most = -(-request.num_tokens // block_size)
        # One token is left: of a prompt, whose block is there, or one that was just sampled.
        is_open = request.num_computed_tokens == request.num_tokens - 1
        assert table_len == most or (is_open and table_len == fewest)


def check_bookkeeping(scheduler: Any, progress: Progress | None = None) -> None:
    """Everybody is in one queue, in order, and holds exactly what belongs to that state."""
    progress = progress or Progress()
    has_preemption = hasattr(scheduler, "swapped")
    swapped = scheduler.swapped if has_preemption else []
    requests = scheduler.requests.values()
    for queue, status in ((scheduler.running, "RUNNING"), (swapped, "SWAPPED")):
        assert not has_preemption or queue == sorted(queue, key=lambda request: request.place)
        assert set(queue) == {r for r in requests if r.status is RequestStatus[status]}
    waiting = [r for r in requests if r.status is RequestStatus.WAITING]
    assert len(scheduler.waiting) == len(waiting)
    assert len(waiting) + len(swapped) + len(scheduler.running) == len(requests)
    if waiting:
        assert scheduler.waiting.first is min(waiting, key=lambda request: request.place)
    assert all(r.num_computed_tokens == 0 for r in waiting)
    for request in (*scheduler.running, *swapped):
        progress.check(request)
    assert len(scheduler.running) <= getattr(scheduler.config, "max_num_seqs", 1)
    manager = scheduler.kv_cache_manager
    if hasattr(manager, "pool"):
        check_blocks(scheduler, progress)
    elif hasattr(manager, "slots"):
        check_slots(scheduler)
    else:
        owners = [request.request_id for request in scheduler.running]
        assert [manager.owner] == (owners or [None])
        live = [request.num_computed_tokens for request in scheduler.running]
        assert manager.num_reserved_tokens == sum(live)


def check_slots(scheduler: Any) -> None:
    """Every slot is free or belongs to one running request."""
    manager = scheduler.kv_cache_manager
    assert manager.slots.keys() == {r.request_id for r in scheduler.running}
    slots = [*manager.slots.values(), *manager.free_slots]
    assert sorted(slots) == list(range(manager.num_tokens // manager.slot_len))


def check_blocks(scheduler: Any, progress: Progress | None = None) -> None:
    """Every block is free, idle, or named by as many tables as its reference count says."""
    progress = progress or Progress()
    manager = scheduler.kv_cache_manager
    for pool, tables in (
        (manager.pool, manager.block_tables),
        (manager.swap_pool, manager.swapped_block_tables),
    ):
        named = Counter(block_id for table in tables.values() for block_id in table)
        free = set(pool.free_block_ids)
        assert len(free) == len(pool.free_block_ids)
        if hasattr(pool, "prefix_cache"):
            assert not free & pool.prefix_cache.nodes.keys(), "a free block is cached"
            free |= pool.prefix_cache.idle.keys()
        assert len(free) == pool.num_free_blocks == pool.num_blocks - pool.num_used_blocks
        assert not free & named.keys(), "a free block is in a table"
        assert len(free) + len(named) == pool.num_blocks
        assert all(pool.ref_counts[block_id] == count for block_id, count in named.items())
        assert all(pool.ref_counts[block_id] == 0 for block_id in free)
    assert manager.block_tables.keys() == {r.request_id for r in scheduler.running}
    assert manager.swapped_block_tables.keys() == {r.request_id for r in scheduler.swapped}
    for queue, tables in (
        (scheduler.running, manager.block_tables),
        (scheduler.swapped, manager.swapped_block_tables),
    ):
        for request in queue:
            table = tables[request.request_id]
            progress.check_table(request, len(table), manager.block_size)
            assert len(set(table)) == len(table)
    assert manager.num_live_tokens(scheduler.running) == count_live_tokens(scheduler)
    if hasattr(manager, "prefix_cache"):
        check_prefix_cache(manager, scheduler.running)


def check_prefix_cache(manager: Any, running: list[Request]) -> None:
    """The trie has the blocks of `nodes` and no others, and gives up ends of prefixes first."""
    cache = manager.prefix_cache
    ages = {block_id: age for age, block_id in enumerate(cache.idle)}
    assert ages.keys() == {b for b in cache.nodes if manager.pool.ref_counts[b] == 0}
    num_nodes, level = 0, [cache.root]
    while level:
        node = level.pop()
        level += node.children.values()
        assert node.sorted_keys == sorted(node.children)
        for key, child in node.children.items():
            assert child.parent is node and child.key == key
            if node is cache.root:
                assert child.block_id < 0 and child.children, "a salt without a prefix"
                continue
            num_nodes += 1
            assert cache.nodes[child.block_id] is child
            assert 0 < len(key) <= 4 * manager.block_size
            assert len(key) == 4 * manager.block_size or not child.children
            if node.block_id in ages:
                assert ages[child.block_id] < ages[node.block_id], "to be evicted before its end"
    assert num_nodes == len(cache.nodes)
    assert manager.num_cached_blocks.keys() <= manager.block_tables.keys()
    for request in running:
        table = manager.block_tables[request.request_id]
        num_cached = manager.num_cached_blocks.get(request.request_id, 0)
        assert num_cached * manager.block_size <= request.num_computed_tokens
        for index, block_id in enumerate(table[:num_cached]):
            node = cache.nodes[block_id]
            assert node.parent.block_id == (table[index - 1] if index else -1)
            tokens = request.token_ids[index * manager.block_size :][: manager.block_size]
            assert list(array("i", node.key)) == tokens, "a block is cached for other tokens"


def count_live_tokens(scheduler: Any) -> int:
    """Tokens in the cache, counted block by block: the long way round."""
    manager = scheduler.kv_cache_manager
    filled: dict[int, int] = {}
    for request in scheduler.running:
        for index, block_id in enumerate(manager.block_tables[request.request_id]):
            num_tokens = request.num_computed_tokens - index * manager.block_size
            filled[block_id] = max(filled.get(block_id, 0), min(num_tokens, manager.block_size))
    return sum(filled.values())
