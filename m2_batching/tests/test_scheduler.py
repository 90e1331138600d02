"""Who is admitted when, and into which slot."""

import pytest

from folovllm.interfaces import SamplerOutput
from folovllm.request import Request, SamplingParams
from folovllm.testing.driver import make_requests
from m2_batching.config import EngineConfig, SchedulingPolicy
from m2_batching.kv_cache_manager import KVCacheManager
from m2_batching.scheduler import Scheduler

PARAMS = SamplingParams(max_tokens=3, temperature=0.0)


def make_scheduler(num_slots: int = 4, **options: object) -> Scheduler:
    config = EngineConfig(
        **{"max_model_len": 16, "max_num_batched_tokens": 24, "max_num_seqs": 8, **options}
    )
    return Scheduler(config, KVCacheManager(config, num_tokens=16 * num_slots))


def add(scheduler: Scheduler, *prompt_lens: int, params: SamplingParams = PARAMS) -> list[Request]:
    requests = make_requests([[1] * n for n in prompt_lens], params)
    for request in requests:
        scheduler.add_request(request)
    return requests


def advance(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """Run one step without a model; return (request, tokens, slot) of what it computed."""
    output = scheduler.schedule()
    n = len(output.scheduled)
    scheduler.update(output, SamplerOutput(token_ids=[7] * n, logprobs=[None] * n))
    return [(s.request.request_id, s.num_scheduled_tokens, s.slot) for s in output.scheduled]


def test_prompts_start_together_then_everything_advances_by_one() -> None:
    scheduler = make_scheduler()
    add(scheduler, 3, 5)
    assert advance(scheduler) == [("r0", 3, 0), ("r1", 5, 1)]
    assert advance(scheduler) == [("r0", 1, 0), ("r1", 1, 1)]


def test_padding_counts_against_the_token_budget() -> None:
    scheduler = make_scheduler()
    add(scheduler, 2, 9, 2)
    # 2 prompts padded to 9 are 18 tokens; a third would make 27 of 24.
    assert advance(scheduler) == [("r0", 2, 0), ("r1", 9, 1)]
    assert advance(scheduler) == [("r2", 2, 2)]


def test_budget_is_used_to_its_last_token() -> None:
    scheduler = make_scheduler()
    add(scheduler, 3, 12)
    assert advance(scheduler) == [("r0", 3, 0), ("r1", 12, 1)]


def test_request_joins_while_others_run_and_takes_the_lowest_free_slot() -> None:
    scheduler = make_scheduler(num_slots=3)
    add(scheduler, 2, 2, 2)
    advance(scheduler)
    scheduler.abort_request("r1")
    scheduler.add_request(make_requests([[1, 1]], PARAMS, ids=["late"])[0])
    assert advance(scheduler) == [("late", 2, 1)]
    assert [name for name, _, _ in advance(scheduler)] == ["r0", "r2", "late"]


def test_requests_leave_at_their_own_last_token() -> None:
    scheduler = make_scheduler()
    short = SamplingParams(max_tokens=1)
    for request in make_requests([[1], [1]], [PARAMS, short]):
        scheduler.add_request(request)
    assert len(advance(scheduler)) == 2
    assert advance(scheduler) == [("r0", 1, 0)]
    assert advance(scheduler) == [("r0", 1, 0)]
    assert not scheduler.has_unfinished_requests()


def test_nobody_is_admitted_without_a_slot_and_order_is_kept() -> None:
    scheduler = make_scheduler(num_slots=1)
    add(scheduler, 4, 1)
    assert advance(scheduler) == [("r0", 4, 0)]
    assert advance(scheduler) == [("r0", 1, 0)]
    assert advance(scheduler) == [("r0", 1, 0)]
    assert advance(scheduler) == [("r1", 1, 0)]


def test_max_num_seqs_limits_the_running_requests() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    add(scheduler, 1, 1, 1)
    assert len(advance(scheduler)) == 2
    assert [name for name, _, _ in advance(scheduler)] == ["r0", "r1"]


def test_priority_policy_admits_lower_numbers_first_and_ties_by_arrival() -> None:
    scheduler = make_scheduler(num_slots=1, scheduling_policy=SchedulingPolicy.PRIORITY)
    for request_id, priority in (("a", 5), ("b", 1), ("c", 5), ("d", 1)):
        (request,) = make_requests([[1]], SamplingParams(max_tokens=1), ids=[request_id])
        request.priority = priority
        scheduler.add_request(request)
    assert [advance(scheduler)[0][0] for _ in range(4)] == ["b", "d", "a", "c"]


def test_fcfs_policy_ignores_priorities() -> None:
    scheduler = make_scheduler(num_slots=1)
    for request_id, priority in (("a", 5), ("b", 1)):
        (request,) = make_requests([[1]], SamplingParams(max_tokens=1), ids=[request_id])
        request.priority = priority
        scheduler.add_request(request)
    assert [advance(scheduler)[0][0] for _ in range(2)] == ["a", "b"]


def test_abort_of_a_waiting_request_keeps_the_order_of_the_rest() -> None:
    scheduler = make_scheduler(num_slots=1)
    add(scheduler, 1, 1, 1, 1, params=SamplingParams(max_tokens=1))
    scheduler.abort_request("r1")
    assert [advance(scheduler)[0][0] for _ in range(3)] == ["r0", "r2", "r3"]


def test_slots_are_reserved_whole() -> None:
    scheduler = make_scheduler()
    add(scheduler, 3, 5)
    output = scheduler.schedule()
    stats = scheduler.update(output, SamplerOutput(token_ids=[7, 7], logprobs=[None, None])).stats
    assert stats.num_kv_tokens_live == 8
    assert stats.num_kv_tokens_reserved == 32
    assert stats.num_kv_tokens_capacity == 64


def test_manager_returns_none_and_changes_nothing_when_full() -> None:
    config = EngineConfig(max_model_len=16)
    manager = KVCacheManager(config, num_tokens=16)
    first, second = make_requests([[1], [1]], PARAMS)
    assert manager.allocate_slots(first, 1) == 0
    assert manager.allocate_slots(second, 1) is None
    assert manager.slots == {"r0": 0}
    manager.free(second)
    manager.free(first)
    assert manager.allocate_slots(second, 1) == 0


def test_lowest_free_slot_goes_first_in_whatever_order_slots_come_back() -> None:
    manager = KVCacheManager(EngineConfig(max_model_len=16), num_tokens=80)
    requests = make_requests([[1]] * 5, PARAMS)
    assert [manager.allocate_slots(request, 1) for request in requests] == [0, 1, 2, 3, 4]
    for index in (3, 1, 4, 0):
        manager.free(requests[index])
    assert [manager.allocate_slots(requests[index], 1) for index in (4, 3, 1, 0)] == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"max_num_batched_tokens": 15}, r"max_num_batched_tokens \(15\) must be at least"),
        (
            {"max_num_batched_tokens": 32, "max_num_seqs": 33},
            r"max_num_batched_tokens \(32\) must be at least max_num_seqs \(33\): every running",
        ),
        ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization must be in \(0, 1\], got 1.5"),
        ({"gpu_memory_utilization": "0.5"}, "gpu_memory_utilization must be a number, got '0.5'"),
        (
            {"scheduling_policy": "priority"},
            "must be SchedulingPolicy.FCFS or SchedulingPolicy.PRIORITY, got 'priority'",
        ),
    ],
)
def test_option_that_cannot_work_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**{"max_model_len": 16, **options})
