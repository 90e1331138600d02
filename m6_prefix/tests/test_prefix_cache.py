"""The trie: what is found, what is given up, and how much is looked at for that."""

import pytest

from folovllm.testing.line_interrupts import LineInterrupt
from m6_prefix import prefix_cache
from m6_prefix.prefix_cache import Match, PrefixCache, token_bytes


def insert(cache: PrefixCache, tokens: list[int], block_ids: list[int], salt=None) -> list[int]:
    """Cache full blocks of these tokens; returns the blocks that are found."""
    found: list[int] = []
    for index, block_id in enumerate(block_ids):
        start = index * cache.block_size
        key = token_bytes(tokens[start : start + cache.block_size])
        found.append(cache.insert(found[-1] if found else None, key, block_id, salt))
    return found


def match(cache: PrefixCache, tokens: list[int], salt: str | None = None) -> Match:
    return cache.match(token_bytes(tokens), salt)


def release(cache: PrefixCache, block_ids: list[int]) -> None:
    """As a table is freed: from its end."""
    for block_id in reversed(block_ids):
        assert cache.release(block_id)


def test_longest_prefix_is_found_to_the_token() -> None:
    cache = PrefixCache(block_size=4)
    insert(cache, [1, 2, 3, 4, 5, 6, 7, 8], [10, 11])
    assert match(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == ([10, 11], 8)
    assert match(cache, [1, 2, 3, 4, 5, 6, 7, 8]) == ([10, 11], 8)
    assert match(cache, [1, 2, 3, 4, 5, 6, 7]) == ([10, 11], 7)
    assert match(cache, [1, 2, 3, 4, 5, 6, 0, 8, 9]) == ([10, 11], 6)
    assert match(cache, [1, 2, 3, 4, 9, 6, 7, 8]) == ([10], 4)
    assert match(cache, [1, 2, 3, 4]) == ([10], 4)
    assert match(cache, [1]) == ([10], 1)
    assert match(cache, [2, 2, 3, 4]) == ([], 0)
    assert match(cache, [5, 6, 7, 8]) == ([], 0), "a block is behind others, wherever its tokens"
    assert match(cache, []) == ([], 0)


def test_empty_cache_has_nothing() -> None:
    assert match(PrefixCache(block_size=4), [1, 2, 3]) == ([], 0)


@pytest.mark.parametrize("token_id", [0, 1, 255, 256, 65_536, 2**31 - 1])
def test_child_with_the_most_tokens_in_common_is_found_among_many(token_id: int) -> None:
    cache = PrefixCache(block_size=3)
    siblings = [[9, 0, 0], [9, token_id, 5], [9, token_id, 7], [9, 300, 1], [8, 8, 8], [9, 2, 2]]
    found = [insert(cache, tokens, [block_id]) for block_id, tokens in enumerate(siblings)]
    block_ids, num_tokens = match(cache, [9, token_id, 6])
    best = max(common(tokens, [9, token_id, 6]) for tokens in siblings)
    assert num_tokens == best
    assert block_ids in found
    assert common(siblings[block_ids[0]], [9, token_id, 6]) == best


def common(tokens: list[int], others: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), 3)


def test_block_that_was_cached_first_stays_the_one_that_is_found() -> None:
    cache = PrefixCache(block_size=2)
    assert insert(cache, [1, 2, 3, 4], [0, 1]) == [0, 1]
    assert insert(cache, [1, 2, 3, 4, 5, 6], [2, 3, 4]) == [0, 1, 4]
    assert match(cache, [1, 2, 3, 4, 5, 6]) == ([0, 1, 4], 6)
    assert 2 not in cache.nodes
    assert not cache.release(2), "of no use to anybody"


def test_block_cannot_hold_two_prefixes() -> None:
    cache = PrefixCache(block_size=2)
    insert(cache, [1, 2], [0])
    with pytest.raises(RuntimeError, match="block 0 is cached for other tokens"):
        insert(cache, [3, 4], [0])
    assert match(cache, [3, 4]) == ([], 0)


class Colliding(bytes):
    """Tokens that all have the same hash."""

    def __hash__(self) -> int:
        return 1

    def __getitem__(self, index):
        return Colliding(super().__getitem__(index))


def test_collision_of_hashes_hands_out_no_other_keys() -> None:
    cache = PrefixCache(block_size=2)
    for block_id, tokens in enumerate(([1, 2], [3, 4], [5, 6])):
        cache.insert(None, Colliding(token_bytes(tokens)), block_id, None)
    assert cache.match(Colliding(token_bytes([3, 4, 7])), None) == ([1], 2)
    assert cache.match(Colliding(token_bytes([5, 6])), None) == ([2], 2)
    assert cache.match(Colliding(token_bytes([7, 8])), None) == ([], 0)
    assert cache.match(Colliding(token_bytes([3, 9])), None) == ([1], 1)


def test_salts_share_nothing() -> None:
    cache = PrefixCache(block_size=2)
    insert(cache, [1, 2, 3, 4], [0, 1])
    insert(cache, [1, 2, 3, 4], [2, 3], salt="a")
    assert match(cache, [1, 2, 3, 4]) == ([0, 1], 4)
    assert match(cache, [1, 2, 3, 4], "a") == ([2, 3], 4)
    for salt in ("b", "aa", "\0"):
        assert match(cache, [1, 2, 3, 4], salt) == ([], 0)


def test_salt_is_forgotten_with_its_last_block() -> None:
    cache = PrefixCache(block_size=2)
    for number in range(100):
        release(cache, insert(cache, [1, 2, 3, 4], [0, 1], salt=f"user {number}"))
        assert [cache.evict(), cache.evict()] == [1, 0]
    assert not cache.root.children and not cache.root.sorted_keys


def test_least_recently_used_block_goes_first_and_ends_go_before_beginnings() -> None:
    cache = PrefixCache(block_size=1)
    first, second = insert(cache, [1, 2, 3], [0, 1, 2]), insert(cache, [1, 2, 4], [9, 8, 3])
    assert second == [0, 1, 3]
    release(cache, first[2:])
    release(cache, second)  # whoever held the first one holds 0 and 1 no more either
    for block_id in (0, 1, 2):  # used again
        cache.acquire(block_id)
    release(cache, first)
    assert [cache.evict() for _ in range(4)] == [3, 2, 1, 0]
    assert cache.num_evicted_blocks == 4
    assert match(cache, [1, 2, 3]) == ([], 0)


def test_evicted_block_is_not_found_and_may_hold_other_tokens() -> None:
    cache = PrefixCache(block_size=2)
    release(cache, insert(cache, [1, 2, 3, 4], [0, 1]))
    assert cache.evict() == 1
    assert match(cache, [1, 2, 3, 4]) == ([0], 2)
    cache.acquire(0)
    assert insert(cache, [1, 2, 5, 6], [0, 1]) == [0, 1]
    assert match(cache, [1, 2, 3, 4]) == ([0], 2)
    assert match(cache, [1, 2, 5, 6]) == ([0, 1], 4)


def test_beginning_that_would_go_before_its_end_is_an_error() -> None:
    cache = PrefixCache(block_size=1)
    for block_id in insert(cache, [1, 2], [0, 1]):  # the wrong way round
        cache.release(block_id)
    with pytest.raises(RuntimeError, match="block 0 is to be evicted before those behind it"):
        cache.evict()


def test_block_that_is_not_idle_cannot_be_acquired() -> None:
    cache = PrefixCache(block_size=1)
    insert(cache, [1], [0])
    with pytest.raises(RuntimeError, match="block 0 is free and cannot be shared"):
        cache.acquire(0)


def count_lines(action) -> int:
    """Lines of prefix_cache.py that run."""
    counter = LineInterrupt([str(prefix_cache.__file__)], line_number=0)
    with counter:
        action()
    return counter.num_lines


def test_work_grows_with_the_prompt_and_not_with_what_is_cached() -> None:
    prompt, tail = list(range(160)), [7] * 4
    lookups, inserts, evictions = [], [], []
    for num_others in (10, 3000):
        cache = PrefixCache(block_size=4)
        for number in range(num_others):
            tokens = [1000 + number] * 4
            release(cache, insert(cache, tokens, [100 + number]))
        blocks = insert(cache, prompt, list(range(40)))
        lookups.append(count_lines(lambda: match(cache, prompt)))  # noqa: B023
        lookups.append(count_lines(lambda: match(cache, prompt[:80])))  # noqa: B023
        key = token_bytes(tail)
        inserts.append(count_lines(lambda: cache.insert(blocks[-1], key, 99, None)))  # noqa: B023
        evictions.append(count_lines(lambda: cache.evict()))  # noqa: B023
    assert lookups[0] == lookups[2] < 2.1 * lookups[1]
    assert lookups[1] == lookups[3]
    assert inserts[0] == inserts[1]
    assert evictions[0] == evictions[1]
