"""Steps of a scheduler without a model, every promise checked after each."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, ClassVar

from ..interfaces import StepOutput, StepStats, TokenOutput
from ..request import FinishReason, Request, RequestStatus
from .invariants import Progress, check_bookkeeping, count_live_tokens
from .symbolic_cache import SymbolicCache, expected_finish_reason, tokens_alone

MAX_STEPS = 2000
"""Far more than any run of a test needs: beyond it the scheduler hangs."""


class SchedulerDriver:
    """Plays the engine: schedule, execute, update, and start over when that breaks off."""

    progress: ClassVar[Progress] = Progress()
    """What holds of the requests with blocks between two steps."""

    def __init__(
        self, scheduler: Any, cache: SymbolicCache, count_tokens: Callable[[Any], int]
    ) -> None:
        """count_tokens: what a step's requests take of `max_num_batched_tokens`."""
        self.scheduler = scheduler
        self.requests: list[Request] = []
        """All that were ever added."""
        self.cache = cache
        self._count_tokens = count_tokens
        self._reported: dict[Request, list[int]] = {}
        self._places: dict[Request, tuple[int, int]] = {}
        self._aborted: set[Request] = set()

    def add(self, request: Request) -> None:
        self.scheduler.add_request(request)
        self.requests.append(request)
        self._reported[request] = []
        self._places[request] = request.place

    def abort(self, request: Request) -> None:
        if request.status is not RequestStatus.FINISHED:
            self._aborted.add(request)
        self.scheduler.abort_request(request.request_id)

    def step(
        self,
        interrupt: AbstractContextManager[None] | None = None,
        while_it_runs: Callable[[], None] = lambda: None,
    ) -> bool:
        """One step; False if it broke off.

        interrupt: around `schedule` and around `update`. while_it_runs: called between the two;
        it may abort requests, or break the step off with a KeyboardInterrupt.
        """
        interrupt = interrupt or nullcontext()
        scheduler, scheduled = self.scheduler, None
        before = {request: request.status for request in scheduler.requests.values()}
        try:
            with interrupt:
                scheduled = scheduler.schedule()
            self._check_schedule(before, scheduled)
            sampled = self.cache.execute(scheduled)
            while_it_runs()
            unfinished = [s.request for s in scheduled.scheduled if not _is_finished(s.request)]
            with interrupt:
                output = scheduler.update(scheduled, sampled)
        except KeyboardInterrupt:
            scheduler.start_over(scheduled)
            self._check_state()
            return False
        self._report(output, unfinished, scheduled, sampled.token_ids)
        finished = [token for token in output.tokens if token.finish_reason is not None]
        self._check_stats(output.stats, scheduled, finished)
        self._check_state()
        return True

    def step_unchecked(self) -> None:
        """One step that looks at nothing."""
        step = self.scheduler.schedule()
        self.scheduler.update(step, self.cache.execute(step))

    def break_off(self, interrupt: AbstractContextManager[None]) -> None:
        """Schedule a step and start over, with an interrupt in that."""
        step = self.scheduler.schedule()
        with suppress(KeyboardInterrupt), interrupt:
            self.scheduler.start_over(step)

    def _check_state(self) -> None:
        check_bookkeeping(self.scheduler, self.progress)
        self._check_requests()
        self._empty_free_blocks()

    def check_end(self) -> None:
        """Nothing is left, and everybody got the tokens that it gets alone."""
        assert not self.scheduler.has_unfinished_requests()
        check_bookkeeping(self.scheduler, self.progress)
        assert self.scheduler.kv_cache_manager.num_reserved_tokens == 0
        for request in self.requests:
            expected, output = tokens_alone(request), request.output_token_ids
            assert request.fork_of is None
            if request in self._aborted:
                assert request.finish_reason is FinishReason.ABORT
                assert output == expected[: len(output)]
            else:
                assert output == expected
                reason = expected_finish_reason(request, output[-1], len(output))
                assert request.finish_reason is reason

    def _check_schedule(self, before: dict[Request, RequestStatus], output: Any) -> None:
        scheduler = self.scheduler
        budget = getattr(scheduler.config, "max_num_batched_tokens", None)
        assert budget is None or self._count_tokens(output.scheduled) <= budget
        running = scheduler.running
        assert len(running) <= getattr(scheduler.config, "max_num_seqs", 1)
        started = [r for r in running if before[r] is RequestStatus.WAITING]
        returned = [r for r in running if before[r] is RequestStatus.SWAPPED]
        gone = [r for r in before if r not in running and before[r] is RequestStatus.RUNNING]
        self._check_shares(output, started if gone == [] else [])
        self._check_order(before, started, returned, gone)
        assert getattr(output, "num_preemptions", 0) == len(gone)
        manager = scheduler.kv_cache_manager
        if started and hasattr(manager, "pool"):
            assert manager.num_free_blocks >= len(running) - 1, "nobody's next block is spare"

    def _check_shares(self, output: Any, started: list[Request]) -> None:
        """Who started computes its prompt, without the others; or else everybody computes."""
        scheduler = self.scheduler
        scheduled = [s.request for s in output.scheduled]
        assert bool(scheduled) == bool(scheduler.requests), "requests wait and nothing is computed"
        assert scheduled == (started or scheduler.running)
        for s in output.scheduled:
            num_tokens_left = s.request.num_tokens - s.request.num_computed_tokens
            assert s.num_scheduled_tokens == num_tokens_left > 0

    def _check_order(
        self,
        before: dict[Request, RequestStatus],
        started: list[Request],
        returned: list[Request],
        gone: list[Request],
    ) -> None:
        """Whoever comes to run is before all that could have instead; who goes is behind."""
        waiting, swapped = (
            [r.place for r in before if r.status is status and not self._is_passed(r)]
            for status in (RequestStatus.WAITING, RequestStatus.SWAPPED)
        )
        came = [r.place for r in (*started, *returned)]
        if gone:
            assert came == [], "somebody came in the step of a preemption"
            running = [r.place for r in self.scheduler.running]
            assert max(running) < min(r.place for r in gone)
        elif came:
            assert max(came) < min((*waiting, *swapped), default=(1 << 60, 0))

    def _is_passed(self, request: Request) -> bool:
        """Whether others may come to run before a request that is not behind them."""
        return False

    def _report(
        self, output: StepOutput, unfinished: list[Request], scheduled: Any, token_ids: list[int]
    ) -> None:
        sampled = {
            s.request: token_id
            for s, token_id in zip(scheduled.scheduled, token_ids, strict=True)
            if s.request in unfinished
        }
        assert [t.request_id for t in output.tokens] == [r.request_id for r in sampled]
        for token, (request, token_id) in zip(output.tokens, sampled.items(), strict=True):
            assert token.token_id == token_id
            self._reported[request].append(token_id)
            reason = expected_finish_reason(request, token_id, len(self._reported[request]))
            assert token.finish_reason is request.finish_reason is reason

    def _check_requests(self) -> None:
        for request, token_ids in self._reported.items():
            assert request.output_token_ids == token_ids, f"{request.request_id}: told otherwise"
            assert request.place == self._places[request], f"{request.request_id} lost its place"

    def _check_stats(
        self, stats: StepStats, scheduled: Any, finished: Sequence[TokenOutput]
    ) -> None:
        """finished: requests that left since the forward pass."""
        scheduler = self.scheduler
        num_tokens = sum(s.num_scheduled_tokens for s in scheduled.scheduled)
        assert stats.num_scheduled_tokens == num_tokens
        assert stats.num_scheduled_requests == len(scheduled.scheduled)
        assert stats.num_running == len(scheduler.running) + len(finished)
        assert stats.num_waiting == len(scheduler.requests) - len(scheduler.running)
        assert stats.num_kv_tokens_live <= stats.num_kv_tokens_reserved
        assert stats.num_kv_tokens_reserved <= stats.num_kv_tokens_capacity
        manager = scheduler.kv_cache_manager
        if not finished:
            assert stats.num_kv_tokens_reserved == manager.num_reserved_tokens
            live = sum(request.num_computed_tokens for request in scheduler.running)
            if hasattr(manager, "pool"):
                live = count_live_tokens(scheduler)
                assert stats.num_free_blocks == manager.num_free_blocks
                assert stats.num_used_blocks == manager.num_used_blocks
            assert stats.num_kv_tokens_live == live
        if hasattr(manager, "pool"):
            swaps = [c for c in scheduled.block_copies if c.kind.name != "COPY_ON_WRITE"]
            assert stats.num_swapped_tokens == len(swaps) * manager.block_size
            assert stats.num_preemptions == scheduled.num_preemptions

    def _empty_free_blocks(self) -> None:
        manager = self.scheduler.kv_cache_manager
        if hasattr(manager, "pool"):
            self.cache.forget(manager.pool.free_block_ids, manager.swap_pool.free_block_ids)
        elif hasattr(manager, "slots"):
            self.cache.forget(manager.free_slots, ())
        elif manager.owner is None:
            self.cache.forget([0], ())


def _is_finished(request: Request) -> bool:
    return request.status is RequestStatus.FINISHED
