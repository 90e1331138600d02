"""What an engine does, for Prometheus: vLLM's names where the meaning is vLLM's."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from ...request import FinishReason, Request
from ..core_messages import Step
from .histogram import BulkHistogram

_MS = (1, 2.5, 5, 10, 20, 40, 60, 80, 100, 150, 200, 300, 400, 500, 750)
_TTFT = (*(ms / 1000 for ms in _MS), 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL = (*(ms / 1000 for ms in _MS), 1, 2.5, 5, 10)
_SECONDS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 20, 30, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


@dataclass
class _Times:
    """Of one request, in seconds."""

    request: Request
    num_tokens: int = 0
    queue_s: float | None = None
    first_s: float = 0.0
    last_s: float = 0.0


class EngineMetrics:
    """Counts as it is told (see `EngineObserver`); `text` is what /metrics answers.

    Times are those at which the engine had the tokens, and arrivals those in front of it.
    """

    def __init__(self, model_name: str, engine: str = "0") -> None:
        """engine: which of several it is; both are labels."""
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": engine}
        self._times: dict[str, _Times] = {}
        gauge, counter, histogram = self._gauge, self._counter, self._histogram
        self._running = gauge("num_requests_running", "Requests that hold KV cache.")
        self._waiting = gauge("num_requests_waiting", "Requests in the queue.")
        self._kv_use = gauge("kv_cache_usage_perc", "Reserved KV cache; 1 is all of it.")
        self._looked_up = counter("prefix_cache_queries", "Prompt tokens looked up.")
        self._found = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._preemptions = counter("num_preemptions", "Requests that had to give way.")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts that have run.")
        self._generated = counter("generation_tokens", "Tokens that were generated.")
        self._finished = Counter(
            "vllm:request_success", "Finished requests.",
            [*self._labels, "finished_reason"], registry=self._registry,
        )  # fmt: skip
        self._step_tokens = histogram("iteration_tokens_total", "Tokens per step.", _TOKENS)
        self._ttft = histogram("time_to_first_token_seconds", "First token - arrival.", _TTFT)
        self._itl = histogram("inter_token_latency_seconds", "Between two tokens.", _ITL)
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "(last - first) / (tokens - 1).", _ITL
        )
        self._e2e = histogram("e2e_request_latency_seconds", "Last token - arrival.", _SECONDS)
        self._queue = histogram("request_queue_time_seconds", "First step - arrival.", _SECONDS)
        self._prefill = histogram(
            "request_prefill_time_seconds", "First token - first step.", _SECONDS
        )
        self._decode = histogram("request_decode_time_seconds", "Last - first token.", _SECONDS)
        self._request_prompt = histogram("request_prompt_tokens", "Of a prompt.", _TOKENS)
        self._request_output = histogram("request_generation_tokens", "Of an output.", _TOKENS)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def on_added(self, requests: Sequence[Request]) -> None:
        self._times |= {request.request_id: _Times(request) for request in requests}

    def on_step(self, step: Step) -> None:
        stats = step.stats
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        if stats.num_kv_tokens_capacity:
            self._kv_use.set(stats.num_kv_tokens_reserved / stats.num_kv_tokens_capacity)
        self._looked_up.inc(stats.num_prompt_tokens_looked_up or 0)
        self._found.inc(stats.num_prompt_tokens_found or 0)
        self._preemptions.inc(stats.num_preemptions)
        self._step_tokens.observe(stats.num_scheduled_tokens)
        self._generated.inc(len(step.tokens))
        for start in step.starts:
            self._start(start.request_id, start.queue_time_s)
        self._note_tokens(step)

    def on_stopped(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._finish(request_id, FinishReason.STOP)

    def on_aborted(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._finish(request_id, FinishReason.ABORT)

    def on_idle(self) -> None:
        for gauge in (self._running, self._waiting, self._kv_use):
            gauge.set(0)

    def _start(self, request_id: str, queue_time_s: float) -> None:
        times = self._times.get(request_id)
        if times is not None:
            times.queue_s = queue_time_s
            self._queue.observe(queue_time_s)
            self._prompt_tokens.inc(times.request.num_prompt_tokens)

    def _note_tokens(self, step: Step) -> None:
        now = step.time_s
        followers: dict[float, int] = {}
        """When a token came -> how many of this step's tokens are the next behind one of then."""
        for token in step.tokens:
            times = self._times.get(token.request_id)
            if times is None:
                continue
            if times.num_tokens:
                followers[times.last_s] = followers.get(times.last_s, 0) + 1
            else:
                self._note_first(times, now)
            times.num_tokens += 1
            times.last_s = now
            if token.finish_reason is not None:
                self._finish(token.request_id, token.finish_reason)
        for last_s, count in followers.items():
            self._itl.observe(now - last_s, count)

    def _note_first(self, times: _Times, now: float) -> None:
        times.first_s = now
        ttft_s = now - times.request.arrival_time
        self._ttft.observe(ttft_s)
        if times.queue_s is not None:
            self._prefill.observe(ttft_s - times.queue_s)

    def _finish(self, request_id: str, reason: FinishReason) -> None:
        times = self._times.pop(request_id, None)
        if times is None:
            return
        self._finished.labels(**self._labels, finished_reason=reason.value).inc()
        self._request_prompt.observe(times.request.num_prompt_tokens)
        self._request_output.observe(times.num_tokens)
        if times.num_tokens:
            self._e2e.observe(times.last_s - times.request.arrival_time)
            self._decode.observe(times.last_s - times.first_s)
        if times.num_tokens > 1:
            self._tpot.observe((times.last_s - times.first_s) / (times.num_tokens - 1))

    def _gauge(self, name: str, text: str) -> Gauge:
        gauge = Gauge(f"vllm:{name}", text, list(self._labels), registry=self._registry)
        return gauge.labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"vllm:{name}", text, list(self._labels), registry=self._registry)
        return counter.labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> BulkHistogram:
        return BulkHistogram(f"vllm:{name}", text, self._labels, buckets, self._registry)
