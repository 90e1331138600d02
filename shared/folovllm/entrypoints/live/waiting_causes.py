"""Why the heads of a scheduler's queues did not come to run, from what could be seen of a step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...request import Request, RequestStatus
from .step_facts import Cause, Limits, Refusal, Wait


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """What is known when `schedule` has returned."""

    limits: Limits
    before: Mapping[Request, RequestStatus]
    """Of all requests, when `schedule` was called."""
    running: Sequence[Request]
    swapped: Sequence[Request]
    num_tokens: Sequence[int]
    """What each scheduled request gets."""
    refusals: Mapping[str, Refusal]
    """Request id -> what the KV cache manager had no room for."""
    victims: frozenset[Request]
    """Who gave way."""

    @property
    def is_full(self) -> bool:
        """Whether as many ran as may, before somebody gave way."""
        return len(self.running) + len(self.victims) >= (self.limits.max_num_seqs or 1)

    @property
    def is_spent(self) -> bool:
        budget = self.limits.max_num_batched_tokens
        return self.limits.mixes_prompts_and_decodes and sum(self.num_tokens) == budget

    @property
    def is_closed(self) -> bool:
        """Whether nobody was let in because somebody had to go."""
        return self.limits.mixes_prompts_and_decodes and bool(self.victims)


def explain_waits(step: PlannedStep) -> Iterator[Wait]:
    """The swapped request that comes back first; then the queue, to the first whom others wait for.

    Where chunks are computed, a fork whose parent's prompt is under way lets others pass.
    """
    if step.swapped:
        yield _explain_swapped(step, step.swapped[0])
    waiting = [r for r in step.before if r.status is RequestStatus.WAITING]
    for request in sorted(waiting, key=lambda r: r.place):
        wait = _explain_waiting(step, request)
        yield wait
        lets_pass = wait.cause is Cause.PARENT_STARTS and step.limits.mixes_prompts_and_decodes
        if not lets_pass:
            return


def _explain_swapped(step: PlannedStep, request: Request) -> Wait:
    refusal = step.refusals.get(request.request_id)
    cause, other_id = None, None
    if request not in step.victims:
        first = min(
            (r for r, status in step.before.items() if status is RequestStatus.WAITING),
            key=lambda r: r.place,
            default=None,
        )
        if step.is_closed:
            cause = Cause.PREEMPTION
        elif refusal is not None:
            cause = Cause.NO_ROOM
        elif first is not None and first.place < request.place:
            cause, other_id = Cause.OTHERS_FIRST, first.request_id
        elif step.is_full:
            cause = Cause.NO_PLACE
        elif step.is_spent:
            cause = Cause.NO_BUDGET
    num_left = request.num_tokens - request.num_computed_tokens
    return Wait(request.request_id, num_left, True, cause, refusal, other_id)


def _explain_waiting(step: PlannedStep, request: Request) -> Wait:
    refusal, parent = step.refusals.get(request.request_id), request.fork_of
    num_left = request.num_tokens
    if parent is not None and parent.status is RequestStatus.RUNNING:
        num_left -= request.num_prompt_tokens - 1  # they would be the parent's
    cause, other_id = None, None
    swapped = [r for r in step.swapped if r not in step.victims]
    if request in step.victims:
        pass  # it has just been told
    elif step.is_closed:
        cause = Cause.PREEMPTION
    elif refusal is not None:
        cause = Cause.NO_ROOM
    elif step.is_full:
        cause = Cause.NO_PLACE
    elif swapped and swapped[0].place < request.place:
        cause, other_id = Cause.OTHERS_FIRST, swapped[0].request_id
    elif step.is_spent:
        cause = Cause.NO_BUDGET
    elif parent is not None and _is_starting(request, parent):
        cause, other_id = Cause.PARENT_STARTS, parent.request_id
    else:
        cause = _explain_length(step, num_left)
    return Wait(request.request_id, num_left, False, cause, refusal, other_id)


def _is_starting(request: Request, parent: Request) -> bool:
    is_computed = parent.num_computed_tokens >= request.num_prompt_tokens - 1
    return parent.status is RequestStatus.RUNNING and not is_computed


def _explain_length(step: PlannedStep, num_left: int) -> Cause | None:
    """Where prompts start in whole or not at all."""
    budget = step.limits.max_num_batched_tokens
    if budget is None or step.limits.mixes_prompts_and_decodes:
        return None
    if sum(step.num_tokens) + num_left > budget:
        return Cause.TOO_LONG_FOR_BUDGET
    if max((num_left, *step.num_tokens)) * (len(step.num_tokens) + 1) > budget:
        return Cause.TOO_LONG_IF_PADDED
    return None
