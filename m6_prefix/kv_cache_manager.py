"""Host-side bookkeeping: where each request's keys and values live."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from weakref import WeakKeyDictionary

from folovllm.request import Request

from .block_pool import BlockPool
from .config import EngineConfig
from .prefix_cache import TOKEN_BYTES, PrefixCache, split_blocks, token_bytes


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
        self.is_caching = config.enable_prefix_caching
        self.prompt_bytes: WeakKeyDictionary[Request, bytes] = WeakKeyDictionary()
        """Kept, because whoever waits is looked up in every step."""
        self.clear()

    def clear(self) -> None:
        """Take all blocks from everybody, and forget what is in them."""
        self.prefix_cache = PrefixCache(self.block_size)
        self.pool = BlockPool(self.num_tokens // self.block_size, self.prefix_cache)
        self.swap_pool = BlockPool(self.num_swap_blocks, PrefixCache(self.block_size))
        self.block_tables: dict[str, list[int]] = {}
        self.swapped_block_tables: dict[str, list[int]] = {}
        self.num_cached_blocks: dict[str, int] = {}
        """Request id -> so many first blocks of its table are cached; 0 where it is missing."""
        self.num_tokens_looked_up = self.num_tokens_found = 0
        """Of prompts, since `take_cache_stats`."""

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
        # A cached block that nobody else holds is free when it is copied, if need be to itself.
        num_alone = sum(self.pool.ref_counts[block_table[index]] == 1 for index in shared)
        if num_needed + num_spare_blocks > self.pool.num_free_blocks + num_alone:
            return None
        copies = []
        for index in shared:
            self.pool.free(block_table[index])
            copy = BlockCopy(CopyKind.COPY_ON_WRITE, block_table[index], self.pool.allocate())
            block_table[index] = copy.destination
            copies.append(copy)
        block_table.extend(self.pool.allocate() for _ in range(num_missing))
        self.block_tables[request.request_id] = block_table
        return copies

    def share(self, parent: Request, child: Request, num_tokens: int) -> None:
        """Let `child` start from the blocks of its parent's first `num_tokens` computed tokens."""
        num_blocks = -(-num_tokens // self.block_size)
        shared = self.block_tables[parent.request_id][:num_blocks]
        self.pool.share(*shared)
        self.block_tables[child.request_id] = shared
        num_cached = self.num_cached_blocks.get(parent.request_id, 0)
        self.num_cached_blocks[child.request_id] = min(num_cached, num_tokens // self.block_size)
        child.num_computed_tokens = num_tokens

    def share_cached(self, request: Request) -> None:
        """Let a waiting request start from cached blocks, if they hold more than it has.

        At least its last token is left to compute. Of the last block, only the first tokens may be
        its own: it gets a copy when it writes to it. Who asks for the log-probabilities of its
        prompt computes all of it.
        """
        if not self.is_caching or request.needs_prompt_logits:
            return
        prompt = self.prompt_bytes.get(request)
        if prompt is None:
            prompt = self.prompt_bytes[request] = token_bytes(request.prompt_token_ids)
        tokens = prompt + token_bytes(request.output_token_ids)
        num_bytes = TOKEN_BYTES * (request.num_tokens - 1)
        match = self.prefix_cache.match(tokens[:num_bytes], request.cache_salt)
        if match.num_tokens <= request.num_computed_tokens:
            return
        self.free(request)
        self.pool.share(*match.block_ids)
        self.block_tables[request.request_id] = match.block_ids
        self.num_cached_blocks[request.request_id] = match.num_tokens // self.block_size
        request.num_computed_tokens = match.num_tokens

    def publish(self, requests: Iterable[Request]) -> None:
        """Make the blocks findable that launched steps fill with tokens that are known.

        One stream: whoever finds them reads them behind the step that writes them. Where another
        request has computed the same block before, the table gets that one. It is a new list then.
        """
        if not self.is_caching:
            return
        num_cached_blocks, block_size = self.num_cached_blocks, self.block_size
        for request in requests:
            num_cached = num_cached_blocks.get(request.request_id, 0)
            if request.num_computed_tokens // block_size > num_cached:
                self._publish(request, num_cached)

    def _publish(self, request: Request, num_cached: int) -> None:
        num_known_tokens = min(request.num_computed_tokens, len(request.token_ids))
        num_blocks = num_known_tokens // self.block_size
        block_table = self.block_tables.get(request.request_id)
        if num_blocks == num_cached or block_table is None:
            return  # the last token is on its way; or it was aborted when its step was under way
        first, last = num_cached * self.block_size, num_blocks * self.block_size
        keys = split_blocks(token_bytes(request.token_ids[first:last]), self.block_size)
        for index, key in enumerate(keys, start=num_cached):
            parent_id = block_table[index - 1] if index else None
            own = block_table[index]
            cached = self.prefix_cache.insert(parent_id, key, own, request.cache_salt)
            if cached != own:
                if block_table is self.block_tables[request.request_id]:
                    block_table = list(block_table)
                block_table[index] = cached
                self.pool.share(cached)
                self.pool.free(own)
        self.block_tables[request.request_id] = block_table
        self.num_cached_blocks[request.request_id] = num_blocks

    def publish_end(self, request: Request) -> None:
        """Make all findable that a request has computed which has ended, to its last token."""
        self.publish([request])
        block_table = self.block_tables.get(request.request_id)
        index = self.num_cached_blocks.get(request.request_id, 0)
        num_known_tokens = min(request.num_computed_tokens, len(request.token_ids))
        end = request.token_ids[index * self.block_size : num_known_tokens]
        if self.is_caching and block_table is not None and end:
            parent_id = block_table[index - 1] if index else None
            self.prefix_cache.insert_end(
                parent_id, token_bytes(end), block_table[index], request.cache_salt
            )

    def note_admission(self, request: Request) -> None:
        """Count a prompt and what was found of it: once, and not for those who fork from it."""
        if self.is_caching and request.num_cached_tokens is None and request.fork_of is None:
            request.num_cached_tokens = request.num_computed_tokens
            self.num_tokens_looked_up += request.num_prompt_tokens
            self.num_tokens_found += request.num_computed_tokens

    def take_cache_stats(self) -> dict[str, int]:
        """Fields of StepStats, none without a cache; events are those since the last call."""
        if not self.is_caching:
            return {}
        stats = {
            "num_cached_blocks": len(self.prefix_cache.nodes),
            "num_idle_blocks": len(self.prefix_cache.idle),
            "num_evicted_blocks": self.prefix_cache.num_evicted_blocks,
            "num_prompt_tokens_looked_up": self.num_tokens_looked_up,
            "num_prompt_tokens_found": self.num_tokens_found,
        }
        self.num_tokens_looked_up = self.num_tokens_found = 0
        self.prefix_cache.num_evicted_blocks = 0
        return stats

    def reset_prefix_cache(self) -> None:
        """Forget what is in all blocks; those that somebody holds stay with their holders."""
        idle = self.prefix_cache.idle
        self.pool.prefix_cache = self.prefix_cache = PrefixCache(self.block_size)
        self.pool.free_block_ids.extend(idle)
        self.num_cached_blocks.clear()

    def free(self, request: Request) -> None:
        """Drop whatever the request holds, which may be nothing; the end of a prefix first."""
        for block_id in reversed(self.block_tables.pop(request.request_id, ())):
            self.pool.free(block_id)
        self.num_cached_blocks.pop(request.request_id, None)
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
