"""Checks what somebody who watches a scheduler is told, step by step, the long way round."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..entrypoints.live.engine_view import CACHED, FIRST_REQUEST, FREE, SHARED, view_engine
from ..entrypoints.live.scheduler_watch import SchedulerWatch
from ..entrypoints.live.step_facts import Cause, Plan
from ..entrypoints.live.step_story import tell_step
from ..request import RequestStatus
from .scheduler_driver import SchedulerDriver


@contextmanager
def watched_steps(driver: SchedulerDriver) -> Iterator[None]:
    """Every step of `driver` is watched and what is told of it is checked."""
    scheduler, step = driver.scheduler, driver.step
    watch, num_done = SchedulerWatch(scheduler), 0

    def watched(*args: Any, **kwargs: Any) -> bool:
        nonlocal num_done
        num_ahead = len(getattr(driver, "_in_flight", ()))
        with watch.recording(num_done, num_ahead):
            schedule, outputs = scheduler.schedule, []

            def noted() -> Any:
                before = {r: r.status for r in scheduler.requests.values()}
                outputs.append((before, schedule()))
                check_plan(scheduler, *outputs[-1], watch.take()[0][-1])
                return outputs[-1][1]

            scheduler.schedule = noted
            is_done = step(*args, **kwargs)
        plans, outcomes = watch.take()
        num_done += len(outcomes)
        assert len(plans) == len(outputs) and len(outcomes) <= 1
        assert len(tell_step(plans, outcomes)) >= len(plans)
        assert "schedule" not in vars(scheduler), "the watch is still there"
        check_view(scheduler)
        return is_done

    driver.step = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        driver.step = step  # type: ignore[method-assign]


def tell_next_step(driver: SchedulerDriver, num_steps_done: int) -> list[str]:
    """What is said of the next step of a driver that launches none ahead."""
    watch = SchedulerWatch(driver.scheduler)
    with watch.recording(num_steps_done, num_in_flight=0):
        driver.step()
    return tell_step(*watch.take())


def check_plan(scheduler: Any, before: dict[Any, RequestStatus], output: Any, plan: Plan) -> None:
    """The plan says of everybody what the queues say, and of whoever waits a cause that holds."""
    names = {r.request_id: r for r in before}
    assert [(s.request_id, s.num_scheduled_tokens) for s in plan.shares] == [
        (s.request.request_id, s.num_scheduled_tokens) for s in output.scheduled
    ]
    running = {r.request_id for r in scheduler.running}
    came = {name for name in running if before[names[name]] is not RequestStatus.RUNNING}
    assert {s.request_id for s in plan.started} | set(plan.resumed) == came
    victims = {gave.request_id for gave in plan.gave_way}
    assert len(victims) == len(plan.gave_way) == getattr(output, "num_preemptions", 0)
    for gave in plan.gave_way:
        assert names[gave.request_id].status is not RequestStatus.RUNNING
        assert (gave.refusal.num_needed or 0) > (gave.refusal.num_free or 0)
    assert {share.request_id for share in plan.shares} | set(plan.resting) == running
    assert plan.num_waiting == len(before) - len(running)
    assert bool(plan.waits) == bool(plan.num_waiting)
    for wait in plan.waits:
        assert (wait.cause is None) == (wait.request_id in victims), f"{wait} in {plan}"
        check_cause(scheduler, plan, wait)


def check_cause(scheduler: Any, plan: Plan, wait: Any) -> None:
    config, refusal = scheduler.config, wait.refusal
    if wait.cause is Cause.NO_ROOM and refusal.num_needed is not None:
        assert refusal.num_needed + refusal.num_spare > refusal.num_free >= 0
        assert refusal.num_needed >= 0 and refusal.num_spare >= 0
    elif wait.cause is Cause.NO_ROOM:
        assert not scheduler.kv_cache_manager.free_slots
    elif wait.cause is Cause.NO_PLACE:
        num_running = len(scheduler.running) + len(plan.gave_way)
        assert num_running == getattr(config, "max_num_seqs", 1)
    elif wait.cause is Cause.OTHERS_FIRST:
        assert scheduler.requests[wait.other_id].place < scheduler.requests[wait.request_id].place
    elif wait.cause in (Cause.TOO_LONG_FOR_BUDGET, Cause.TOO_LONG_IF_PADDED):
        assert plan.started, "the first prompt always fits"


def check_view(scheduler: Any) -> None:
    """Every cell of the map says whose it is."""
    view, manager = view_engine(scheduler), scheduler.kv_cache_manager
    assert len(view.requests) + view.num_left_out == len(scheduler.requests)
    memory = view.memory
    if memory is None:
        assert not hasattr(manager, "pool") and not hasattr(manager, "slots")
        return
    holders = defaultdict(list)
    tables = getattr(manager, "block_tables", None) or {
        name: [slot] for name, slot in getattr(manager, "slots", {}).items()
    }
    for index, request in enumerate(view.requests):
        for unit in tables.get(request.request_id, ()):
            holders[unit].append(index)
    assert memory.stride == 1 and len(memory.cells) == memory.num_units
    for unit, cell in enumerate(memory.cells):
        expected = holders.get(unit, [])
        if len(expected) == 1:
            assert cell == FIRST_REQUEST + expected[0]
        elif expected:
            assert cell == SHARED and memory.holders[unit] == expected
        else:
            assert cell in (FREE, CACHED) and memory.holders.get(unit) is None
    assert memory.num_free == sum(cell in (FREE, CACHED) for cell in memory.cells)
    assert (memory.num_cached or 0) == memory.cells.count(CACHED)
