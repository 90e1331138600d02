"""Host-side bookkeeping: where each request's keys and values live."""

from dataclasses import dataclass
from enum import Enum, auto

from folovllm.request import Request

from .block_pool import BlockPool
from .config import EngineConfig


class CopyKind(Enum):
    COPY_ON_WRITE = auto()
    SWAP_OUT = auto()
    SWAP_IN = auto()


@dataclass(frozen=True)
class BlockCopy:
    """Copy one block's keys and values, in every layer, before the forward pass.

    Block ids are of the device, but the destination of SWAP_OUT and the source of SWAP_IN are of
    the host.
    """

    kind: CopyKind
    source: int
    destination: int


class KVCacheManager:
    """Keeps a block table per request that holds keys and values, on the device or swapped.

    Entry i of a table is the block of tokens [i * block_size, (i + 1) * block_size). Tables grow
    a block at a time (PagedAttention, Kwon et al. 2023): at most block_size - 1 places per
    request are reserved and empty.
    """

    def __init__(self, config: EngineConfig, num_tokens: int) -> None:
        self.block_size = config.block_size
        self.num_tokens = num_tokens
        """Tokens of all blocks together."""
        self.num_swap_blocks = config.num_swap_blocks
        self.clear()

    def clear(self) -> None:
        """Take all blocks from everybody."""
        self.pool = BlockPool(self.num_tokens // self.block_size)
        self.swap_pool = BlockPool(self.num_swap_blocks)
        self.block_tables: dict[str, list[int]] = {}
        self.swapped_block_tables: dict[str, list[int]] = {}

    @property
    def num_free_blocks(self) -> int:
        return self.pool.num_free_blocks

    @property
    def num_used_blocks(self) -> int:
        """One that requests share counts once."""
        return self.pool.num_used_blocks

    @property
    def num_reserved_tokens(self) -> int:
        """A block is reserved whole."""
        return self.num_used_blocks * self.block_size

    def num_live_tokens(self, requests: list[Request]) -> int:
        """Tokens whose keys and values the cache holds after a step, shared ones once.

        `requests` are all that have a block table.
        """
        num_places = self.block_size * sum(map(len, self.block_tables.values()))
        num_empty = num_places - sum([request.num_computed_tokens for request in requests])
        # Nobody shares an empty place: who writes to a shared block has got a copy of it.
        return self.num_reserved_tokens - num_empty

    def allocate_slots(
        self, request: Request, num_new_tokens: int, num_spare_blocks: int = 0
    ) -> list[BlockCopy] | None:
        """Make room for `num_new_tokens` more tokens of `request`.

        Grows the request's table, and gives it its own copy of every shared block that it is
        about to write to (copy on write). Returns the copies to perform, or None, with nothing
        changed, when fewer than `num_spare_blocks` blocks would stay free.
        """
        block_table = self.block_tables.get(request.request_id, [])
        num_computed_tokens = request.num_computed_tokens
        num_blocks = -(-(num_computed_tokens + num_new_tokens) // self.block_size)
        num_missing = num_blocks - len(block_table)
        shared = []
        for index in range(num_computed_tokens // self.block_size, len(block_table)):
            if self.pool.is_shared(block_table[index]):
                shared.append(index)
        num_needed = num_missing + len(shared)
        if num_needed == num_spare_blocks == 0:
            return []  # most decode steps: there is room in the last block
        if num_needed + num_spare_blocks > self.pool.num_free_blocks:
            return None
        copies = []
        for index in shared:
            copy = BlockCopy(CopyKind.COPY_ON_WRITE, block_table[index], self.pool.allocate())
            self.pool.free(copy.source)
            block_table[index] = copy.destination
            copies.append(copy)
        block_table.extend(self.pool.allocate() for _ in range(num_missing))
        self.block_tables[request.request_id] = block_table
        return copies

    def share(self, parent: Request, child: Request, num_tokens: int) -> None:
        """Let `child` start from the blocks of its parent's first `num_tokens` computed tokens."""
        num_blocks = -(-num_tokens // self.block_size)
        shared = self.block_tables[parent.request_id][:num_blocks]
        for block_id in shared:
            self.pool.share(block_id)
        self.block_tables[child.request_id] = shared
        child.num_computed_tokens = num_tokens

    def free(self, request: Request) -> None:
        """Drop whatever the request holds, which may be nothing."""
        for block_id in self.block_tables.pop(request.request_id, ()):
            self.pool.free(block_id)
        for block_id in self.swapped_block_tables.pop(request.request_id, ()):
            self.swap_pool.free(block_id)

    def swap_out(self, request: Request) -> list[BlockCopy] | None:
        """Move a request's blocks to the host; None, nothing changed, if they do not fit."""
        block_table = self.block_tables[request.request_id]
        if len(block_table) > self.swap_pool.num_free_blocks:
            return None
        copies = [
            BlockCopy(CopyKind.SWAP_OUT, block_id, self.swap_pool.allocate())
            for block_id in block_table
        ]
        self.free(request)
        self.swapped_block_tables[request.request_id] = [copy.destination for copy in copies]
        return copies

    def swap_in(self, request: Request, num_spare_blocks: int) -> list[BlockCopy] | None:
        """Move a request's blocks back; None, nothing changed, as in allocate_slots."""
        block_table = self.swapped_block_tables[request.request_id]
        if len(block_table) + num_spare_blocks > self.pool.num_free_blocks:
            return None
        copies = [
            BlockCopy(CopyKind.SWAP_IN, block_id, self.pool.allocate()) for block_id in block_table
        ]
        self.free(request)
        self.block_tables[request.request_id] = [copy.destination for copy in copies]
        return copies
