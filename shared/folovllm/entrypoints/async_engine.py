"""An engine in another process as the front sees it: what is in it, who waits, whether it lives."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..interfaces import StepOutput
from ..request import Request
from .async_stream import AsyncOutputStream, EngineDeadError
from .core_client import CoreClient
from .core_messages import (
    Abort,
    Accepted,
    Add,
    CoreFacts,
    CoreFailure,
    FromCore,
    Idle,
    Refused,
    Snapshot,
    Step,
    ToCore,
    new_request,
)
from .engine_observer import EngineObserver
from .llm import LLM
from .output_processor import OutputProcessor
from .output_state import PromptState


class AsyncEngine:
    """Requests go in, and their tokens come to the streams that read them.

    All of it belongs to the event loop that it was started in.
    """

    def __init__(self, observers: Sequence[EngineObserver], step_timeout_s: float | None) -> None:
        """step_timeout_s: as in `AsyncLLM`."""
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
        self.on_snapshot: Callable[[Snapshot], None] | None = None
        self.died = asyncio.Event()
        self.death: str | None = None
        """What is known of why the engine's process ended; None while it has not."""

    async def start(
        self, llm_class: type[LLM], model: str | Path | None, llm_options: dict[str, Any]
    ) -> CoreFacts:
        """Returns when the engine is ready; errors are those of `LLM.__init__`."""
        self._ready: asyncio.Future[CoreFacts] = asyncio.get_running_loop().create_future()
        self._client.start(llm_class, model, llm_options)
        try:
            return await self._ready
        except BaseException:
            await self._client.stop(patience_s=0.0)  # it listens to nobody while it loads
            raise

    async def stop(self) -> None:
        """Requests that are under way are lost."""
        self._fail("the engine was shut down")
        await self._client.stop()

    @property
    def num_queued(self) -> int:
        return len(self._queued)

    @property
    def num_unfinished(self) -> int:
        return len(self._streams)

    @property
    def process_id(self) -> int:
        return self._client.process_id

    def send(self, message: ToCore) -> None:
        """Something that concerns no request."""
        self._client.send(message)

    async def submit(self, streams: Sequence[AsyncOutputStream]) -> None:
        """Returns when the engine has accepted the requests of all of these prompts.

        ValueError if it cannot run one; then, and when this is cancelled, none runs.
        """
        answers = [self._submit(stream) for stream in streams]
        try:
            if len(answers) == 1:
                await answers[0]
            else:
                await asyncio.gather(*answers)
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        finally:
            for stream in streams:
                self._answers.pop(stream.prompt.request_id, None)

    def abort_prompts(self, prompts: Sequence[PromptState]) -> None:
        """Take these back, as far as they are unfinished: the engine hears of it within a step."""
        self._abort(self._outputs.remove(prompts))

    def check_alive(self) -> None:
        """EngineDeadError if the engine's process has ended."""
        if self.death is not None:
            raise EngineDeadError(self.death)

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
                if self.on_snapshot is not None:
                    self.on_snapshot(message)
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
