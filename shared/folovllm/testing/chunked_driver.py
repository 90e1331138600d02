"""Steps of a scheduler that computes prompts in chunks, some of them launched ahead."""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, ClassVar, NamedTuple

from ..interfaces import SamplerOutput, StepStats
from ..request import Request, RequestStatus
from .invariants import ChunkedProgress, Progress
from .scheduler_driver import SchedulerDriver
from .symbolic_cache import SymbolicCache


class _Launched(NamedTuple):
    """A step whose tokens the scheduler does not know yet."""

    scheduler_output: Any
    stats: StepStats
    sampled: SamplerOutput


class ChunkedDriver(SchedulerDriver):
    """Plays an engine that launches up to `num_ahead` steps before it reads the tokens of one."""

    progress: ClassVar[Progress] = ChunkedProgress()

    def __init__(
        self,
        scheduler: Any,
        cache: SymbolicCache,
        count_tokens: Callable[[Any], int],
        num_ahead: int,
    ) -> None:
        super().__init__(scheduler, cache, count_tokens)
        self._num_ahead = num_ahead
        self._in_flight: deque[_Launched] = deque()

    def step(
        self,
        interrupt: AbstractContextManager[None] | None = None,
        while_it_runs: Callable[[], None] = lambda: None,
    ) -> bool:
        """As in SchedulerDriver; `while_it_runs` comes with every step in flight that there is."""
        interrupt = interrupt or nullcontext()
        try:
            if self.scheduler.has_lost_requests():
                self._start_over()
            while len(self._in_flight) <= self._num_ahead and self._launch(interrupt):
                pass
            while_it_runs()
            if self._in_flight:
                self._finish_oldest(interrupt)
        except KeyboardInterrupt:
            self._start_over()
            self._check_state()
            return False
        self._check_state()
        return True

    def step_unchecked(self) -> None:
        if self.scheduler.has_lost_requests():
            self._start_over()
        while len(self._in_flight) <= self._num_ahead and self._can_launch():
            output = self.scheduler.schedule()
            sampled = self.cache.execute(output)
            if not output.scheduled:
                break
            self._in_flight.append(_Launched(output, self.scheduler.advance(output), sampled))
        if self._in_flight:
            oldest = self._in_flight.popleft()
            self.scheduler.update(oldest.scheduler_output, oldest.sampled, oldest.stats)

    def break_off(self, interrupt: AbstractContextManager[None]) -> None:
        self.scheduler.schedule()
        with suppress(KeyboardInterrupt), interrupt:
            self._start_over()

    def _can_launch(self) -> bool:
        scheduler = self.scheduler
        return scheduler.has_unfinished_requests() and not scheduler.needs_pending_tokens()

    def _launch(self, interrupt: AbstractContextManager[None]) -> bool:
        scheduler = self.scheduler
        if not self._can_launch():
            return False
        before = {request: request.status for request in scheduler.requests.values()}
        with interrupt:
            scheduled = scheduler.schedule()
        self._check_schedule(before, scheduled)
        sampled = self.cache.execute(scheduled)
        if not scheduled.scheduled:
            return False
        with interrupt:
            stats = scheduler.advance(scheduled)
        self._check_stats(stats, scheduled, finished=())
        self._in_flight.append(_Launched(scheduled, stats, sampled))
        self._check_state()
        return True

    def _finish_oldest(self, interrupt: AbstractContextManager[None]) -> None:
        scheduler_output, stats, sampled = self._in_flight[0]
        expected = [
            s.request
            for s, num_tokens in zip(
                scheduler_output.scheduled, scheduler_output.num_tokens, strict=True
            )
            if num_tokens is not None and s.request.finish_reason is None
        ]
        with interrupt:
            output = self.scheduler.update(scheduler_output, sampled, stats)
        self._in_flight.popleft()
        assert output.stats is stats
        self._report(output, expected, scheduler_output, sampled.token_ids)

    def _start_over(self) -> None:
        oldest = self._in_flight[0].scheduler_output if self._in_flight else None
        self.scheduler.start_over(oldest)
        self._in_flight.clear()

    def _is_passed(self, request: Request) -> bool:
        """A fork waits for as many steps as its parent's prompt takes, and nobody waits for it."""
        parent = request.fork_of
        return (
            request.status is RequestStatus.WAITING
            and parent is not None
            and parent.status is RequestStatus.RUNNING
            and parent.num_computed_tokens < request.num_prompt_tokens - 1
        )

    def _check_shares(self, output: Any, started: list[Request]) -> None:
        """Everybody that runs gets something, unless its last token is on its way."""
        scheduler = self.scheduler
        has_room = {r for r in scheduler.running if r.num_output_tokens < r.max_tokens}
        assert {s.request for s in output.scheduled} == has_room
        assert len(output.scheduled) == len(has_room)
        # Nobody is served only while the last tokens of those who run are on their way.
        assert has_room or self._in_flight or not scheduler.requests, "nothing is computed"
        limit = scheduler.config.max_chunk_tokens or scheduler.config.max_num_batched_tokens
        for s, num_tokens in zip(output.scheduled, output.num_tokens, strict=True):
            num_left = s.request.num_tokens - s.request.num_computed_tokens
            assert 0 < s.num_scheduled_tokens <= min(num_left, limit)
            is_last = s.num_scheduled_tokens == num_left
            assert num_tokens == (s.request.num_tokens if is_last else None)
            assert s.request.num_pending_tokens == 0 or num_left == 1
