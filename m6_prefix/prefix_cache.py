"""Which block holds the keys and values of which tokens, behind which others: a trie of blocks."""

import struct
from array import array
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

TOKEN_BYTES = 4
_NO_BLOCK = -1
"""Stands in nodes that are no block: the root, and the salts below it."""


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Tokens as the trie knows them, 4 bytes each; half the time that `array` takes of a list."""
    return struct.pack(f"{len(token_ids)}i", *token_ids)


def split_blocks(tokens: bytes, block_size: int) -> Iterator[bytes]:
    """Block after block; the last one may be shorter."""
    num_bytes = block_size * TOKEN_BYTES
    for start in range(0, len(tokens), num_bytes):
        yield tokens[start : start + num_bytes]


def tokens_of(key: bytes) -> Sequence[int]:
    """What `token_bytes` was given."""
    return array("i", key)


class Match(NamedTuple):
    """The cached beginning of a sequence."""

    block_ids: list[int]
    """In the order of the sequence."""
    num_tokens: int
    """Fewer than the blocks have, where only the first tokens of the last one are the same."""


class Node:
    """A block of tokens behind those of its ancestors; one that is not full has no children.

    Children are found by the hash of their tokens and then compared, which is what a dict does:
    no collision, by chance or on purpose, hands out keys and values of other tokens.
    """

    __slots__ = ("block_id", "children", "key", "parent", "sorted_keys")

    def __init__(self, parent: "Node | None", key: bytes, block_id: int) -> None:
        self.parent = parent
        self.key = key
        """The block's tokens."""
        self.block_id = block_id
        self.children: dict[bytes, Node] = {}
        self.sorted_keys: list[bytes] = []
        """Keys of the children. Who has the most first tokens in common with some others stands
        next to where these would be inserted."""

    def add(self, key: bytes, block_id: int) -> "Node":
        insort(self.sorted_keys, key)
        child = self.children[key] = Node(self, key, block_id)
        return child

    def remove(self) -> None:
        """Take this node from its parent, and a salt with the last of its nodes."""
        parent = self.parent
        if parent is None:
            return
        del parent.children[self.key]
        del parent.sorted_keys[bisect_left(parent.sorted_keys, self.key)]
        if parent.block_id == _NO_BLOCK and not parent.children:
            parent.remove()

    def closest(self, tokens: bytes) -> "Node | None":
        """The child that has the most first tokens in common with these; None without children."""
        index = bisect_left(self.sorted_keys, tokens)
        neighbours = self.sorted_keys[max(index - 1, 0) : index + 1]
        if not neighbours:
            return None
        return self.children[max(neighbours, key=lambda key: _num_common_tokens(key, tokens))]


class PrefixCache:
    """Finds the longest computed prefix of a sequence; gives up the least recently used block.

    Every operation touches the blocks that it is about, however many are cached. Whoever holds a
    block holds all before it and lets go of them last, so that blocks become idle before their
    parents: the one that was idle for the longest time is a leaf.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.root = Node(None, b"", _NO_BLOCK)
        """Its children are the salts, which have nothing in common."""
        self.nodes: dict[int, Node] = {}
        """Block id -> node; cached is what stands here."""
        self.idle: OrderedDict[int, None] = OrderedDict()
        """Ids of cached blocks that nobody holds, the least recently used first."""
        self.num_evicted_blocks = 0
        """Since somebody set it to 0."""

    def match(self, tokens: bytes, salt: str | None) -> Match:
        """The longest cached prefix of `tokens`, to the token. Changes nothing."""
        block_ids: list[int] = []
        num_bytes = self.block_size * TOKEN_BYTES
        node = self.root.children.get(_salt_key(salt))
        if node is None:
            return Match(block_ids, 0)
        for start in range(0, len(tokens) - num_bytes + 1, num_bytes):
            child = node.children.get(tokens[start : start + num_bytes])
            if child is None:
                break
            node = child
            block_ids.append(child.block_id)
        num_tokens = len(block_ids) * self.block_size
        start = num_tokens * TOKEN_BYTES
        rest = tokens[start : start + num_bytes]
        closest = node.closest(rest)
        if closest is not None:
            num_common_tokens = _num_common_tokens(closest.key, rest)
            if num_common_tokens:
                block_ids.append(closest.block_id)
                num_tokens += num_common_tokens
        return Match(block_ids, num_tokens)

    def insert(self, parent_id: int | None, key: bytes, block_id: int, salt: str | None) -> int:
        """Make a block findable behind the cached block `parent_id`; None: it is a first block.

        key: its tokens. Returns the block that is found there from now on: another one, if that
        was cached before, and then nothing changed.
        """
        parent = self._salt_node(salt) if parent_id is None else self.nodes[parent_id]
        cached = parent.children.get(key)
        if cached is not None:
            return cached.block_id
        if block_id in self.nodes:
            raise RuntimeError(f"block {block_id} is cached for other tokens")
        self.nodes[block_id] = parent.add(key, block_id)
        return block_id

    def insert_end(
        self, parent_id: int | None, key: bytes, block_id: int, salt: str | None
    ) -> None:
        """Make the last block of a sequence findable, full or not.

        Nothing changes if its tokens can be found already, as the beginning of another block.
        """
        parent = self._salt_node(salt) if parent_id is None else self.nodes[parent_id]
        closest = parent.closest(key)
        if closest is None or not closest.key.startswith(key):
            self.nodes[block_id] = parent.add(key, block_id)

    def acquire(self, block_id: int) -> None:
        """Somebody holds an idle block again."""
        if block_id not in self.idle:
            raise RuntimeError(f"block {block_id} is free and cannot be shared")
        del self.idle[block_id]

    def release(self, block_id: int) -> bool:
        """Nobody holds this block any more; False if it is not cached, and so of no use."""
        if block_id not in self.nodes:
            return False
        self.idle[block_id] = None
        return True

    def evict(self) -> int:
        """Forget the block that was idle for the longest time; returns it."""
        block_id = next(iter(self.idle))
        node = self.nodes[block_id]
        if node.children:
            raise RuntimeError(f"block {block_id} is to be evicted before those behind it")
        del self.idle[block_id], self.nodes[block_id]
        node.remove()
        self.num_evicted_blocks += 1
        return block_id

    def _salt_node(self, salt: str | None) -> Node:
        key = _salt_key(salt)
        return self.root.children.get(key) or self.root.add(key, _NO_BLOCK)


def _salt_key(salt: str | None) -> bytes:
    """A salt is never empty, so that no salt is one of its own."""
    return (salt or "").encode()


def _num_common_tokens(key: bytes, tokens: bytes) -> int:
    """How many first tokens are the same; `tokens` may be fewer."""
    num_bytes = min(len(key), len(tokens))
    difference = int.from_bytes(key[:num_bytes]) ^ int.from_bytes(tokens[:num_bytes])
    num_common_bits = 8 * num_bytes - difference.bit_length()
    return num_common_bits // (8 * TOKEN_BYTES)
