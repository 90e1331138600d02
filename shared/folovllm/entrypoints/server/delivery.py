"""Hands what a step brought to all clients that stream, at once and without a task for each."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from types import coroutine
from typing import Any, Protocol

Send = Callable[[Any], Awaitable[None]]
_GROUP = 64
"""So many clients' events are written as text before the first of them is sent."""


class EventSource(Protocol):
    """Where the events of one client come from."""

    @property
    def is_finished(self) -> bool:
        """Whether the last event was taken."""

    def take_events(self) -> bytes:
        """All events that there are now; b"" if there are none."""

    def ring_with(self, ring: Callable[[], None]) -> None:
        """Have `ring` called whenever there may be new events."""


class Delivery:
    """Asks the sources that have rung for their events, once per turn of the event loop.

    A step brings a token to every stream. A task for each of them would cost more than the token's
    text. And events that are sent right behind each other cost less than those with work between
    them: whoever reads them (another process of this machine, say) is awake already.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._rung: list[Outlet] = []

    async def deliver(self, source: EventSource, send: Send) -> None:
        """Send the events of `source` to the end; cancelling stops it. Errors are `send`'s."""
        outlet = Outlet(self, source, send)
        try:
            await outlet.done
        finally:
            await outlet.close()

    def add(self, outlet: "Outlet") -> None:
        """It has rung: its turn comes when all that happens now has been noted."""
        if not self._rung:
            self._loop.call_soon(self._deliver)
        self._rung.append(outlet)

    def _deliver(self) -> None:
        rung, self._rung = self._rung, []
        for first in range(0, len(rung), _GROUP):
            group = rung[first : first + _GROUP]
            for outlet, events in [(outlet, outlet.take()) for outlet in group]:
                if events:
                    outlet.send(events)


class Outlet:
    """One client's way out. While it takes no more, nothing is taken from its source."""

    def __init__(self, delivery: Delivery, source: EventSource, send: Send) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the last event was sent."""
        self._delivery = delivery
        self._source = source
        self._send = send
        self._is_rung = False
        self._blocked: asyncio.Task[None] | None = None
        """Waits for a client that reads slowly."""
        source.ring_with(self.ring)
        self.ring()

    def ring(self) -> None:
        if not self._is_rung:
            self._is_rung = True
            if self._blocked is None:
                self._delivery.add(self)

    def take(self) -> bytes:
        self._is_rung = False
        if self.done.done():
            return b""
        try:
            return self._source.take_events()
        except Exception as error:
            self.done.set_exception(error)
            return b""

    def send(self, events: bytes) -> None:
        """Send; a client that cannot take them at once is waited for in a task of its own."""
        sending: Any = self._send({"type": "http.response.body", "body": events, "more_body": True})
        try:
            waits_for = sending.send(None)
        except StopIteration:
            self._end_if_finished()
        except Exception as error:
            self.done.set_exception(error)
        else:
            self._blocked = asyncio.ensure_future(self._finish(sending, waits_for))

    async def close(self) -> None:
        """Nothing is sent behind this."""
        self.done.cancel()
        if self._blocked is not None:
            self._blocked.cancel()
            await asyncio.gather(self._blocked, return_exceptions=True)

    async def _finish(self, sending: Coroutine[Any, Any, None], waits_for: Any) -> None:
        try:
            await _go_on(sending, waits_for)
        except Exception as error:
            if not self.done.done():
                self.done.set_exception(error)
            return
        self._blocked = None
        self._end_if_finished()
        if self._is_rung:
            self._delivery.add(self)

    def _end_if_finished(self) -> None:
        if self._source.is_finished and not self.done.done():
            self.done.set_result(None)


@coroutine
def _go_on(running: Coroutine[Any, Any, None], waits_for: Any) -> Any:
    """Await the rest of a coroutine that was begun by hand and waits for this future."""
    try:
        while True:
            yield waits_for
            waits_for = running.send(None)
    except StopIteration:
        return
    finally:
        running.close()
