"""One request at a time, in order of arrival."""

import pytest

from folovllm.interfaces import SamplerOutput
from folovllm.request import RequestStatus, SamplingParams
from folovllm.testing.driver import make_requests
from m1_baseline.config import EngineConfig
from m1_baseline.kv_cache_manager import KVCacheManager
from m1_baseline.scheduler import Scheduler

PARAMS = SamplingParams(max_tokens=2, temperature=0.0)


def make_scheduler() -> Scheduler:
    config = EngineConfig(max_model_len=32)
    return Scheduler(config, KVCacheManager(config, num_tokens=32))


def advance(scheduler: Scheduler) -> tuple[str, int]:
    """Run one step without a model; return what it computed."""
    output = scheduler.schedule()
    (scheduled,) = output.scheduled
    scheduler.update(output, SamplerOutput(token_ids=[7], logprobs=[None]))
    return scheduled.request.request_id, scheduled.num_scheduled_tokens


def test_a_request_runs_to_its_end_before_the_next_starts() -> None:
    scheduler = make_scheduler()
    for request in make_requests([[1, 2, 3], [4, 5]], PARAMS):
        scheduler.add_request(request)
    assert [advance(scheduler) for _ in range(4)] == [("r0", 3), ("r0", 1), ("r1", 2), ("r1", 1)]
    assert not scheduler.has_unfinished_requests()


def test_waiting_request_can_be_aborted_and_never_runs() -> None:
    scheduler = make_scheduler()
    for request in make_requests([[1], [2], [3]], PARAMS):
        scheduler.add_request(request)
    advance(scheduler)
    scheduler.abort_request("r1")
    assert [advance(scheduler)[0] for _ in range(3)] == ["r0", "r2", "r2"]


def test_stats_count_what_is_cached_and_reserved() -> None:
    scheduler = make_scheduler()
    for request in make_requests([[1, 2, 3], [4]], PARAMS):
        scheduler.add_request(request)
    output = scheduler.schedule()
    stats = scheduler.update(output, SamplerOutput(token_ids=[7], logprobs=[None])).stats
    assert (stats.num_running, stats.num_waiting) == (1, 1)
    assert stats.num_kv_tokens_live == stats.num_kv_tokens_reserved == 3
    assert stats.num_kv_tokens_capacity == 32


def test_cache_has_one_owner() -> None:
    manager = KVCacheManager(EngineConfig(max_model_len=32), num_tokens=32)
    owner, other = make_requests([[1], [2]], PARAMS)
    manager.allocate_slots(owner, 1)
    with pytest.raises(RuntimeError, match="r1 was scheduled while r0 owns"):
        manager.allocate_slots(other, 1)
    manager.free(other)
    assert manager.owner == "r0"
    manager.free(owner)
    manager.allocate_slots(other, 1)
    assert manager.owner == "r1"


def test_finished_request_has_its_status() -> None:
    scheduler = make_scheduler()
    (request,) = make_requests([[1]], PARAMS)
    scheduler.add_request(request)
    advance(scheduler)
    assert request.status is RequestStatus.RUNNING
    advance(scheduler)
    assert request.status is RequestStatus.FINISHED
