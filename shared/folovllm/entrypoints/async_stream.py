"""What `AsyncLLM` hands out: the outputs of one prompt, as they come."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol, Self

from .output_state import CompletionState, PromptState
from .outputs import RequestOutput, RequestOutputKind


class EngineDeadError(RuntimeError):
    """The engine's process has ended, and with it all requests."""


class QueueFullError(RuntimeError):
    """As many requests wait as may wait; come again later."""


class OutputSource(Protocol):
    """Whoever records the tokens of prompts, and notifies their streams."""

    def check_alive(self) -> None:
        """EngineDeadError if no token will come any more."""

    def abort_prompts(self, prompts: Sequence[PromptState]) -> None: ...


class Bell:
    """Wakes the one who waits for it; rung while nobody waits, it ends the next wait at once.

    An `asyncio.Event` does this for any number of waiters, at several times the cost.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._has_rung = False

    def ring(self) -> None:
        waiter = self._waiter
        if waiter is None:
            self._has_rung = True
        elif not waiter.done():
            waiter.set_result(None)

    async def wait(self) -> None:
        """Until it rings; RuntimeError if somebody waits already."""
        if self._waiter is not None:
            raise RuntimeError("two tasks read the same output; start a request for each")
        if not self._has_rung:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._has_rung = False


class AsyncOutputStream:
    """The outputs of one prompt whose requests are in the engine; `async for` reads them.

    Whoever reads slowly gets more in one output: what it has not read is kept once, as tokens.
    One reader of many streams has itself told of news (`ring_with`) and asks `with_news` for them.
    """

    def __init__(self, prompt: PromptState, kind: RequestOutputKind, source: OutputSource) -> None:
        self.prompt = prompt
        self._source = source
        self._kind = kind
        self._bell = Bell()
        self._ring = self._bell.ring
        self._num_seen = 0
        self._is_closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output; EngineDeadError if there will be none. Cancelling aborts the request."""
        if self._is_closed:
            raise StopAsyncIteration
        try:
            while not self._has_news():
                self._source.check_alive()
                await self._bell.wait()
        except BaseException:
            self.close()
            raise
        self._note_seen()
        if self._kind is RequestOutputKind.DELTA:
            return self.prompt.take_delta()
        return self.prompt.output()

    @property
    def is_closed(self) -> bool:
        """Whether nothing comes any more."""
        return self._is_closed

    def ring_with(self, ring: Callable[[], None]) -> None:
        """Call this, and wake nobody, whenever something happens; instead of `async for`."""
        self._ring = ring

    def with_news(self) -> Sequence[CompletionState]:
        """Of a stream of deltas, the completions that have one now; all of these must be taken.

        EngineDeadError if there will be none.
        """
        prompt = self.prompt
        if prompt.num_output_tokens == self._num_seen:
            if not self._is_closed:
                self._source.check_alive()
            return ()
        self._note_seen()
        if len(prompt.completions) == 1:
            return prompt.completions
        return prompt.with_news()

    def close(self) -> None:
        """Abort what is not finished of it; nothing comes after that."""
        if not self._is_closed:
            self._is_closed = True
            self._source.abort_prompts([self.prompt])

    def notify(self) -> None:
        """A token has come."""
        if self._kind is not RequestOutputKind.FINAL_ONLY or self.prompt.finished:
            self._ring()

    def wake(self) -> None:
        """Something else has happened that a reader must hear of."""
        self._ring()

    def _note_seen(self) -> None:
        self._num_seen = self.prompt.num_output_tokens
        self._is_closed = self.prompt.finished

    def _has_news(self) -> bool:
        if self._kind is RequestOutputKind.FINAL_ONLY:
            return self.prompt.finished
        return self.prompt.num_output_tokens > self._num_seen
