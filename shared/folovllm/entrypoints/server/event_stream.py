"""Server-sent events to a client that may go away at any time, or read slowly."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response

from .delivery import Delivery, EventSource, Send

Result = TypeVar("Result")
Application = Callable[[Any, "Receive", Send], Awaitable[None]]
Receive = Callable[[], Awaitable[Any]]
DONE = b"data: [DONE]\n\n"


_DIRECT_SEND = "folovllm.direct_send"


def with_direct_send(app: Application) -> Application:
    """Remembers for `EventStream` where answers go to, before anybody wraps it."""

    async def run(scope: Any, receive: Receive, send: Send) -> None:
        scope[_DIRECT_SEND] = send
        await app(scope, receive, send)

    return run


class ClientGone(Exception):
    """Nobody is left to answer."""


class EventStream(Response):
    """Sends the events of a source, and stops as soon as the client is gone.

    Not before the client has taken what was sent is the source asked for more: what waits for a
    slow client waits there, and nobody else waits for it.
    """

    def __init__(self, source: EventSource, delivery: Delivery, on_end: Callable[[], None]) -> None:
        """on_end: called when nothing will be asked for any more, whether it began or not."""
        super().__init__(status_code=200, media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self._source = source
        self._delivery = delivery
        self._on_end = on_end

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientGone):
                await while_connected(receive, self._send_all(scope, send))
        finally:
            self._on_end()

    async def _send_all(self, scope: Any, send: Send) -> None:
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        # Past all that stands between the server and the application: it looks at the start only.
        direct: Send = scope.get(_DIRECT_SEND, send)
        await self._delivery.deliver(self._source, direct)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`; ClientGone, and the work cancelled, if the client goes before.

    The body of the call must have been received.
    """
    guard = _Guard(receive)
    try:
        return await work
    except asyncio.CancelledError:
        if guard.was_it():
            raise ClientGone from None
        raise
    finally:
        guard.close()


class _Guard:
    """Cancels the task that made it when the client goes, as `asyncio.timeout` does it by a clock.

    The task itself works: one of its own for that, and one that waits for either, would cost a
    call a twentieth of a millisecond, twice.
    """

    def __init__(self, receive: Receive) -> None:
        task = asyncio.current_task()
        assert task is not None  # coroutines run in tasks
        self._task = task
        self._num_cancelled = task.cancelling()
        self._has_cancelled = False
        self._is_closed = False
        self._leaving = asyncio.ensure_future(_until_gone(receive))
        self._leaving.add_done_callback(self._on_left)

    def was_it(self) -> bool:
        """Whether the client's going, and nobody else, cancelled the task; it may go on then."""
        return self._has_cancelled and self._task.uncancel() <= self._num_cancelled

    def close(self) -> None:
        self._is_closed = True
        self._leaving.cancel()

    def _on_left(self, leaving: asyncio.Future[None]) -> None:
        if not leaving.cancelled():
            leaving.exception()  # a connection that fails is gone
        if not self._is_closed:
            self._has_cancelled = True
            self._task.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
