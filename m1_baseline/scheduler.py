"""Which requests run in the next step, and how many tokens of each."""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from folovllm.interfaces import SamplerOutput, StepOutput, StepStats, TokenOutput
from folovllm.request import FinishReason, Request, RequestStatus

from .config import EngineConfig
from .kv_cache_manager import KVCacheManager


class ScheduledRequest(NamedTuple):
    """One request's share of a step."""

    request: Request
    num_scheduled_tokens: int


@dataclass(frozen=True)
class SchedulerOutput:
    """What one step computes; empty when there is nothing to do."""

    scheduled: tuple[ScheduledRequest, ...]


class Scheduler:
    """First come, first served; one request at a time, from its prompt to its last token."""

    def __init__(self, config: EngineConfig, kv_cache_manager: KVCacheManager) -> None:
        self.config = config
        self.kv_cache_manager = kv_cache_manager
        self.requests: dict[str, Request] = {}
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add_request(self, request: Request) -> None:
        if request.request_id in self.requests:
            raise ValueError(
                f"request id {request.request_id!r} is in use; give every request its own"
            )
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def abort_request(self, request_id: str) -> None:
        request = self.requests.get(request_id)
        if request is None:
            return
        if request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        request.finish(FinishReason.ABORT)
        self._release([request])

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def schedule(self) -> SchedulerOutput:
        """Continue the running request, or start the next one."""
        if not self.running and self.waiting:
            request = self.waiting.popleft()
            request.status = RequestStatus.RUNNING
            self.running.append(request)
        return SchedulerOutput(scheduled=tuple(map(self._schedule_request, self.running)))

    def _schedule_request(self, request: Request) -> ScheduledRequest:
        num_new_tokens = request.num_tokens - request.num_computed_tokens
        self.kv_cache_manager.allocate_slots(request, num_new_tokens)
        return ScheduledRequest(request, num_new_tokens)

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
            request.num_computed_tokens += scheduled.num_scheduled_tokens
            finish_reason = request.append_output_token(token_id)
            tokens.append(TokenOutput(request.request_id, token_id, finish_reason, logprobs))
        stats = self._stats(scheduler_output)
        self._release([r for r in self.running if r.finish_reason is not None])
        return StepOutput(tuple(tokens), stats)

    def _release(self, finished: list[Request]) -> None:
        for request in finished:
            del self.requests[request.request_id]
            self.kv_cache_manager.free(request)
        if finished:
            self.running = [r for r in self.running if r.status is RequestStatus.RUNNING]

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
