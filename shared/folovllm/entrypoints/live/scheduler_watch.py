"""Watches a stage's scheduler decide, from outside: stages carry no code for it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from ...request import Request, RequestStatus
from .step_facts import Ended, GaveWay, Limits, Outcome, Plan, Refusal, Share, Started
from .waiting_causes import PlannedStep, explain_waits

_COVERED = ("allocate_slots", "swap_in")
"""Methods of a KV cache manager that may refuse."""


class _Victim(NamedTuple):
    request: Request
    num_blocks: int
    refusal: Refusal


class SchedulerWatch:
    """Notes what `schedule` and `update` of one scheduler do while `recording`.

    Like `HostTimers` of the benchmarks it hides methods of live objects behind its own, set on the
    instances, and uncovers them again. What it reads besides is what stages have in common: the
    queues, `Request`, and what the KV cache manager was asked and answered.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._manager = scheduler.kv_cache_manager
        self._limits = _limits(scheduler.config)
        self._refusals: dict[str, Refusal] = {}
        """Request id -> the last time it was refused, in the call of `schedule` under way."""
        self._victims: list[_Victim] = []
        self._plans: list[Plan] = []
        self._outcomes: list[Outcome] = []
        self._next_plan = self._next_outcome = 1

    @contextmanager
    def recording(self, num_steps_done: int, num_in_flight: int) -> Iterator[None]:
        """For the time of one step of the engine: afterwards `take` has what happened.

        num_steps_done: whose tokens are known; num_in_flight: launched behind those.
        """
        self._next_outcome = num_steps_done + 1
        self._next_plan = num_steps_done + num_in_flight + 1
        self._plans, self._outcomes = [], []
        scheduler, manager = self._scheduler, self._manager
        covers: list[tuple[Any, str, Callable[..., Any]]] = [
            (scheduler, "schedule", self._schedule_with(scheduler.schedule)),
            (scheduler, "update", self._update_with(scheduler.update)),
        ]
        for name in _COVERED:
            if hasattr(manager, name):
                covers.append((manager, name, self._ask_with(getattr(manager, name))))
        for owner, name, cover in covers:
            setattr(owner, name, cover)
        try:
            yield
        finally:
            for owner, name, _ in covers:
                delattr(owner, name)

    def take(self) -> tuple[list[Plan], list[Outcome]]:
        """Of the last step, in order; a step may launch none, or several."""
        return self._plans, self._outcomes

    def _schedule_with(self, schedule: Callable[[], Any]) -> Callable[[], Any]:
        def watched() -> Any:
            before = {r: r.status for r in self._scheduler.requests.values()}
            self._refusals, self._victims = {}, []
            output = schedule()
            self._plans.append(self._plan(before, output))
            self._next_plan += bool(output.scheduled)
            return output

        return watched

    def _update_with(self, update: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            num_free, num_idle = self._num_free(), self._num_idle()
            output = update(*args)
            ended = [
                Ended(token.request_id, token.finish_reason.value)
                for token in output.tokens
                if token.finish_reason is not None
            ]
            self._outcomes.append(
                Outcome(
                    number=self._next_outcome,
                    token_ids_of=tuple(token.request_id for token in output.tokens),
                    ended=tuple(ended),
                    num_freed_blocks=_difference(self._num_free(), num_free),
                    num_kept_blocks=_difference(self._num_idle(), num_idle),
                )
            )
            self._next_outcome += 1
            return output

        return watched

    def _ask_with(self, ask: Callable[..., Any]) -> Callable[..., Any]:
        """A method that says None where there is no room, but in a stage that always has some."""
        manager = self._manager
        if not hasattr(manager, "pool") and not hasattr(manager, "slots"):
            return ask
        is_swap_in = ask.__name__ == "swap_in"

        def watched(request: Request, number: int, num_spare_blocks: int = 0) -> Any:
            more = (num_spare_blocks,) if num_spare_blocks else ()
            answer = ask(request, number, *more)
            if answer is None and is_swap_in:
                num_blocks = len(manager.swapped_block_tables[request.request_id])
                self._refuse(request, num_blocks, number)
            elif answer is None:  # and nothing has changed
                self._refuse(request, self._count_needed(request, number), num_spare_blocks)
            return answer

        return watched

    def _refuse(self, request: Request, num_needed: int | None, num_spare: int) -> None:
        name = request.request_id
        refusal = Refusal(name, num_needed, num_spare, self._num_free())
        self._refusals[name] = refusal
        if request.status is RequestStatus.RUNNING:  # then the last of them gives way
            last = self._scheduler.running[-1]
            num_blocks = len(self._manager.block_tables[last.request_id])
            self._victims.append(_Victim(last, num_blocks, refusal))

    def _count_needed(self, request: Request, num_new_tokens: int) -> int | None:
        """Blocks that `allocate_slots` takes from the free ones: new ones, and copies of shared."""
        manager = self._manager
        if not hasattr(manager, "pool"):
            return None
        table = manager.block_tables.get(request.request_id, [])
        first = request.num_computed_tokens // manager.block_size
        num_blocks = -(-(request.num_computed_tokens + num_new_tokens) // manager.block_size)
        num_shared = sum(manager.pool.ref_counts[block_id] > 1 for block_id in table[first:])
        return num_blocks - len(table) + num_shared

    def _plan(self, before: Mapping[Request, RequestStatus], output: Any) -> Plan:
        scheduler = self._scheduler
        running = scheduler.running
        shares = [
            Share(s.request.request_id, s.num_scheduled_tokens, s.request.num_computed_tokens,
                  s.request.num_tokens, s.request.num_prompt_tokens)
            for s in output.scheduled
        ]  # fmt: skip
        scheduled = {share.request_id for share in shares}
        step = PlannedStep(
            limits=self._limits,
            before=before,
            running=running,
            swapped=getattr(scheduler, "swapped", []),
            num_tokens=[share.num_scheduled_tokens for share in shares],
            refusals=self._refusals,
            victims=frozenset(victim.request for victim in self._victims),
        )
        return Plan(
            number=self._next_plan,
            limits=self._limits,
            shares=tuple(shares),
            started=tuple(_started(r) for r in running if before[r] is RequestStatus.WAITING),
            resumed=tuple(
                r.request_id for r in running if before[r] is RequestStatus.SWAPPED
            ),
            gave_way=tuple(
                GaveWay(v.request.request_id, v.num_blocks,
                        v.request.status is RequestStatus.SWAPPED, v.refusal)
                for v in self._victims
            ),
            resting=tuple(r.request_id for r in running if r.request_id not in scheduled),
            waits=tuple(explain_waits(step)),
            num_waiting=len(scheduler.requests) - len(running),
        )  # fmt: skip

    def _num_free(self) -> int | None:
        manager = self._manager
        return manager.num_free_blocks if hasattr(manager, "pool") else None

    def _num_idle(self) -> int | None:
        cache = getattr(self._manager, "prefix_cache", None)
        return None if cache is None else len(cache.idle)


def _started(request: Request) -> Started:
    """A fork starts from its parent's blocks unless a cache has more."""
    parent, num_found = request.fork_of, request.num_computed_tokens
    is_shared = (
        parent is not None
        and parent.status is RequestStatus.RUNNING
        and num_found == request.num_prompt_tokens - 1 > 0
    )
    parent_id = parent.request_id if parent is not None and is_shared else None
    return Started(request.request_id, num_found, parent_id)


def _limits(config: Any) -> Limits:
    return Limits(
        max_num_batched_tokens=getattr(config, "max_num_batched_tokens", None),
        max_num_seqs=getattr(config, "max_num_seqs", None),
        max_chunk_tokens=getattr(config, "max_chunk_tokens", None),
        target_step_ms=getattr(config, "target_step_ms", None),
        mixes_prompts_and_decodes=hasattr(config, "max_chunk_tokens"),
    )


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before
