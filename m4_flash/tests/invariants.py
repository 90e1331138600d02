"""What must hold in M3 after every step."""

from collections import Counter

from m4_flash.engine import LLMEngine


def check_blocks(engine: LLMEngine) -> None:
    """Every block is free or named by as many tables as its reference count says."""
    manager, scheduler = engine.kv_cache_manager, engine.scheduler
    for pool, tables in (
        (manager.pool, manager.block_tables),
        (manager.swap_pool, manager.swapped_block_tables),
    ):
        named = Counter(block_id for table in tables.values() for block_id in table)
        free = set(pool.free_block_ids)
        assert len(free) == pool.num_free_blocks
        assert not free & named.keys(), "a free block is in a table"
        assert len(free) + len(named) == pool.num_blocks
        assert all(pool.ref_counts[block_id] == count for block_id, count in named.items())
        assert all(pool.ref_counts[block_id] == 0 for block_id in free)
    assert manager.block_tables.keys() == {r.request_id for r in scheduler.running}
    assert manager.swapped_block_tables.keys() == {r.request_id for r in scheduler.swapped}
    for request in scheduler.running:
        table = manager.block_tables[request.request_id]
        assert len(table) == -(-request.num_computed_tokens // manager.block_size)
        assert len(set(table)) == len(table)
    assert manager.num_live_tokens(scheduler.running) == count_live_tokens(engine)
    places = [scheduler.order[r.request_id] for r in scheduler.running]
    assert places == sorted(places)


def count_live_tokens(engine: LLMEngine) -> int:
    """Tokens in the cache, counted block by block: the long way round."""
    manager = engine.kv_cache_manager
    filled: dict[int, int] = {}
    for request in engine.scheduler.running:
        for index, block_id in enumerate(manager.block_tables[request.request_id]):
            num_tokens = request.num_computed_tokens - index * manager.block_size
            filled[block_id] = max(filled.get(block_id, 0), min(num_tokens, manager.block_size))
    return sum(filled.values())
