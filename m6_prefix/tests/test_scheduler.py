"""Who is admitted, who gives way and who comes back when: exact requests, tokens and blocks."""

import pytest

from folovllm.interfaces import SamplerOutput
from folovllm.request import RequestStatus
from folovllm.testing.scheduler_contract import make_request
from m6_prefix.config import EngineConfig, PreemptionMode, SchedulingPolicy
from m6_prefix.kv_cache_manager import CopyKind, KVCacheManager
from m6_prefix.scheduler import Scheduler, SchedulerOutput


def make_scheduler(num_blocks: int = 8, **options: object) -> Scheduler:
    """Blocks of 4 tokens; a request may take 8 blocks."""
    config = EngineConfig(
        **{
            "max_model_len": 32,
            "max_num_batched_tokens": 64,
            "max_num_seqs": 8,
            "block_size": 4,
            "swap_cache_tokens": 32,
            **options,
        }
    )
    return Scheduler(config, KVCacheManager(config, num_tokens=4 * num_blocks))


def add(scheduler: Scheduler, name: str, prompt_len: int, max_tokens: int = 9, **fields) -> None:
    scheduler.add_request(make_request(name, prompt_len, max_tokens, **fields))


def record(scheduler: Scheduler, output: SchedulerOutput):
    n = len(output.scheduled)
    stats = scheduler.advance(output)
    return scheduler.update(output, SamplerOutput(token_ids=[7] * n, logprobs=[None] * n), stats)


def advance(scheduler: Scheduler) -> dict[str, int]:
    """Run one step without a model; return request -> tokens that were computed."""
    output = scheduler.schedule()
    record(scheduler, output)
    return {s.request.request_id: s.num_scheduled_tokens for s in output.scheduled}


def finish(scheduler: Scheduler) -> list[str]:
    """Run to the end; return the requests in the order in which they finished."""
    names: list[str] = []
    for _ in range(200):
        if not scheduler.has_unfinished_requests():
            return names
        tokens = record(scheduler, scheduler.schedule()).tokens
        names += [token.request_id for token in tokens if token.finish_reason is not None]
    raise AssertionError("no end after 200 steps")


def swapped_scheduler(**options: object) -> tuple[Scheduler, list[int]]:
    """(Scheduler, taken blocks): a runs in 7 of 12 blocks, b is swapped out, 1 block is free.

    b has 2 blocks, and room for one more token in them. The other 4 belong to nobody who is known
    here; a test gives back as many as it wants to be free.
    """
    scheduler = make_scheduler(12, preemption_mode=PreemptionMode.SWAP, **options)
    add(scheduler, "a", 23, priority=1)
    add(scheduler, "b", 6, priority=1)
    assert advance(scheduler) == {"a": 23, "b": 6}
    pool = scheduler.kv_cache_manager.pool
    taken = [pool.allocate() for _ in range(pool.num_free_blocks)]
    assert advance(scheduler) == {"a": 1, "b": 1}
    output = scheduler.schedule()
    assert [s.request.request_id for s in output.scheduled] == ["a"]
    assert output.num_preemptions == 1
    stats = record(scheduler, output).stats
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (1, 1, 1)
    assert stats.num_swapped_tokens == 8
    return scheduler, taken


def give_back(scheduler: Scheduler, taken: list[int], count: int) -> None:
    for _ in range(count):
        scheduler.kv_cache_manager.pool.free(taken.pop())


def test_budget_is_used_to_its_last_token_and_no_further() -> None:
    scheduler = make_scheduler(num_blocks=16, max_num_batched_tokens=40)
    add(scheduler, "a", 20)
    add(scheduler, "b", 20)
    add(scheduler, "c", 1)
    assert advance(scheduler) == {"a": 20, "b": 20}
    scheduler = make_scheduler(num_blocks=32, max_num_batched_tokens=40)
    add(scheduler, "a", 20)
    add(scheduler, "b", 21)
    assert advance(scheduler) == {"a": 20, "b": 20}
    assert advance(scheduler) == {"a": 1, "b": 1}
    add(scheduler, "c", 39)
    assert advance(scheduler) == {"a": 1, "b": 1, "c": 38}
    assert advance(scheduler) == {"a": 1, "b": 1, "c": 1}


def test_every_running_request_keeps_a_spare_block_when_another_is_admitted() -> None:
    scheduler = make_scheduler(num_blocks=8)
    add(scheduler, "a", 5)
    add(scheduler, "b", 20)
    add(scheduler, "c", 1)
    # a takes 2 of 8 blocks, b 5; 1 is left for a.
    assert advance(scheduler) == {"a": 5, "b": 20}
    assert advance(scheduler) == {"a": 1, "b": 1}
    scheduler = make_scheduler(num_blocks=8)
    add(scheduler, "a", 5)
    add(scheduler, "b", 21)
    assert advance(scheduler) == {"a": 5}
    assert advance(scheduler) == {"a": 1}


def test_request_that_has_the_pool_to_itself_may_take_all_of_it() -> None:
    scheduler = make_scheduler(num_blocks=8)
    add(scheduler, "a", 31, max_tokens=1)
    assert advance(scheduler) == {"a": 31}


def test_max_num_seqs_limits_the_running_requests() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        add(scheduler, name, 1)
    assert advance(scheduler) == {"a": 1, "b": 1}
    assert advance(scheduler) == {"a": 1, "b": 1}


def test_max_num_seqs_keeps_a_swapped_request_out() -> None:
    scheduler, taken = swapped_scheduler(
        max_num_seqs=2, scheduling_policy=SchedulingPolicy.PRIORITY
    )
    scheduler.abort_request("a")
    give_back(scheduler, taken, 4)
    add(scheduler, "c", 1, priority=0, max_tokens=3)
    add(scheduler, "d", 1, priority=0, max_tokens=3)
    assert [advance(scheduler) for _ in range(3)] == [{"c": 1, "d": 1}] * 3
    assert advance(scheduler) == {"b": 1}


def test_swapped_request_comes_back_when_everybody_who_runs_keeps_a_spare_block() -> None:
    scheduler, taken = swapped_scheduler()
    # 2 blocks for b, and a spare one for each of a and b.
    give_back(scheduler, taken, 2)
    assert advance(scheduler) == {"a": 1}
    give_back(scheduler, taken, 1)
    output = scheduler.schedule()
    assert [s.request.request_id for s in output.scheduled] == ["a", "b"]
    assert [(copy.kind, copy.source) for copy in output.block_copies] == [
        (CopyKind.SWAP_IN, 0),
        (CopyKind.SWAP_IN, 1),
    ]
    assert record(scheduler, output).stats.num_swapped_tokens == 8


def test_swapped_request_that_would_run_alone_needs_no_spare_block() -> None:
    scheduler, _ = swapped_scheduler()
    scheduler.abort_request("a")
    pool = scheduler.kv_cache_manager.pool
    while pool.num_free_blocks > 2:
        pool.allocate()
    assert advance(scheduler) == {"b": 1}


def test_nobody_behind_a_swapped_request_is_admitted_before_it() -> None:
    scheduler, taken = swapped_scheduler()
    add(scheduler, "c", 1)
    give_back(scheduler, taken, 2)  # enough for c, not for b
    assert advance(scheduler) == {"a": 1}
    give_back(scheduler, taken, 1)
    assert advance(scheduler) == {"a": 1, "b": 1}


def test_waiting_request_before_a_swapped_one_is_admitted_first() -> None:
    scheduler, taken = swapped_scheduler(scheduling_policy=SchedulingPolicy.PRIORITY)
    add(scheduler, "c", 1, priority=0)
    give_back(scheduler, taken, 4)
    assert advance(scheduler) == {"a": 1, "c": 1}
    assert [r.request_id for r in scheduler.swapped] == ["b"]


def test_full_swap_space_sends_a_request_back_to_its_prompt() -> None:
    scheduler = make_scheduler(
        num_blocks=9, preemption_mode=PreemptionMode.SWAP, swap_cache_tokens=7
    )
    add(scheduler, "a", 23)
    add(scheduler, "b", 7)
    advance(scheduler)
    advance(scheduler)
    output = scheduler.schedule()
    assert (output.num_preemptions, output.block_copies) == (1, ())
    record(scheduler, output)
    (b,) = [r for r in scheduler.requests.values() if r.request_id == "b"]
    assert (b.status, b.num_computed_tokens) == (RequestStatus.WAITING, 0)
    scheduler.abort_request("a")
    assert advance(scheduler) == {"b": 1}  # a took none of its two blocks, which are cached


def test_whoever_needs_a_block_takes_those_of_the_tail_and_nobody_comes_back_at_once() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=3)
    add(scheduler, "a", 12)
    add(scheduler, "b", 4)
    add(scheduler, "c", 4)
    add(scheduler, "d", 1)
    assert advance(scheduler) == {"a": 12, "b": 4, "c": 4}
    # The next token of each is the first of a block: 3 are free.
    assert advance(scheduler) == {"a": 1, "b": 1, "c": 1}
    assert [advance(scheduler) for _ in range(3)] == [{"a": 1, "b": 1, "c": 1}] * 3
    # a gets c's blocks, b one of them too; the third would be enough for nobody's prompt.
    output = scheduler.schedule()
    assert [s.request.request_id for s in output.scheduled] == ["a", "b"]
    assert output.num_preemptions == 1
    assert scheduler.waiting.first.request_id == "c"
    record(scheduler, output)
    assert finish(scheduler) == ["a", "b", "c", "d"]


def test_fcfs_policy_ignores_priorities() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for name, priority in (("a", 5), ("b", 1), ("c", 0)):
        add(scheduler, name, 1, priority=priority, max_tokens=1)
    assert finish(scheduler) == ["a", "b", "c"]


def test_priority_policy_admits_lower_numbers_first_and_ties_by_arrival() -> None:
    scheduler = make_scheduler(max_num_seqs=1, scheduling_policy=SchedulingPolicy.PRIORITY)
    for name, priority in (("a", 5), ("b", 1), ("c", 5), ("d", 1)):
        add(scheduler, name, 1, priority=priority, max_tokens=1)
    assert finish(scheduler) == ["b", "d", "a", "c"]


@pytest.mark.parametrize("policy", SchedulingPolicy)
def test_running_requests_are_in_the_order_of_their_place(policy) -> None:
    scheduler = make_scheduler(scheduling_policy=policy)
    add(scheduler, "a", 1, priority=2)
    advance(scheduler)
    add(scheduler, "b", 1, priority=1)
    advance(scheduler)
    expected = ["a", "b"] if policy is SchedulingPolicy.FCFS else ["b", "a"]
    assert [r.request_id for r in scheduler.running] == expected


def test_fork_waits_for_its_parents_prompt_and_then_shares_it() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 10)
    parent = scheduler.requests["a"]
    add(scheduler, "b", 10, fork_of=parent)
    add(scheduler, "c", 3)
    assert advance(scheduler) == {"a": 10, "c": 3}
    assert advance(scheduler) == {"a": 1, "c": 1, "b": 1}
    tables = scheduler.kv_cache_manager.block_tables
    assert tables == {"a": [0, 1, 2], "b": [0, 1, 4], "c": [3]}


def test_fork_that_is_not_admitted_gives_back_what_it_shares() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 10)
    parent = scheduler.requests["a"]
    advance(scheduler)
    pool = scheduler.kv_cache_manager.pool
    while pool.num_free_blocks > 1:
        pool.allocate()
    add(scheduler, "b", 10, fork_of=parent)
    assert advance(scheduler) == {"a": 1}
    assert scheduler.kv_cache_manager.block_tables == {"a": [0, 1, 2]}
    assert pool.ref_counts[:3] == [1, 1, 1]
    assert scheduler.requests["b"].num_computed_tokens == 0


def test_beam_starts_where_its_parent_is() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 7)
    parent = scheduler.requests["a"]
    advance(scheduler)
    advance(scheduler)  # 8 tokens are computed: two full blocks
    child = make_request("b", 9, fork_of=parent)
    child.token_ids[:] = parent.token_ids
    scheduler.add_request(child)
    assert advance(scheduler) == {"a": 1, "b": 1}
    assert scheduler.kv_cache_manager.block_tables == {"a": [0, 1, 2], "b": [0, 1, 3]}


def test_fork_of_a_preempted_parent_computes_its_own_prompt() -> None:
    scheduler, taken = swapped_scheduler()
    (parent,) = scheduler.swapped
    scheduler.abort_request("a")
    give_back(scheduler, taken, 4)
    parent.place = (5, 0)  # behind its fork
    add(scheduler, "c", 6, fork_of=parent)
    assert advance(scheduler) == {"c": 6}


def test_more_requests_than_tokens_in_a_step_is_refused() -> None:
    EngineConfig(max_model_len=16, max_num_batched_tokens=32, max_num_seqs=32)
    with pytest.raises(
        ValueError, match=r"max_num_batched_tokens \(32\) must be at least max_num_seqs \(33\)"
    ):
        EngineConfig(max_model_len=16, max_num_batched_tokens=32, max_num_seqs=33)
