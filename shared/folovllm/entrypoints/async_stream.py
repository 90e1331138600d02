"""What `AsyncLLM` hands out: the outputs of one prompt, as they come."""

import asyncio
from collections.abc import Sequence
from typing import Protocol, Self

from .output_processor import PromptState
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


class AsyncOutputStream:
    """The outputs of one prompt whose requests are in the engine; `async for` reads them.

    Whoever reads slowly gets more in one output: what it has not read is kept once, as tokens.
    """

    def __init__(self, prompt: PromptState, kind: RequestOutputKind, source: OutputSource) -> None:
        self.prompt = prompt
        self._source = source
        self._kind = kind
        self._news = asyncio.Event()
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
                self._news.clear()
                self._source.check_alive()
                await self._news.wait()
        except BaseException:
            self.close()
            raise
        self._num_seen = self.prompt.num_output_tokens
        self._is_closed = self.prompt.finished
        if self._kind is RequestOutputKind.DELTA:
            return self.prompt.take_delta()
        return self.prompt.output()

    def close(self) -> None:
        """Abort what is not finished of it; nothing comes after that."""
        if not self._is_closed:
            self._is_closed = True
            self._source.abort_prompts([self.prompt])

    def notify(self) -> None:
        """Something happened that a reader may wait for."""
        self._news.set()

    def _has_news(self) -> bool:
        if self._kind is RequestOutputKind.FINAL_ONLY:
            return self.prompt.finished
        return self.prompt.num_output_tokens > self._num_seen
