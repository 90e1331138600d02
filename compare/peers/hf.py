"""Hugging Face Transformers' `generate`, one request at a time, as an engine.

    python -m compare.peers.hf bench --workload fixed:batch=2,input=64,output=16

`generate` runs in a thread of its own, and a streamer passes every token on as it comes: so it
runs undisturbed, and each step of the engine is the wait for one token.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from folovllm.interfaces import StepOutput, StepStats, TokenLogprobs, TokenOutput
from folovllm.model.config import ModelConfig
from folovllm.model.loader import resolve_device, resolve_dtype
from folovllm.model.weights import with_published_head
from folovllm.request import Request

from .checkpoint import checkpoint
from .peer import (
    PeerLLM,
    PeerModel,
    UntimedModelRunner,
    UntimedScheduler,
    load_tokenizer,
    main,
    require_benchmark_request,
)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of the peer."""

    max_model_len: int = 2048
    """Longest prompt plus output, in tokens."""


class _Aborted(Exception):
    """Raised inside `generate` to leave it."""


class _TokenStream:
    """The streamer and logits processor of one `generate` call; fills a queue."""

    def __init__(self, num_top: int | None) -> None:
        self.queue: SimpleQueue[tuple[int, TokenLogprobs | None] | None]
        self.queue = SimpleQueue()
        self.is_aborted = False
        self._num_top = num_top
        self._logprobs: torch.Tensor | None = None
        self._saw_prompt = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """As a logits processor: note the distribution, change nothing. scores: [1, vocab]."""
        self._logprobs = torch.log_softmax(scores[0].float(), dim=-1)
        return scores

    def put(self, value: torch.Tensor) -> None:
        """As a streamer: the first call brings the prompt, every further one a token [1]."""
        if self.is_aborted:
            raise _Aborted
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        token_id = int(value.reshape(-1)[0])
        self.queue.put((token_id, self._top(token_id)))

    def end(self) -> None: ...

    def _top(self, token_id: int) -> TokenLogprobs | None:
        if self._num_top is None or self._logprobs is None:
            return None
        chosen = self._logprobs[token_id]
        values, ids = self._logprobs.topk(max(self._num_top, 1))
        rank = int((self._logprobs > chosen).sum()) + 1
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprobs(float(chosen), rank, top[: self._num_top])


@dataclass
class _Running:
    request: Request
    stream: _TokenStream
    future: Future[None]


class HfEngine:
    """First come, first served, one `generate` call per request, with its default KV cache."""

    def __init__(self, config: EngineConfig, model: Any, facts: PeerModel) -> None:
        """model: a Transformers causal LM on its device. Its generation config is emptied, so
        that no end-of-sequence id and no sampling default of the checkpoint applies."""
        from transformers import GenerationConfig

        self.config = config
        self.scheduler = UntimedScheduler()
        self.model_runner = UntimedModelRunner(self)
        self._model, self._facts = model, facts
        self._model.generation_config = GenerationConfig()
        self._waiting: deque[Request] = deque()
        self._running: _Running | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values of the running request."""
        return self._num_cached_tokens() * self._facts.kv_bytes_per_token

    def add_request(self, request: Request) -> None:
        require_benchmark_request(request, self.config.max_model_len)
        running = [self._running.request] if self._running else []
        if any(other.request_id == request.request_id for other in (*self._waiting, *running)):
            raise ValueError(f"request id {request.request_id!r} is in use")
        self._waiting.append(request)

    def abort_request(self, request_id: str) -> None:
        self._waiting = deque(r for r in self._waiting if r.request_id != request_id)
        if self._running is not None and self._running.request.request_id == request_id:
            self._running.stream.is_aborted = True
            self._running.future.exception()  # waits for the thread to leave `generate`
            self._running = None

    def has_unfinished_requests(self) -> bool:
        return self._running is not None or bool(self._waiting)

    def step(self) -> StepOutput:
        """Wait for the next token of the running request, or start the next request."""
        if self._running is None:
            if not self._waiting:
                return StepOutput((), self._stats(0, 0))
            self._running = self._start(self._waiting.popleft())
        running = self._running
        request = running.request
        item = running.stream.queue.get()
        if item is None:  # `generate` ended without the tokens that it was asked for
            self._running = None
            running.future.result()
            raise RuntimeError(
                f"generate ended request {request.request_id} after {request.num_output_tokens} "
                f"of {request.max_tokens} tokens"
            )
        token_id, logprobs = item
        num_scheduled = 1 if request.num_output_tokens else request.num_prompt_tokens
        reason = request.append_output_token(token_id)
        stats = self._stats(num_scheduled, 0 if reason else 1)
        if reason:
            running.future.result()  # what `generate` does after its last token counts as well
            self._running = None
        return StepOutput((TokenOutput(request.request_id, token_id, reason, logprobs),), stats)

    def close(self) -> None:
        self._worker.shutdown()

    def _start(self, request: Request) -> _Running:
        stream = _TokenStream(request.sampling_params.logprobs)
        return _Running(request, stream, self._worker.submit(self._generate, request, stream))

    def _generate(self, request: Request, stream: _TokenStream) -> None:
        """In the worker thread: the whole of one request."""
        from transformers import LogitsProcessorList

        input_ids = torch.tensor([request.prompt_token_ids], device=self._facts.device)
        wants_logprobs = request.sampling_params.logprobs is not None
        try:
            self._model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                max_new_tokens=request.max_tokens,
                min_new_tokens=request.max_tokens,
                logits_processor=LogitsProcessorList([stream] if wants_logprobs else []),
                streamer=stream,
            )
        finally:
            stream.queue.put(None)

    def _num_cached_tokens(self) -> int:
        """The newest token's keys and values come with the next step."""
        return self._running.request.num_tokens - 1 if self._running else 0

    def _stats(self, num_scheduled_tokens: int, num_running: int) -> StepStats:
        num_cached = self._num_cached_tokens() if num_running else 0
        return StepStats(
            num_scheduled_tokens=num_scheduled_tokens,
            num_scheduled_requests=int(num_scheduled_tokens > 0),
            num_running=num_running,
            num_waiting=len(self._waiting),
            num_preemptions=0,
            num_kv_tokens_live=num_cached,
            num_kv_tokens_reserved=num_cached,
            num_kv_tokens_capacity=self.config.max_model_len,
        )


@contextmanager
def start(
    model: str | None, *, load_format: str, dtype: str, device: str, seed: int, config: EngineConfig
) -> Iterator[PeerLLM]:
    """Load a checkpoint, or the stages' dummy weights, into Transformers."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    target = resolve_device(device)
    with checkpoint(
        model, load_format=load_format, dtype=dtype, device=device, seed=seed
    ) as folder:
        model_config = with_published_head(ModelConfig.from_directory(folder), folder)
        torch_dtype = resolve_dtype(dtype, model_config, target)
        hf_model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch_dtype, use_safetensors=True, trust_remote_code=False
        )
        hf_model = hf_model.to(target).eval()
        tokenizer = load_tokenizer(folder)
    facts = PeerModel(
        config=model_config,
        device=target,
        dtype=torch_dtype,
        num_parameters=sum(parameter.numel() for parameter in hf_model.parameters()),
    )
    engine = HfEngine(config, hf_model, facts)
    try:
        yield PeerLLM(engine=engine, model=facts, tokenizer=tokenizer)
    finally:
        engine.close()


if __name__ == "__main__":
    raise SystemExit(main("hf", EngineConfig, start))
