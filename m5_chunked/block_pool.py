"""Fixed-size blocks of KV cache, handed out by id and shared by reference count."""

from collections import deque


class BlockPool:
    """A free list and a reference count per block; every operation is O(1).

    The oldest free block goes first: contents of freed blocks stay readable as long as possible,
    and a use after free shows up late and clearly instead of now and then.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free_block_ids = deque(range(num_blocks))
        self.ref_counts = [0] * num_blocks
        """Block id -> number of block tables that name it."""

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_block_ids)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - len(self.free_block_ids)

    def allocate(self) -> int:
        """Take one free block; its reference count becomes 1."""
        if not self.free_block_ids:
            raise RuntimeError("no free KV cache block; check num_free_blocks before allocate()")
        block_id = self.free_block_ids.popleft()
        self.ref_counts[block_id] = 1
        return block_id

    def share(self, block_id: int) -> None:
        """Add a reference to a block in use."""
        if self.ref_counts[block_id] == 0:
            raise RuntimeError(f"block {block_id} is free and cannot be shared")
        self.ref_counts[block_id] += 1

    def is_shared(self, block_id: int) -> bool:
        return self.ref_counts[block_id] > 1

    def free(self, block_id: int) -> None:
        """Drop one reference; the last one returns the block to the free list."""
        if self.ref_counts[block_id] == 0:
            raise RuntimeError(f"block {block_id} was freed twice")
        self.ref_counts[block_id] -= 1
        if self.ref_counts[block_id] == 0:
            self.free_block_ids.append(block_id)
