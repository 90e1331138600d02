"""Server-sent events to a client that may go away at any time, or read slowly."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Response

Result = TypeVar("Result")
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """Nobody is left to answer."""


class EventStream(Response):
    """Sends what an iterator yields, and cancels it as soon as the client is gone.

    Not before the client has taken what was sent is the iterator asked for more: what waits for a
    slow client waits there, and nobody else waits for it.
    """

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        """on_end: called when nothing will be asked for any more, whether it began or not."""
        super().__init__(status_code=200, media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self._events = events
        self._on_end = on_end

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientGone):
                await while_connected(receive, self._send_all(send))
        finally:
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`; ClientGone, and the work cancelled, if the client goes before.

    The body of the call must have been received.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
