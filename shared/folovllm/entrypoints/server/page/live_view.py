"""Everybody who watches an engine through the page: what they are sent, and their pause."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from statistics import median
from typing import Any

import msgspec

from ....request import Request
from ...async_llm import AsyncLLM
from ...core_messages import Snapshot, Step

TICK_S = 1.0
"""Between two reports of rates, which also show whether a reader is still there."""
WINDOW_S = 2.0
"""Over which output tokens per second are counted."""
_MAX_UNREAD = 32
"""Events that wait for a slow reader; of more, the oldest are not sent."""
_MAX_TTFTS = 100


class LiveView:
    """Hands what happens to any number of readers, while there are some.

    A pause belongs to those who watch. It ends when the last of them leaves, when nobody has
    clicked for `pause_timeout_s`, and when the server drains: so nobody else waits for ever.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        facts: dict[str, Any],
        is_draining: Callable[[], bool],
        pause_timeout_s: float,
    ) -> None:
        """facts: what a reader is told first."""
        self.is_paused = False
        self._llm = llm
        self._facts = facts
        self._is_draining = is_draining
        self._pause_timeout_s = pause_timeout_s
        self._deadline_s = 0.0
        self._readers: set[_Reader] = set()
        self._ticking: asyncio.Task[None] | None = None
        self._rates = Rates()

    @property
    def num_readers(self) -> int:
        return len(self._readers)

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events for one reader, until it is closed."""
        reader = _Reader()
        self._readers.add(reader)
        try:
            if self._ticking is None:
                self._rates = Rates()
                self._llm.watch(self._on_snapshot)
                self._ticking = asyncio.create_task(self._tick())
            else:
                self._llm.watch(self._on_snapshot)  # so that the newcomer sees something
            reader.put(_event({"type": "facts", **self._facts}))
            while (event := await reader.get()) is not None:
                yield event
        finally:
            self._leave(reader)

    def pause(self) -> None:
        self.is_paused = True
        self._extend_pause()
        self._llm.pause()

    def step_once(self) -> None:
        """One step of a paused engine."""
        self._extend_pause()
        self._llm.step_once()

    def resume(self) -> None:
        self.is_paused = False
        self._llm.resume()

    def on_added(self, requests: Sequence[Request]) -> None:
        if self._readers:
            self._rates.on_added(requests)

    def on_step(self, step: Step) -> None:
        if self._readers:
            self._rates.on_step(step)

    def on_stopped(self, request_ids: Iterable[str]) -> None: ...

    def on_aborted(self, request_ids: Iterable[str]) -> None:
        self._rates.forget(request_ids)

    def on_idle(self) -> None: ...

    def _extend_pause(self) -> None:
        self._deadline_s = time.perf_counter() + self._pause_timeout_s

    def _leave(self, reader: "_Reader") -> None:
        self._readers.discard(reader)
        if self._readers or self._ticking is None:
            return
        self._ticking.cancel()
        self._ticking = None
        if self._llm.death is None:
            self._llm.unwatch()
            self.resume()

    async def _tick(self) -> None:
        while True:
            now = time.perf_counter()
            if self.is_paused and (now >= self._deadline_s or self._is_draining()):
                self.resume()
            left_s = max(0, round(self._deadline_s - now)) if self.is_paused else None
            rates = {"is_paused": self.is_paused, "pause_left_s": left_s, **self._rates.at(now)}
            self._send({"type": "rates", **rates})
            is_over = self._is_draining() and not self._llm.num_unfinished
            if is_over or self._llm.death is not None:
                for reader in self._readers:
                    reader.put(None)
            await asyncio.sleep(TICK_S)

    def _on_snapshot(self, snapshot: Snapshot) -> None:
        rates = self._rates.at(time.perf_counter())
        self._send({"type": "snapshot", **msgspec.to_builtins(_as_dict(snapshot)), **rates})

    def _send(self, content: dict[str, Any]) -> None:
        event = _event(content)
        for reader in self._readers:
            reader.put(event)


class Rates:
    """What is counted over the steps of an engine, since somebody watches."""

    def __init__(self) -> None:
        self._tokens: deque[tuple[float, int]] = deque()
        """(Time, output tokens) of the steps of the last WINDOW_S."""
        self._arrivals: dict[str, float] = {}
        """Of requests without a token."""
        self._ttfts_s: deque[float] = deque(maxlen=_MAX_TTFTS)
        self._num_looked_up = self._num_found = self._num_preemptions = 0
        self._began_s = time.perf_counter()

    def on_added(self, requests: Sequence[Request]) -> None:
        self._arrivals |= {request.request_id: request.arrival_time for request in requests}

    def on_step(self, step: Step) -> None:
        self._tokens.append((step.time_s, len(step.tokens)))
        self._drop_old(step.time_s)
        self._num_preemptions += step.stats.num_preemptions
        self._num_looked_up += step.stats.num_prompt_tokens_looked_up or 0
        self._num_found += step.stats.num_prompt_tokens_found or 0
        for token in step.tokens if self._arrivals else ():
            arrival_s = self._arrivals.pop(token.request_id, None)
            if arrival_s is not None:
                self._ttfts_s.append(step.time_s - arrival_s)

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._arrivals.pop(request_id, None)

    def at(self, now: float) -> dict[str, float | int | None]:
        """hit_rate: of prompt tokens looked up; None, like the TTFT, before there is one."""
        self._drop_old(now)
        window_s = max(min(WINDOW_S, now - self._began_s), 1e-3)
        found, looked_up = self._num_found, self._num_looked_up
        return {
            "tokens_per_s": sum(number for _, number in self._tokens) / window_s,
            "ttft_p50_s": median(self._ttfts_s) if self._ttfts_s else None,
            "num_ttfts": len(self._ttfts_s),
            "hit_rate": found / looked_up if looked_up else None,
            "num_preemptions": self._num_preemptions,
        }

    def _drop_old(self, now: float) -> None:
        while self._tokens and self._tokens[0][0] < now - WINDOW_S:
            self._tokens.popleft()


class _Reader:
    """Events on their way to one reader."""

    def __init__(self) -> None:
        self._events: deque[bytes | None] = deque(maxlen=_MAX_UNREAD)
        self._news = asyncio.Event()

    def put(self, event: bytes | None) -> None:
        """None is the end."""
        self._events.append(event)
        self._news.set()

    async def get(self) -> bytes | None:
        while not self._events:
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()


def _as_dict(snapshot: Snapshot) -> dict[str, Any]:
    """With names also where the wire between the processes has none."""
    view = snapshot.view
    return {
        "num_steps": snapshot.num_steps,
        "is_paused": snapshot.is_paused,
        "story": snapshot.story,
        "step_s": snapshot.step_s,
        "least_s": snapshot.least_s,
        "requests": [request._asdict() for request in view.requests],
        "num_left_out": view.num_left_out,
        "memory": view.memory,
        "planned": [
            {
                "number": planned.number,
                "shares": [
                    {
                        "request_id": share.request_id,
                        "num_tokens": share.num_scheduled_tokens,
                        "is_decode": share.is_decode,
                    }
                    for share in planned.shares
                ],
            }
            for planned in snapshot.planned
        ],
    }


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
