"""The asynchronous interface: an engine in a process of its own, `async for` over its outputs."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from ..interfaces import StepOutput
from ..request import Request, SamplingParams
from ..text.tokenizer import Tokenizer
from .async_stream import AsyncOutputStream, EngineDeadError, QueueFullError
from .core_client import CoreClient
from .core_messages import (
    Abort,
    Accepted,
    Add,
    CoreFacts,
    CoreFailure,
    FromCore,
    Idle,
    Pause,
    Refused,
    ResetPrefixCache,
    Resume,
    Snapshot,
    Step,
    StepOnce,
    Unwatch,
    Watch,
    new_request,
)
from .default_sampling import default_sampling_params
from .engine_observer import EngineObserver
from .llm import LLM, no_prefixes
from .output_processor import OutputProcessor, PromptState
from .outputs import RequestOutput, RequestOutputKind
from .prompts import Prompt, PromptInput, parse_prompt
from .request_builder import RequestBuilder


class AsyncLLM:
    """A model behind one stage's engine, which runs in a process of its own.

        async with AsyncLLM(LLM, "models/SmolLM2-135M-Instruct", max_model_len=1024) as llm:
            async for output in llm.generate("Hello", SamplingParams(max_tokens=8), "request-0"):
                print(output.outputs[0].text)

    Prompts become tokens and tokens become text here, in the process of the event loop, so that no
    step waits for it; the engine gets and gives token ids. Requests get the tokens that `LLM` would
    have given them. All of it belongs to the event loop that it was entered in.
    """

    def __init__(
        self,
        llm_class: type[LLM],
        model: str | Path | None = None,
        *,
        max_queue_len: int | None = None,
        step_timeout_s: float | None = None,
        observers: Sequence[EngineObserver] = (),
        **llm_options: Any,
    ) -> None:
        """llm_class: a stage's LLM, of which `llm_options` are the arguments.

        max_queue_len: most requests that may wait for their first step; None sets no limit.
        step_timeout_s: the engine is taken for dead, and ended, when a step takes longer; None
        lets it hang for ever.
        """
        self._llm_class = llm_class
        self._model = model
        self._llm_options = llm_options
        self._max_queue_len = max_queue_len
        self._observers = observers
        self._client = CoreClient(self._on_message, self._on_death, step_timeout_s)
        self._outputs = OutputProcessor()
        self._streams: dict[str, AsyncOutputStream] = {}
        """Id of an unfinished request in the engine -> who reads it."""
        self._queued: set[str] = set()
        """Ids of the requests that have not run yet."""
        self._answers: dict[str, asyncio.Future[None]] = {}
        """Id of a prompt -> done when the engine has accepted it, ValueError when not."""
        self._submitted: dict[str, list[Request]] = {}
        """Id of a prompt that the engine has not answered yet -> its requests."""
        self._on_snapshot: Callable[[Snapshot], None] | None = None
        self.died = asyncio.Event()
        self.death: str | None = None
        """What is known of why the engine's process ended; None while it has not."""

    async def __aenter__(self) -> Self:
        """Start the engine and wait until it is ready; errors are those of `LLM.__init__`."""
        self._ready: asyncio.Future[CoreFacts] = asyncio.get_running_loop().create_future()
        self._client.start(self._llm_class, self._model, self._llm_options)
        try:
            self.facts = await self._ready
            path = self.facts.tokenizer_path
            self.tokenizer = None if path is None else await asyncio.to_thread(Tokenizer, path)
        except BaseException:
            await self._client.stop(patience_s=0.0)  # it listens to nobody while it loads
            raise
        self._requests = RequestBuilder(
            tokenizer=self.tokenizer,
            vocab_size=self.facts.vocab_size,
            max_model_len=self.facts.max_model_len,
            eos_token_ids=self.facts.eos_token_ids,
            seed=self.facts.seed,
            scheduling_policy=self.facts.scheduling_policy,
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        """End the engine; requests that are under way are lost."""
        self._fail("the engine was shut down")
        await self._client.stop()

    @property
    def num_queued(self) -> int:
        """Requests that wait for their first step."""
        return len(self._queued)

    @property
    def num_unfinished(self) -> int:
        return len(self._streams)

    @property
    def process_id(self) -> int:
        """Of the engine's process."""
        return self._client.process_id

    async def generate(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int | None = None,
        output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
    ) -> AsyncIterator[RequestOutput]:
        """Complete one prompt; yields an output whenever there is something new.

        request_id: what the outputs are called; priority: as in `LLM.generate`. ValueError, at the
        first output, for what cannot work. Leaving the loop, or being cancelled in it, aborts.
        """
        names = None if request_id is None else [request_id]
        (stream,) = await self.start(
            [prompt], sampling_params, names, priority=priority, output_kind=output_kind
        )
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def start(
        self,
        prompts: Sequence[PromptInput],
        sampling_params: SamplingParams | None = None,
        request_ids: Sequence[str] | None = None,
        *,
        priority: int | None = None,
        output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
    ) -> list[AsyncOutputStream]:
        """Queue prompts; when this returns, the engine has accepted all of them.

        ValueError if one of them cannot run, QueueFullError if they are too many; then none runs.
        Every stream must be read to its end or closed.
        """
        self.check_alive()
        self._check_queue(len(prompts))
        parsed = await asyncio.to_thread(self._parse, prompts)
        params = sampling_params or self.get_default_sampling_params()
        priorities = None if priority is None else [priority] * len(prompts)
        if params.structured_outputs is None:
            states = self._requests.build(parsed, params, priorities)
        else:  # to read a schema takes a moment
            states = await asyncio.to_thread(self._requests.build, parsed, params, priorities)
        self.check_alive()
        self._check_queue(params.n * len(prompts))
        streams = [AsyncOutputStream(state, output_kind, self) for state in states]
        answers = [self._submit(stream) for stream in streams]
        try:
            await asyncio.gather(*answers)
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        finally:
            for stream in streams:
                self._answers.pop(stream.prompt.request_id, None)
        for state, name in zip(states, request_ids or (), strict=request_ids is not None):
            state.request_id = name
        return streams

    def get_default_sampling_params(self) -> SamplingParams:
        """As `LLM`'s: what the model's generation_config.json suggests."""
        return default_sampling_params(self.facts.model_path)

    def reset_prefix_cache(self) -> None:
        """As `LLM`'s, before the next step; ValueError in stages that keep no prefixes."""
        if not self.facts.keeps_prefixes:
            raise no_prefixes(self._llm_class)
        self._client.send(ResetPrefixCache())

    def watch(self, on_snapshot: Callable[[Snapshot], None]) -> None:
        """Hand snapshots of the engine at work to this callable, until `unwatch`.

        Of an engine that is not paused at most ten per second. ValueError if it is no stage's.
        """
        if not self.facts.can_be_watched:
            raise ValueError("this engine has no scheduler of a stage that could be watched")
        self._on_snapshot = on_snapshot
        self._client.send(Watch())

    def unwatch(self) -> None:
        self._on_snapshot = None
        self._client.send(Unwatch())

    def pause(self) -> None:
        """Let the engine do no step but those of `step_once`; requests come and go as ever."""
        self._client.send(Pause())

    def step_once(self) -> None:
        """One step of a paused engine; nothing happens if it is not paused or nothing waits."""
        self._client.send(StepOnce())

    def resume(self) -> None:
        self._client.send(Resume())

    def abort_prompts(self, prompts: Sequence[PromptState]) -> None:
        """Take these back, as far as they are unfinished: the engine hears of it within a step."""
        self._abort(self._outputs.remove(prompts))

    def check_alive(self) -> None:
        """EngineDeadError if the engine's process has ended."""
        if self.death is not None:
            raise EngineDeadError(self.death)

    def _check_queue(self, num_new: int) -> None:
        limit = self._max_queue_len
        if limit is not None and self.num_queued + num_new > limit:
            raise QueueFullError(
                f"{self.num_queued} requests are waiting and {limit} may wait at most, so that "
                f"{num_new} more cannot be taken; try again later"
            )

    def _parse(self, prompts: Sequence[PromptInput]) -> list[Prompt]:
        vocab_size = self.facts.vocab_size
        return [
            parse_prompt(prompt, index, self.tokenizer, vocab_size)
            for index, prompt in enumerate(prompts)
        ]

    def _submit(self, stream: AsyncOutputStream) -> asyncio.Future[None]:
        """Send the requests of a prompt to the engine; done when it has accepted them."""
        prompt = stream.prompt
        requests = [completion.request for completion in prompt.completions]
        for completion in prompt.completions:
            self._outputs.add(prompt, completion)
            self._streams[completion.request.request_id] = stream
            self._queued.add(completion.request.request_id)
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answers[prompt.request_id] = answer
        self._submitted[prompt.request_id] = requests
        self._client.send(Add(prompt.request_id, list(map(new_request, requests))))
        return answer

    def _abort(self, request_ids: list[str]) -> None:
        """In the engine, and here; the outputs have forgotten them."""
        if not request_ids:
            return
        self._forget(request_ids)
        if self.death is None:
            self._client.send(Abort(request_ids))
        for observer in self._observers:
            observer.on_aborted(request_ids)

    def _forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._streams.pop(request_id, None)
            self._queued.discard(request_id)

    def _on_message(self, message: FromCore) -> None:
        match message:
            case Step():
                self._on_step(message)
            case Accepted():
                self._on_accepted(message.prompt_id)
            case Refused():
                self._submitted.pop(message.prompt_id)
                self._answer(message.prompt_id, ValueError(message.reason))
            case Snapshot():
                if self._on_snapshot is not None:
                    self._on_snapshot(message)
            case Idle():
                for observer in self._observers:
                    observer.on_idle()
            case CoreFacts():
                self._ready.set_result(message)
            case CoreFailure():
                self._on_failure(message)

    def _on_accepted(self, prompt_id: str) -> None:
        self._answer(prompt_id, None)
        # Whoever was taken back before the engine answered has no end that could be told.
        requests = [r for r in self._submitted.pop(prompt_id) if r.request_id in self._streams]
        for observer in self._observers:
            observer.on_added(requests)

    def _on_step(self, step: Step) -> None:
        for start in step.starts:
            stream = self._streams.get(start.request_id)
            self._queued.discard(start.request_id)
            if stream is not None:
                request = stream.prompt.request_of(start.request_id)
                request.num_cached_tokens = start.num_cached_tokens
        for request_id, prompt_logprobs in step.prompt_logprobs.items():
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.prompt.request_of(request_id).prompt_logprobs = prompt_logprobs
        processed = self._outputs.process(StepOutput(step.tokens, step.stats), step.time_s)
        for observer in self._observers:
            observer.on_step(step)
        for token in step.tokens:
            stream = self._streams.get(token.request_id)
            if stream is not None:
                stream.notify()
                if token.finish_reason is not None:
                    self._forget((token.request_id,))
        stopped = processed.stopped_request_ids
        if stopped:
            self._forget(stopped)
            self._client.send(Abort(stopped))
            for observer in self._observers:
                observer.on_stopped(stopped)

    def _answer(self, prompt_id: str, error: ValueError | None) -> None:
        """Tell who waits, unless it was cancelled meanwhile."""
        answer = self._answers.get(prompt_id)
        if answer is None or answer.done():
            return
        if error is None:
            answer.set_result(None)
        else:
            answer.set_exception(error)

    def _on_failure(self, failure: CoreFailure) -> None:
        if not self._ready.done():
            error = ValueError if failure.is_mistake else EngineDeadError
            self._ready.set_exception(error(failure.text))
        self._fail(failure.text)

    def _on_death(self, reason: str) -> None:
        if not self._ready.done():
            self._ready.set_exception(EngineDeadError(f"{reason} before it was ready"))
        self._fail(reason)

    def _fail(self, reason: str) -> None:
        """Tell everybody who waits that nothing will come; the first reason is kept."""
        if self.death is not None:
            return
        self.death = reason
        self.died.set()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineDeadError(reason))
        for stream in list(self._streams.values()):
            stream.wake()
