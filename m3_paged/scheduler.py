"""Which requests run in the next step, and how many tokens of each."""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from operator import attrgetter
from typing import NamedTuple

from folovllm.interfaces import SamplerOutput, StepOutput, StepStats, TokenOutput
from folovllm.request import FinishReason, Request, RequestStatus
from folovllm.request_queue import RequestQueue

from .config import EngineConfig, PreemptionMode, SchedulingPolicy
from .kv_cache_manager import BlockCopy, CopyKind, KVCacheManager


class ScheduledRequest(NamedTuple):
    """One request's share of a step."""

    request: Request
    num_scheduled_tokens: int
    block_table: tuple[int, ...]


@dataclass(frozen=True)
class SchedulerOutput:
    """What one step computes; empty when there is nothing to do."""

    scheduled: tuple[ScheduledRequest, ...]
    block_copies: tuple[BlockCopy, ...]
    """To be performed in this order, before the forward pass"""
    num_preemptions: int = 0
    num_tokens: Sequence[int] = ()
    """Of every scheduled request, before the step."""


class Scheduler:
    """Requests join and leave the batch at every step (iteration-level scheduling, Orca).

    First come, first served, or by priority and then first come. A step computes whole prompts
    if any can start, else one token of every running request: a padded batch of both would be
    mostly padding.

    When a running request needs a block and none is free, the last in order gives way: its
    blocks are swapped out or dropped, and it comes back before anybody who is behind it. A
    request is admitted only if every running one could still take another block, so that whoever
    comes back gets something done before the next preemption.
    """

    def __init__(self, config: EngineConfig, kv_cache_manager: KVCacheManager) -> None:
        self.config = config
        self.kv_cache_manager = kv_cache_manager
        self.requests: dict[str, Request] = {}
        self.waiting = RequestQueue()
        self.swapped: list[Request] = []
        """In the order of `place`; so is `running`."""
        self.running: list[Request] = []
        self.arrivals = count()

    def add_request(self, request: Request) -> None:
        if request.request_id in self.requests:
            raise ValueError(
                f"request id {request.request_id!r} is in use; give every request its own"
            )
        by_priority = self.config.scheduling_policy is SchedulingPolicy.PRIORITY
        priority = request.priority if by_priority else 0
        request.place = (priority, next(self.arrivals))
        self.requests[request.request_id] = request
        self.waiting.push(request)

    def abort_request(self, request_id: str) -> None:
        request = self.requests.get(request_id)
        if request is None:
            return
        queues = {RequestStatus.RUNNING: self.running, RequestStatus.SWAPPED: self.swapped}
        queue: list[Request] | RequestQueue = queues.get(request.status, self.waiting)
        # In one line: an interrupt comes before or after, and `schedule` tidies up what is left.
        self.requests.pop(request_id).finish(FinishReason.ABORT)
        self.kv_cache_manager.free(request)
        queue.remove(request)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def schedule(self) -> SchedulerOutput:
        """Bring swapped requests back, start prompts; if none can, advance all that runs."""
        if len(self.waiting) + len(self.swapped) + len(self.running) != len(self.requests):
            self.start_over()  # Ctrl-C came where a request was in no queue
        block_copies: list[BlockCopy] = []
        self._resume_swapped(block_copies)
        num_held = len(self.running)
        scheduled = self._schedule_waiting(block_copies)
        num_preemptions = 0
        if not scheduled:
            scheduled = self._schedule_running(block_copies)
            num_preemptions = num_held - len(self.running)
        num_tokens = [len(s.request.token_ids) for s in scheduled]
        return SchedulerOutput(tuple(scheduled), tuple(block_copies), num_preemptions, num_tokens)

    def _resume_swapped(self, block_copies: list[BlockCopy]) -> None:
        while self.swapped and len(self.running) < self.config.max_num_seqs:
            if self.waiting and self.waiting.first.place < self.swapped[0].place:
                return
            # The one that comes back wants to grow as well, unless it has the pool to itself.
            num_spare_blocks = len(self.running) + 1 if self.running else 0
            copies = self.kv_cache_manager.swap_in(self.swapped[0], num_spare_blocks)
            if copies is None:
                return
            block_copies += copies
            self._run(self.swapped.pop(0))

    def _schedule_waiting(self, block_copies: list[BlockCopy]) -> list[ScheduledRequest]:
        scheduled: list[ScheduledRequest] = []
        max_query_len = 0
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            request = self.waiting.first
            if self.swapped and self.swapped[0].place < request.place:
                break
            if self._is_parent_starting(request):
                break
            self._share_prompt(request)
            num_new_tokens = request.num_tokens - request.num_computed_tokens
            max_query_len = max(max_query_len, num_new_tokens)
            copies = None
            # Attention pads every prompt to the longest: that is what the step costs.
            if max_query_len * (len(scheduled) + 1) <= self.config.max_num_batched_tokens:
                copies = self.kv_cache_manager.allocate_slots(
                    request, num_new_tokens, num_spare_blocks=len(self.running)
                )
            if copies is None:
                self._forget(request)
                break
            block_copies += copies
            self.waiting.pop()
            self._run(request)
            scheduled.append(self._scheduled(request, num_new_tokens))
        return scheduled

    def _schedule_running(self, block_copies: list[BlockCopy]) -> list[ScheduledRequest]:
        """Serve from the head; whoever cannot get a block takes those of the tail."""
        scheduled: list[ScheduledRequest] = []
        while len(scheduled) < len(self.running):
            request = self.running[len(scheduled)]
            num_new_tokens = request.num_tokens - request.num_computed_tokens
            copies = self.kv_cache_manager.allocate_slots(request, num_new_tokens)
            if copies is None:
                self._preempt(self.running.pop(), block_copies)
                continue
            block_copies += copies
            scheduled.append(self._scheduled(request, num_new_tokens))
        return scheduled

    def _preempt(self, request: Request, block_copies: list[BlockCopy]) -> None:
        """Take a request's blocks; it goes on where it was, or is computed from its prompt."""
        if self.config.preemption_mode is PreemptionMode.SWAP:
            copies = self.kv_cache_manager.swap_out(request)
            if copies is not None:
                block_copies += copies
                request.status = RequestStatus.SWAPPED
                insort(self.swapped, request, key=attrgetter("place"))
                return
        self._queue_again(request)

    def _queue_again(self, request: Request) -> None:
        self._forget(request)
        request.status = RequestStatus.WAITING
        self.waiting.push(request)

    def _is_parent_starting(self, request: Request) -> bool:
        """Whether the prompt to share is part of this very step: then the fork waits for it."""
        parent = request.fork_of
        return (
            parent is not None
            and parent.status is RequestStatus.RUNNING
            and parent.num_computed_tokens < request.num_prompt_tokens - 1
        )

    def _share_prompt(self, request: Request) -> None:
        """Let a fork start from its parent's blocks, if the parent has them on the device.

        The fork keeps one prompt token to compute, so that it samples its own first token.
        """
        parent = request.fork_of
        if parent is not None and parent.status is RequestStatus.RUNNING:
            self.kv_cache_manager.share(parent, request, request.num_prompt_tokens - 1)

    def _forget(self, request: Request) -> None:
        """A waiting request holds no blocks, so that running ones can always finish."""
        self.kv_cache_manager.free(request)
        request.num_computed_tokens = 0

    def _run(self, request: Request) -> None:
        request.status = RequestStatus.RUNNING
        insort(self.running, request, key=attrgetter("place"))

    def _scheduled(self, request: Request, num_new_tokens: int) -> ScheduledRequest:
        block_table = tuple(self.kv_cache_manager.block_tables[request.request_id])
        return ScheduledRequest(request, num_new_tokens, block_table)

    def update(
        self, scheduler_output: SchedulerOutput, sampler_output: SamplerOutput
    ) -> StepOutput:
        """Record a finished step: append the sampled tokens, let finished requests go."""
        tokens = []
        for scheduled, token_id, logprobs in zip(
            scheduler_output.scheduled,
            sampler_output.token_ids,
            sampler_output.logprobs,
            strict=True,
        ):
            request = scheduled.request
            if request.finish_reason is not None:
                continue  # aborted since the step was scheduled
            request.num_computed_tokens += scheduled.num_scheduled_tokens
            finish_reason = request.append_output_token(token_id)
            tokens.append(TokenOutput(request.request_id, token_id, finish_reason, logprobs))
        stats = self._stats(scheduler_output)
        for request in [r for r in self.running if r.finish_reason is not None]:
            del self.requests[request.request_id]
            self.kv_cache_manager.free(request)
            self.running.remove(request)
        return StepOutput(tuple(tokens), stats)

    def start_over(self, broken_step: SchedulerOutput | None = None) -> None:
        """Compute everybody again, after a step that broke off at any line (Ctrl-C).

        How far blocks, tables and queues were changed cannot be known: nothing but the requests
        is trusted. Tokens that `broken_step` brought were not reported: back they go.
        """
        self.waiting, self.swapped, self.running = RequestQueue(), [], []
        self.kv_cache_manager.clear()
        if broken_step is not None:
            self._take_back(broken_step)
        for request in self.requests.values():
            self._queue_again(request)

    def _take_back(self, step: SchedulerOutput) -> None:
        for scheduled, num_tokens in zip(step.scheduled, step.num_tokens, strict=True):
            request = scheduled.request
            if request.num_tokens > num_tokens:
                request.take_back_output(num_tokens)
                self.requests[request.request_id] = request

    def _stats(self, scheduler_output: SchedulerOutput) -> StepStats:
        scheduled = scheduler_output.scheduled
        copies = scheduler_output.block_copies
        num_swapped_blocks = sum(copy.kind is not CopyKind.COPY_ON_WRITE for copy in copies)
        return StepStats(
            num_scheduled_tokens=sum(s.num_scheduled_tokens for s in scheduled),
            num_scheduled_requests=len(scheduled),
            num_running=len(self.running),
            num_waiting=len(self.waiting) + len(self.swapped),
            num_preemptions=scheduler_output.num_preemptions,
            num_swapped_tokens=num_swapped_blocks * self.config.block_size,
            num_kv_tokens_live=self.kv_cache_manager.num_live_tokens(self.running),
            num_kv_tokens_reserved=self.kv_cache_manager.num_reserved_tokens,
            num_kv_tokens_capacity=self.kv_cache_manager.num_tokens,
            num_free_blocks=self.kv_cache_manager.num_free_blocks,
            num_used_blocks=self.kv_cache_manager.num_used_blocks,
        )
