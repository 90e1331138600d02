"""Bookkeeping of requests inside a batching engine that only tells which tokens came out."""

from collections.abc import Sequence

from folovllm.interfaces import StepOutput, StepStats, TokenLogprobs, TokenOutput
from folovllm.request import Request


class BatchProgress:
    """The requests of a peer, and the stats that can be told from the tokens that it returned.

    A request counts as scheduled in a step when the step gave it a token, and its prompt when
    that was its first: work on a prompt that brought no token yet is counted with the first one.
    """

    def __init__(self, num_kv_tokens_capacity: int) -> None:
        self._requests: dict[str, Request] = {}
        self._capacity = num_kv_tokens_capacity

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request) -> None:
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id!r} is in use")
        self._requests[request.request_id] = request

    def drop(self, request_id: str) -> bool:
        """Forget a request; False if it is not here."""
        return self._requests.pop(request_id, None) is not None

    def advance(self, new_tokens: Sequence[tuple[str, int, TokenLogprobs | None]]) -> StepOutput:
        """Record the tokens of one step: (request_id, token_id, logprobs) each."""
        tokens = []
        num_scheduled_tokens = 0
        for request_id, token_id, logprobs in new_tokens:
            request = self._requests[request_id]
            num_scheduled_tokens += 1 if request.num_output_tokens else request.num_prompt_tokens
            reason = request.append_output_token(token_id)
            tokens.append(TokenOutput(request_id, token_id, reason, logprobs))
            if reason:
                del self._requests[request_id]
        running = [r for r in self._requests.values() if r.num_output_tokens]
        num_live = sum(request.num_tokens - 1 for request in running)
        stats = StepStats(
            num_scheduled_tokens=num_scheduled_tokens,
            num_scheduled_requests=len(tokens),
            num_running=len(running),
            num_waiting=len(self._requests) - len(running),
            num_preemptions=0,
            num_kv_tokens_live=num_live,
            num_kv_tokens_reserved=max(num_live, self._capacity),
            num_kv_tokens_capacity=max(num_live, self._capacity),
        )
        return StepOutput(tuple(tokens), stats)
