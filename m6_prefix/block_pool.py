"""Fixed-size blocks of KV cache, handed out by id and shared by reference count."""

from collections import deque

from .prefix_cache import PrefixCache


class BlockPool:
    """A free list and a reference count per block; every operation is O(1).

    A cached block that nobody holds is as good as free: it is found again until somebody needs it.
    The oldest free block goes first: contents of freed blocks stay readable as long as possible,
    and a use after free shows up late and clearly instead of now and then.
    """

    def __init__(self, num_blocks: int, prefix_cache: PrefixCache) -> None:
        self.num_blocks = num_blocks
        self.prefix_cache = prefix_cache
        self.free_block_ids = deque(range(num_blocks))
        self.ref_counts = [0] * num_blocks
        """Block id -> number of block tables that name it."""

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_block_ids) + len(self.prefix_cache.idle)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - self.num_free_blocks

    def allocate(self) -> int:
        """Take one free block; its reference count becomes 1."""
        if not self.num_free_blocks:
            raise RuntimeError("no free KV cache block; check num_free_blocks before allocate()")
        if self.free_block_ids:
            block_id = self.free_block_ids.popleft()
        else:
            block_id = self.prefix_cache.evict()
        self.ref_counts[block_id] = 1
        return block_id

    def share(self, *block_ids: int) -> None:
        """Add a reference to each of some blocks in use, or cached."""
        ref_counts = self.ref_counts
        for block_id in block_ids:
            if ref_counts[block_id] == 0:
                self.prefix_cache.acquire(block_id)
            ref_counts[block_id] += 1

    def is_shared(self, block_id: int) -> bool:
        """Whether others may read it, now or later: then nobody may write to it."""
        return self.ref_counts[block_id] > 1 or block_id in self.prefix_cache.nodes

    def free(self, block_id: int) -> None:
        """Drop one reference; the last one returns a block that is not cached to the free list."""
        if self.ref_counts[block_id] == 0:
            raise RuntimeError(f"block {block_id} was freed twice")
        self.ref_counts[block_id] -= 1
        if self.ref_counts[block_id] == 0 and not self.prefix_cache.release(block_id):
            self.free_block_ids.append(block_id)
