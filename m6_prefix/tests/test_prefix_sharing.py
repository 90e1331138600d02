"""Who starts from which cached blocks, without a model: exact tokens, blocks and counts."""

import pytest

from folovllm.interfaces import SamplerOutput
from folovllm.request import Request, SamplingParams
from folovllm.testing.invariants import ChunkedProgress, check_bookkeeping
from m6_prefix import kv_cache_manager
from m6_prefix.config import PreemptionMode
from m6_prefix.kv_cache_manager import BlockCopy, CopyKind
from m6_prefix.scheduler import Scheduler
from m6_prefix.tests.test_scheduler import advance, finish, make_scheduler, record

PROMPT = list(range(100, 131))


def add(scheduler: Scheduler, name: str, prompt: list[int], max_tokens: int = 1, **fields) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    scheduler.add_request(
        Request(request_id=name, prompt_token_ids=prompt, sampling_params=params, **fields)
    )


def run(scheduler: Scheduler, prompt: list[int], max_tokens: int = 1, **fields) -> dict[str, int]:
    """Serve one request; returns what its first step computed."""
    add(scheduler, "x", prompt, max_tokens, **fields)
    first = advance(scheduler)
    finish(scheduler)
    check_bookkeeping(scheduler, ChunkedProgress())
    return first


def stats_of(scheduler: Scheduler, num_steps: int = 100) -> dict[str, int]:
    """Run; returns the sums of what steps count of the cache."""
    names = ("num_prompt_tokens_looked_up", "num_prompt_tokens_found", "num_evicted_blocks")
    sums = dict.fromkeys(names, 0)
    for _ in range(num_steps):
        if not scheduler.has_unfinished_requests():
            break
        stats = record(scheduler, scheduler.schedule()).stats
        for name in names:
            sums[name] += getattr(stats, name)
        sums["num_preemptions"] = sums.get("num_preemptions", 0) + stats.num_preemptions
    return sums


def noting(calls: list[tuple], function):
    """`function`, whose arguments are noted."""

    def noted(*args):
        calls.append(args)
        return function(*args)

    return noted


def nodes(scheduler: Scheduler) -> int:
    return len(scheduler.kv_cache_manager.prefix_cache.nodes)


# Hits


@pytest.mark.parametrize("length", [4, 7, 8, 9, 12])
def test_prompt_that_is_cached_whole_computes_its_last_token(length: int) -> None:
    scheduler = make_scheduler()
    assert run(scheduler, PROMPT[:length]) == {"x": length}
    assert run(scheduler, PROMPT[:length]) == {"x": 1}
    assert run(scheduler, PROMPT[:length]) == {"x": 1}


@pytest.mark.parametrize("num_common", range(1, 13))
def test_prompt_is_computed_from_where_it_parts_from_what_is_cached(num_common: int) -> None:
    scheduler = make_scheduler()
    run(scheduler, PROMPT[:12])
    assert run(scheduler, PROMPT[:num_common] + [1] * 10) == {"x": 10}


def test_block_of_which_the_first_tokens_are_wanted_is_copied_and_stays_cached() -> None:
    scheduler = make_scheduler()
    run(scheduler, PROMPT[:8])
    add(scheduler, "x", [*PROMPT[:6], 1, 2])
    output = scheduler.schedule()
    (scheduled,) = output.scheduled
    assert scheduled.num_scheduled_tokens == 2
    assert output.block_copies == (BlockCopy(CopyKind.COPY_ON_WRITE, 1, 2),)
    assert scheduled.block_table == [0, 2]
    record(scheduler, output)
    assert run(scheduler, PROMPT[:8]) == {"x": 1}
    assert run(scheduler, [*PROMPT[:6], 1, 2]) == {"x": 1}


@pytest.mark.parametrize("prompt_len", range(4, 13))
def test_next_turn_finds_the_answer_before_it(prompt_len: int) -> None:
    scheduler = make_scheduler(num_blocks=16)
    run(scheduler, PROMPT[:prompt_len], max_tokens=6)
    answer = [7] * 6
    # The keys and values of the last token were never computed.
    assert run(scheduler, [*PROMPT[:prompt_len], *answer, 1, 2, 3]) == {"x": 4}


def test_end_of_a_request_is_kept_once_and_only_where_it_is_no_beginning_of_a_block() -> None:
    scheduler = make_scheduler()
    run(scheduler, PROMPT[:6])
    assert nodes(scheduler) == 2
    run(scheduler, PROMPT[:6])  # the same end
    run(scheduler, PROMPT[:5])  # a beginning of that end
    assert nodes(scheduler) == 2
    run(scheduler, PROMPT[:8])  # a full block, of which the end is a beginning
    assert nodes(scheduler) == 3
    run(scheduler, PROMPT[:7])  # a beginning of the block
    assert nodes(scheduler) == 3
    run(scheduler, [*PROMPT[:5], 1])
    assert nodes(scheduler) == 4
    assert run(scheduler, [*PROMPT[:5], 1, 2]) == {"x": 1}


@pytest.mark.parametrize("prompt_len", [1, 3, 7])
def test_ends_are_found_with_their_own_salt_only(prompt_len: int) -> None:
    scheduler = make_scheduler(num_blocks=30)
    for salt in (None, "a", "b"):
        assert run(scheduler, PROMPT[:prompt_len], cache_salt=salt) == {"x": prompt_len}
        assert run(scheduler, PROMPT[:prompt_len], cache_salt=salt) == {"x": 1}


def test_request_that_ends_after_a_reset_is_found_from_its_beginning_to_its_end() -> None:
    scheduler = make_scheduler(num_blocks=16)
    add(scheduler, "a", PROMPT[:14], max_tokens=1)
    output = scheduler.schedule()
    stats = scheduler.advance(output)
    scheduler.kv_cache_manager.reset_prefix_cache()
    scheduler.update(output, SamplerOutput([7], [None]), stats)
    assert nodes(scheduler) == 4
    check_bookkeeping(scheduler, ChunkedProgress())
    assert run(scheduler, PROMPT[:15]) == {"x": 1}


def test_end_of_another_length_than_a_block_is_no_block() -> None:
    scheduler = make_scheduler()
    run(scheduler, PROMPT[:6])
    # All of the end, and nothing behind it: two tokens of the block are found, not four.
    assert run(scheduler, [*PROMPT[:6], 1]) == {"x": 1}
    assert run(scheduler, [*PROMPT[:6], 2, 3, 4, 5]) == {"x": 4}


def test_prompt_that_the_whole_cache_holds_needs_no_block_for_its_copy() -> None:
    scheduler = make_scheduler(num_blocks=8)
    prompt = [*PROMPT, 1]
    add(scheduler, "x", prompt, max_tokens=1)
    assert advance(scheduler) == {"x": 32}
    assert nodes(scheduler) == 8
    assert run(scheduler, prompt) == {"x": 1}
    assert run(scheduler, prompt) == {"x": 1}


# Publishing


def test_equal_prompts_of_one_step_both_compute_and_keep_one_copy() -> None:
    for order in ("ab", "ba"):
        scheduler = make_scheduler()
        add(scheduler, "a", PROMPT[:9], max_tokens=9)
        add(scheduler, "b", PROMPT[:9], max_tokens=9)
        before = scheduler.schedule()
        assert [s.num_scheduled_tokens for s in before.scheduled] == [9, 9]
        tables = [s.block_table for s in before.scheduled]
        assert tables == [[0, 1, 2], [3, 4, 5]]
        record(scheduler, before)
        manager = scheduler.kv_cache_manager
        assert manager.block_tables == {"a": [0, 1, 2], "b": [0, 1, 5]}
        assert manager.block_tables["a"] is tables[0], "nothing of it has changed"
        assert manager.block_tables["b"] is not tables[1], "the device has a copy of this list"
        check_bookkeeping(scheduler, ChunkedProgress())
        for name in order:
            scheduler.abort_request(name)
            check_bookkeeping(scheduler, ChunkedProgress())
        assert manager.num_free_blocks == 8
        assert run(scheduler, PROMPT[:9]) == {"x": 1}


def test_block_is_found_when_its_step_is_launched_and_not_before() -> None:
    scheduler = make_scheduler(num_blocks=16)
    add(scheduler, "a", PROMPT[:8], max_tokens=5)
    first = scheduler.schedule()
    add(scheduler, "b", PROMPT[:8], max_tokens=5)
    assert nodes(scheduler) == 0
    stats = scheduler.advance(first)
    assert (stats.num_cached_blocks, stats.num_idle_blocks) == (2, 0)
    second = scheduler.schedule()  # the tokens of the first step are not read
    assert [s.num_scheduled_tokens for s in second.scheduled] == [1, 1]


def test_block_is_not_cached_before_its_last_token_is_known() -> None:
    scheduler = make_scheduler(num_blocks=16)
    add(scheduler, "a", PROMPT[:7], max_tokens=5)
    first = scheduler.schedule()
    stats = scheduler.advance(first)
    second = scheduler.schedule()
    scheduler.advance(second)  # computes the 8th token, which the host has not seen
    assert nodes(scheduler) == 1
    record_tokens(scheduler, first, stats)
    third = scheduler.schedule()
    scheduler.advance(third)
    assert nodes(scheduler) == 2
    assert run_beside(scheduler, [*PROMPT[:7], 7, 1]) == 1


def test_last_block_of_a_request_is_cached_also_where_its_end_was_read_late() -> None:
    scheduler = make_scheduler(num_blocks=16)
    add(scheduler, "a", PROMPT[:7], max_tokens=2)
    first = scheduler.schedule()
    first_stats = scheduler.advance(first)
    second = scheduler.schedule()
    second_stats = scheduler.advance(second)
    record_tokens(scheduler, first, first_stats)
    assert nodes(scheduler) == 1
    record_tokens(scheduler, second, second_stats)
    assert not scheduler.has_unfinished_requests()
    assert run(scheduler, [*PROMPT[:7], 7, 1]) == {"x": 1}


def record_tokens(scheduler: Scheduler, output, stats) -> None:
    n = len(output.scheduled)
    scheduler.update(output, SamplerOutput(token_ids=[7] * n, logprobs=[None] * n), stats)


def run_beside(scheduler: Scheduler, prompt: list[int]) -> int:
    add(scheduler, "y", prompt)
    scheduled = {
        s.request.request_id: s.num_scheduled_tokens for s in scheduler.schedule().scheduled
    }
    return scheduled["y"]


def test_request_aborted_while_its_step_is_launched_publishes_nothing() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", PROMPT[:8])
    output = scheduler.schedule()
    scheduler.abort_request("a")
    scheduler.advance(output)
    assert nodes(scheduler) == 0
    assert scheduler.kv_cache_manager.num_free_blocks == 8


def test_fork_has_nothing_left_to_publish_of_what_it_shares(monkeypatch) -> None:
    scheduler = make_scheduler(num_blocks=16)
    add(scheduler, "a", PROMPT[:10], max_tokens=9)
    parent = scheduler.requests["a"]
    add(scheduler, "b", PROMPT[:10], max_tokens=9, fork_of=parent)
    advance(scheduler)
    inserted: list[tuple] = []
    cache = scheduler.kv_cache_manager.prefix_cache
    monkeypatch.setattr(cache, "insert", noting(inserted, cache.insert))
    assert advance(scheduler) == {"a": 1, "b": 1}
    assert inserted == []
    assert scheduler.kv_cache_manager.block_tables == {"a": [0, 1, 2], "b": [0, 1, 3]}
    for _ in range(2):
        assert advance(scheduler) == {"a": 1, "b": 1}
    assert [block_id for _, _, block_id, _ in inserted] == [2, 3], (
        "both have the same tokens: one is kept"
    )
    assert scheduler.kv_cache_manager.block_tables == {"a": [0, 1, 2, 4], "b": [0, 1, 2]}


def test_warm_prompt_has_nothing_left_to_publish_of_what_it_found(monkeypatch) -> None:
    scheduler = make_scheduler()
    run(scheduler, PROMPT[:12])
    inserted: list[tuple] = []
    cache = scheduler.kv_cache_manager.prefix_cache
    monkeypatch.setattr(cache, "insert", noting(inserted, cache.insert))
    assert run(scheduler, [*PROMPT[:9], 1, 2, 3]) == {"x": 3}
    assert [(parent_id, block_id) for parent_id, _, block_id, _ in inserted] == [(1, 3)]


def test_preempted_fork_finds_more_than_its_parents_prompt() -> None:
    scheduler = make_scheduler(num_blocks=16)
    add(scheduler, "a", PROMPT[:10], max_tokens=20)
    add(scheduler, "b", PROMPT[:10], max_tokens=20, fork_of=scheduler.requests["a"])
    for _ in range(8):
        advance(scheduler)
    fork = scheduler.requests["b"]
    assert fork.num_tokens == 17
    scheduler.running.remove(fork)
    scheduler._queue_again(fork)
    assert advance(scheduler) == {"a": 1, "b": 1}


# Eviction


def test_evicted_prefix_is_computed_again() -> None:
    scheduler = make_scheduler(num_blocks=8)
    run(scheduler, PROMPT[:12])
    run(scheduler, [1] * 20)
    assert nodes(scheduler) == 8
    assert run(scheduler, [2] * 12) == {"x": 12}  # takes the oldest
    assert run(scheduler, PROMPT[:12]) == {"x": 12}


def test_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    scheduler = make_scheduler(num_blocks=8)
    run(scheduler, [*PROMPT[:28], 1])
    run(scheduler, [2] * 8)  # takes the block that is free, and one more
    assert run(scheduler, [*PROMPT[:28], 1]) == {"x": 5}


def test_prefix_that_is_used_stays_and_others_go() -> None:
    scheduler = make_scheduler(num_blocks=8)
    for number in range(20):
        assert run(scheduler, [*PROMPT[:12], number, 1]) == {"x": 2 if number else 14}
        run(scheduler, [number] * 8)


def test_cached_blocks_cost_no_admission() -> None:
    """Whatever is cached, as many run at once, in the same steps, as without a cache."""

    def steps(scheduler: Scheduler) -> list[list[str]]:
        for number in range(6):
            add(scheduler, f"r{number}", [number] * (3 + 4 * number), max_tokens=9)
        return [sorted(advance(scheduler)) for _ in range(60)]

    without = make_scheduler(num_blocks=16, enable_prefix_caching=False)
    full = make_scheduler(num_blocks=16)
    for number in range(40):
        run(full, [200 + number] * 8)
    assert len(full.kv_cache_manager.prefix_cache.idle) == 16
    assert steps(full) == steps(without)


def test_blocked_head_of_the_queue_holds_nothing_of_what_it_found() -> None:
    scheduler = make_scheduler(num_blocks=8)
    run(scheduler, PROMPT[:8])
    add(scheduler, "a", [1] * 20, max_tokens=9)
    advance(scheduler)
    add(scheduler, "b", [*PROMPT[:8], *[3] * 12])
    for _ in range(3):
        assert advance(scheduler) == {"a": 1}
        check_bookkeeping(scheduler, ChunkedProgress())
        assert scheduler.kv_cache_manager.pool.ref_counts[:2] == [0, 0]
        assert scheduler.requests["b"].num_cached_tokens is None
    scheduler.abort_request("a")
    assert advance(scheduler) == {"b": 12}


# Preemption


def test_preempted_request_finds_its_own_blocks() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=3)
    add(scheduler, "a", [1] * 12, max_tokens=20)
    add(scheduler, "b", [2] * 11, max_tokens=12)
    steps = [advance(scheduler) for _ in range(6)]
    assert steps[0] == {"a": 12, "b": 11}
    while "b" in advance(scheduler):
        pass
    b = scheduler.requests["b"]
    scheduler.abort_request("a")
    num_known = b.num_tokens
    (computed,) = advance(scheduler).values()
    assert computed < num_known - 8
    assert b.num_cached_tokens == 0, "its prompt was found nowhere when it first came"


def test_swapped_request_publishes_its_new_blocks() -> None:
    scheduler = make_scheduler(num_blocks=9, preemption_mode=PreemptionMode.SWAP)
    add(scheduler, "a", [1] * 16, max_tokens=9)
    add(scheduler, "b", [2] * 8, max_tokens=16)
    while not scheduler.swapped:
        advance(scheduler)
        check_bookkeeping(scheduler, ChunkedProgress())
    finish(scheduler)
    check_bookkeeping(scheduler, ChunkedProgress())
    assert run(scheduler, [2] * 8 + [7] * 8) == {"x": 1}


# Counts


def test_hit_rate_of_prompts_with_nothing_in_common_is_zero() -> None:
    scheduler = make_scheduler(num_blocks=10, max_chunk_tokens=3)
    for number in range(6):
        add(scheduler, f"r{number}", list(range(100 * number, 100 * number + 13)), max_tokens=15)
    sums = stats_of(scheduler, num_steps=500)
    assert not scheduler.has_unfinished_requests()
    assert sums["num_preemptions"] > 0
    assert sums["num_evicted_blocks"] > 0
    assert sums["num_prompt_tokens_looked_up"] == 6 * 13
    assert sums["num_prompt_tokens_found"] == 0


def test_found_tokens_are_counted_once_per_prompt() -> None:
    scheduler = make_scheduler(num_blocks=16)
    run(scheduler, PROMPT[:8])
    scheduler.kv_cache_manager.take_cache_stats()
    add(scheduler, "a", PROMPT[:10], max_tokens=2)
    parent = scheduler.requests["a"]
    add(scheduler, "b", PROMPT[:10], max_tokens=2, fork_of=parent)
    output = scheduler.schedule()
    assert parent.num_cached_tokens == 8
    stats = record(scheduler, output).stats
    assert (stats.num_prompt_tokens_looked_up, stats.num_prompt_tokens_found) == (10, 8)
    assert stats_of(scheduler)["num_prompt_tokens_looked_up"] == 0


def test_stats_tell_cached_idle_and_evicted_blocks() -> None:
    scheduler = make_scheduler(num_blocks=8)
    run(scheduler, PROMPT[:17])
    add(scheduler, "a", [*PROMPT[:4], *[1] * 20], max_tokens=2)
    stats = record(scheduler, scheduler.schedule()).stats
    # 1 block is found; 3 are free and 4 idle; the new ones hold 5 blocks.
    assert stats.num_cached_blocks == 1 + 5 + 2
    assert stats.num_idle_blocks == 2 == stats.num_free_blocks
    assert stats.num_evicted_blocks == 2
    assert stats.num_used_blocks == 6
    stats = record(scheduler, scheduler.schedule()).stats
    assert (stats.num_evicted_blocks, stats.num_prompt_tokens_looked_up) == (1, 0)


# Salts, resets, no cache at all


def test_prompts_with_other_salts_find_nothing_of_each_other() -> None:
    scheduler = make_scheduler(num_blocks=30)
    for salt in (None, "a", "b"):
        assert run(scheduler, PROMPT[:9], cache_salt=salt) == {"x": 9}
        assert run(scheduler, PROMPT[:9], cache_salt=salt) == {"x": 1}


def test_reset_forgets_everything_that_nobody_holds() -> None:
    scheduler = make_scheduler()
    run(scheduler, PROMPT[:9])
    scheduler.kv_cache_manager.reset_prefix_cache()
    assert scheduler.kv_cache_manager.num_free_blocks == 8
    check_bookkeeping(scheduler, ChunkedProgress())
    assert run(scheduler, PROMPT[:9]) == {"x": 9}


def test_reset_leaves_the_blocks_of_running_requests_to_them() -> None:
    scheduler = make_scheduler(num_blocks=16)
    run(scheduler, [9] * 12)
    add(scheduler, "a", PROMPT[:9], max_tokens=9)
    add(scheduler, "b", PROMPT[:9], max_tokens=9)
    advance(scheduler)
    tables = {name: list(t) for name, t in scheduler.kv_cache_manager.block_tables.items()}
    scheduler.kv_cache_manager.reset_prefix_cache()
    check_bookkeeping(scheduler, ChunkedProgress())
    assert scheduler.kv_cache_manager.block_tables == tables
    assert nodes(scheduler) == 0
    add(scheduler, "c", PROMPT[:9])
    assert advance(scheduler) == {"a": 1, "b": 1, "c": 9}
    check_bookkeeping(scheduler, ChunkedProgress())
    finish(scheduler)
    check_bookkeeping(scheduler, ChunkedProgress())
    assert run(scheduler, [9] * 12) == {"x": 12}
    assert run(scheduler, PROMPT[:9]) == {"x": 1}, "what ran on is found again"


def test_without_the_option_nothing_is_kept() -> None:
    scheduler = make_scheduler(enable_prefix_caching=False)
    for _ in range(2):
        add(scheduler, "x", PROMPT[:9], max_tokens=3)
        stats = record(scheduler, scheduler.schedule()).stats
        assert stats.num_scheduled_tokens == 9
        assert stats.num_cached_blocks is None
        assert stats.num_prompt_tokens_looked_up is None
        assert scheduler.requests["x"].num_cached_tokens is None
        finish(scheduler)
        assert len(scheduler.kv_cache_manager.pool.free_block_ids) == 8


# Time


def test_step_without_a_full_block_looks_nothing_up(monkeypatch) -> None:
    scheduler = make_scheduler(num_blocks=16)
    add(scheduler, "a", PROMPT[:9], max_tokens=9)
    advance(scheduler)
    publications: list[tuple] = []
    manager = scheduler.kv_cache_manager
    monkeypatch.setattr(manager, "_publish", noting(publications, manager._publish))
    for _ in range(8):
        advance(scheduler)
    assert len(publications) == 2


def test_prompt_of_a_blocked_head_is_turned_into_bytes_once(monkeypatch) -> None:
    scheduler = make_scheduler(num_blocks=8)
    add(scheduler, "a", [1] * 20, max_tokens=9)
    advance(scheduler)
    add(scheduler, "b", [3] * 20)
    made: list[tuple] = []
    make_bytes = kv_cache_manager.token_bytes
    monkeypatch.setattr(kv_cache_manager, "token_bytes", noting(made, make_bytes))
    for _ in range(5):
        advance(scheduler)
    assert [len(token_ids) for (token_ids,) in made if len(token_ids) > 4] == [20]
