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

from .chunk_policy import ChunkSizes, FixedChunks
from .config import EngineConfig, PreemptionMode, SchedulingPolicy
from .kv_cache_manager import BlockCopy, CopyKind, KVCacheManager


class ScheduledRequest(NamedTuple):
    """One request's share of a step."""

    request: Request
    num_scheduled_tokens: int
    block_table: Sequence[int]
    """The manager's own list, not a copy: it holds until the next `schedule`."""


@dataclass(frozen=True)
class SchedulerOutput:
    """What one step computes; empty when there is nothing to do."""

    scheduled: tuple[ScheduledRequest, ...]
    block_copies: tuple[BlockCopy, ...]
    """To be performed in this order, before the forward pass"""
    num_preemptions: int = 0
    num_tokens: Sequence[int | None] = ()
    """Of every scheduled request, before the step: where its new token will be. None for a chunk
    that is not the last of its prompt, which brings no token."""


class Scheduler:
    """Requests join and leave the batch at every step (iteration-level scheduling, Orca).

    First come, first served, or by priority and then first come. A step is a budget of tokens:
    whoever runs gets what it has left to compute, but leaves one token for everybody behind it;
    then prompts start, with what is left. A prompt that gets less than all of itself is computed
    in chunks, beside the decodes of the others (chunked prefill, Sarathi; vLLM).

    When a running request needs a block and none is free, the last in order gives way: its
    blocks are swapped out or dropped, and it comes back before anybody who is behind it. A
    request is admitted only if every running one could still take another block, so that whoever
    comes back gets something done before the next preemption.
    """

    def __init__(
        self,
        config: EngineConfig,
        kv_cache_manager: KVCacheManager,
        chunk_sizes: ChunkSizes | None = None,
    ) -> None:
        """chunk_sizes: None is the limit of `config`, the same for every chunk."""
        self.config = config
        self.chunk_sizes = chunk_sizes or FixedChunks(config.max_chunk_tokens)
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
        queue = self._queue_of(request.status)
        # In one line: an interrupt comes before or after; see `has_lost_requests`.
        self.requests.pop(request_id).finish(FinishReason.ABORT)
        self.kv_cache_manager.free(request)
        queue.remove(request)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def has_lost_requests(self) -> bool:
        """Whether an abort or an arrival broke off where a request was in no queue (Ctrl-C)."""
        return len(self.waiting) + len(self.swapped) + len(self.running) != len(self.requests)

    def schedule(self) -> SchedulerOutput:
        """Give out the budget: to all that run, then to swapped requests, then to prompts."""
        self.chunk_sizes.start_step(self.running)
        block_copies: list[BlockCopy] = []
        num_held = len(self.running)
        scheduled = self._schedule_running(block_copies)
        num_preemptions = num_held - len(self.running)
        if num_preemptions == 0:  # or whoever had to go would come back at once
            self._resume_swapped(scheduled, block_copies)
            self._schedule_waiting(scheduled, block_copies)
        num_tokens = [s.request.num_tokens if _is_last_chunk(s) else None for s in scheduled]
        return SchedulerOutput(tuple(scheduled), tuple(block_copies), num_preemptions, num_tokens)

    def _schedule_running(self, block_copies: list[BlockCopy]) -> list[ScheduledRequest]:
        """Serve from the head; whoever cannot get a block takes those of the tail."""
        scheduled: list[ScheduledRequest] = []
        num_left, index = self.config.max_num_batched_tokens, 0
        while index < len(self.running):
            request = self.running[index]
            if request.num_output_tokens >= request.max_tokens:
                index += 1  # its last token is on its way
                continue
            copies = self._allocate(request)
            if copies is None:
                self._preempt(self.running.pop(), block_copies)
                continue
            block_copies += copies
            index += 1
            num_behind = len(self.running) - index
            scheduled.append(self._scheduled(request, num_left - num_behind))
            num_left -= scheduled[-1].num_scheduled_tokens
        return scheduled

    def _resume_swapped(
        self, scheduled: list[ScheduledRequest], block_copies: list[BlockCopy]
    ) -> None:
        num_left = self._count_left(scheduled)
        while self.swapped and num_left and len(self.running) < self.config.max_num_seqs:
            request = self.swapped[0]
            if self.waiting and self.waiting.first.place < request.place:
                return
            # The one that comes back wants to grow as well, unless it has the pool to itself.
            num_spare_blocks = len(self.running) + 1 if self.running else 0
            copies = self.kv_cache_manager.swap_in(request, num_spare_blocks)
            if copies is None:
                return
            block_copies += copies
            self._run(self.swapped.pop(0))
            copies = self._allocate(request)
            if copies is None:
                raise RuntimeError(f"no block is left for {request.request_id}, which came back")
            block_copies += copies
            scheduled.append(self._scheduled(request, num_left))
            num_left -= scheduled[-1].num_scheduled_tokens

    def _schedule_waiting(
        self, scheduled: list[ScheduledRequest], block_copies: list[BlockCopy]
    ) -> None:
        num_left = self._count_left(scheduled)
        forks: list[Request] = []
        while self.waiting and num_left and len(self.running) < self.config.max_num_seqs:
            request = self.waiting.first
            if self.swapped and self.swapped[0].place < request.place:
                break
            if self._is_parent_starting(request):
                forks.append(self.waiting.pop())  # waits, but nobody waits for it
                continue
            self._share_prefix(request)
            copies = self._allocate(request, num_spare_blocks=len(self.running))
            if copies is None:
                self._forget(request)
                break
            block_copies += copies
            self.kv_cache_manager.note_admission(request)
            self.waiting.pop()
            self._run(request)
            scheduled.append(self._scheduled(request, num_left))
            num_left -= scheduled[-1].num_scheduled_tokens
        for request in forks:
            self.waiting.push(request)

    def _allocate(self, request: Request, num_spare_blocks: int = 0) -> list[BlockCopy] | None:
        """Room for all that is left to compute, not for a chunk of it.

        Prompts that were begun without having room for their end would preempt each other.
        """
        num_new_tokens = request.num_tokens - request.num_computed_tokens
        return self.kv_cache_manager.allocate_slots(request, num_new_tokens, num_spare_blocks)

    def _count_left(self, scheduled: list[ScheduledRequest]) -> int:
        num_scheduled_tokens = sum([s.num_scheduled_tokens for s in scheduled])
        return self.config.max_num_batched_tokens - num_scheduled_tokens

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

    def _share_prefix(self, request: Request) -> None:
        """Let a fork start from its parent's blocks, if the parent has them on the device.

        The fork keeps one prompt token to compute, so that it samples its own first token. Whoever
        finds more than that in the cache starts from there.
        """
        parent = request.fork_of
        if parent is not None and parent.status is RequestStatus.RUNNING:
            self.kv_cache_manager.share(parent, request, request.num_prompt_tokens - 1)
        self.kv_cache_manager.share_cached(request)

    def _forget(self, request: Request) -> None:
        """A waiting request holds no blocks, so that running ones can always finish."""
        self.kv_cache_manager.free(request)
        request.num_computed_tokens = 0

    def _run(self, request: Request) -> None:
        request.status = RequestStatus.RUNNING
        insort(self.running, request, key=attrgetter("place"))

    def _scheduled(self, request: Request, num_left: int) -> ScheduledRequest:
        """The request's share of a step that has room for `num_left` more tokens."""
        num_new_tokens = request.num_tokens - request.num_computed_tokens
        if num_new_tokens > 1:
            num_wanted = min(num_new_tokens, num_left)
            num_new_tokens = self.chunk_sizes.take(request.num_computed_tokens, num_wanted)
        block_table = self.kv_cache_manager.block_tables[request.request_id]
        return ScheduledRequest(request, num_new_tokens, block_table)

    def advance(self, scheduler_output: SchedulerOutput) -> StepStats:
        """Count a launched step as computed; its tokens are pending until `update` brings them."""
        for scheduled, num_tokens in zip(
            scheduler_output.scheduled, scheduler_output.num_tokens, strict=True
        ):
            scheduled.request.num_computed_tokens += scheduled.num_scheduled_tokens
            scheduled.request.num_pending_tokens += num_tokens is not None
        self.kv_cache_manager.publish([s.request for s in scheduler_output.scheduled])
        return self._stats(scheduler_output)

    def needs_pending_tokens(self) -> bool:
        """Whether the next step has to wait until the tokens of the last one are known."""
        return any(r.num_pending_tokens and r.needs_output_on_host for r in self.running)

    def update(
        self, scheduler_output: SchedulerOutput, sampler_output: SamplerOutput, stats: StepStats
    ) -> StepOutput:
        """Record the tokens of a step, let finished requests go; stats: of `advance`."""
        tokens, finished = [], []
        for scheduled, num_tokens, token_id, logprobs in zip(
            scheduler_output.scheduled,
            scheduler_output.num_tokens,
            sampler_output.token_ids,
            sampler_output.logprobs,
            strict=True,
        ):
            request = scheduled.request
            if num_tokens != len(request.token_ids) or request.finish_reason is not None:
                continue  # a chunk; or it ended, or was aborted, since the step was scheduled
            status = request.status
            finish_reason = request.append_output_token(token_id)
            tokens.append(TokenOutput(request.request_id, token_id, finish_reason, logprobs))
            if finish_reason is not None:
                finished.append((request, status))
        for request, status in finished:
            self.kv_cache_manager.publish_end(request)
            del self.requests[request.request_id]
            self.kv_cache_manager.free(request)
            self._queue_of(status).remove(request)
        return StepOutput(tuple(tokens), stats)

    def _queue_of(self, status: RequestStatus) -> list[Request] | RequestQueue:
        queues = {RequestStatus.RUNNING: self.running, RequestStatus.SWAPPED: self.swapped}
        return queues.get(status, self.waiting)

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
            request.num_pending_tokens = 0
            self._queue_again(request)

    def _take_back(self, step: SchedulerOutput) -> None:
        for scheduled, num_tokens in zip(step.scheduled, step.num_tokens, strict=True):
            request = scheduled.request
            if num_tokens is not None and len(request.token_ids) > num_tokens:
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
            **self.kv_cache_manager.take_cache_stats(),
        )


def _is_last_chunk(scheduled: ScheduledRequest) -> bool:
    request, num_scheduled_tokens, _ = scheduled
    return request.num_computed_tokens + num_scheduled_tokens == request.num_tokens
