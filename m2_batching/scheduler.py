"""Which requests run in the next step, and how many tokens of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from folovllm.interfaces import SamplerOutput, StepOutput, StepStats, TokenOutput
from folovllm.request import FinishReason, Request, RequestStatus
from folovllm.request_queue import RequestQueue

from .config import EngineConfig, SchedulingPolicy
from .kv_cache_manager import KVCacheManager


class ScheduledRequest(NamedTuple):
    """One request's share of a step."""

    request: Request
    num_scheduled_tokens: int
    slot: int


@dataclass(frozen=True)
class SchedulerOutput:
    """What one step computes; empty when there is nothing to do."""

    scheduled: tuple[ScheduledRequest, ...]
    num_tokens: Sequence[int] = ()
    """Of every scheduled request, before the step."""


class Scheduler:
    """Requests join and leave the batch at every step (iteration-level scheduling, Orca).

    First come, first served, or by priority and then first come. A step computes whole prompts
    if any can start, else one token of every running request: a padded batch of both would be
    mostly padding.
    """

    def __init__(self, config: EngineConfig, kv_cache_manager: KVCacheManager) -> None:
        self.config = config
        self.kv_cache_manager = kv_cache_manager
        self.requests: dict[str, Request] = {}
        self.waiting = RequestQueue()
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
        is_running = request.status is RequestStatus.RUNNING
        # In one line: an interrupt comes before or after, and `schedule` tidies up what is left.
        self.requests.pop(request_id).finish(FinishReason.ABORT)
        self.kv_cache_manager.free(request)
        (self.running if is_running else self.waiting).remove(request)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def schedule(self) -> SchedulerOutput:
        """Start the prompts that can start; if none can, advance everything that runs."""
        if len(self.waiting) + len(self.running) != len(self.requests):
            self.start_over()  # Ctrl-C came where a request was in no queue
        scheduled = tuple(self._schedule_waiting() or self._schedule_running())
        return SchedulerOutput(scheduled, [len(s.request.token_ids) for s in scheduled])

    def _schedule_waiting(self) -> list[ScheduledRequest]:
        scheduled: list[ScheduledRequest] = []
        max_query_len = 0
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            request = self.waiting.first
            num_new_tokens = request.num_tokens - request.num_computed_tokens
            max_query_len = max(max_query_len, num_new_tokens)
            # Attention pads every prompt to the longest: that is what the step costs.
            if max_query_len * (len(scheduled) + 1) > self.config.max_num_batched_tokens:
                break
            slot = self.kv_cache_manager.allocate_slots(request, num_new_tokens)
            if slot is None:
                break
            self.waiting.pop()
            request.status = RequestStatus.RUNNING
            self.running.append(request)
            scheduled.append(ScheduledRequest(request, num_new_tokens, slot))
        return scheduled

    def _schedule_running(self) -> list[ScheduledRequest]:
        scheduled = []
        for request in self.running:
            num_new_tokens = request.num_tokens - request.num_computed_tokens
            slot = self.kv_cache_manager.allocate_slots(request, num_new_tokens)
            if slot is None:
                raise RuntimeError(f"running request {request.request_id} has no cache slot")
            scheduled.append(ScheduledRequest(request, num_new_tokens, slot))
        return scheduled

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

        How far the cache, the queues and tables were changed cannot be known: nothing but the
        requests is trusted. Tokens that `broken_step` brought were not reported: back they go.
        """
        self.waiting, self.running = RequestQueue(), []
        self.kv_cache_manager.clear()
        if broken_step is not None:
            self._take_back(broken_step)
        for request in self.requests.values():
            request.status = RequestStatus.WAITING
            request.num_computed_tokens = 0
            self.waiting.push(request)

    def _take_back(self, step: SchedulerOutput) -> None:
        for scheduled, num_tokens in zip(step.scheduled, step.num_tokens, strict=True):
            request = scheduled.request
            if request.num_tokens > num_tokens:
                request.take_back_output(num_tokens)
                self.requests[request.request_id] = request

    def _stats(self, scheduler_output: SchedulerOutput) -> StepStats:
        scheduled = scheduler_output.scheduled
        return StepStats(
            num_scheduled_tokens=sum(s.num_scheduled_tokens for s in scheduled),
            num_scheduled_requests=len(scheduled),
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_preemptions=0,
            num_kv_tokens_live=sum(request.num_computed_tokens for request in self.running),
            num_kv_tokens_reserved=self.kv_cache_manager.num_reserved_tokens,
            num_kv_tokens_capacity=self.kv_cache_manager.num_tokens,
        )
