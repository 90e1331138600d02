"""Calls on their way to a replica, and its answers on their way back."""

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response

from ..errors import ApiError
from ..event_stream import DONE, ClientGone, Receive, Send, while_connected
from .prefix_routing import Piece, Placement

_REPLICA_WAIT_S = 60.0
"""How long a call may wait for a replica that takes it, while all of them are being started."""
_CONNECT_TIMEOUT_S = 10.0
_IDLE_CONNECTION_S = 2.0
"""How long a connection is kept for the next call; below the 5 s of a replica's server."""
_SILENCE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""When a machine counts as gone that says nothing any more, where the system can be told."""
_EVENT_END = b"\n\n"
_HEADERS = "latin-1"
_NOT_PASSED_ON = frozenset(
    b"connection content-length date expect host keep-alive server te trailer transfer-encoding "
    b"upgrade".split()
)
"""Headers that concern one connection."""


@dataclass(frozen=True)
class Call:
    """What a client wants; headers are pairs of name and value, names in small letters."""

    method: str
    target: str
    """Path and query."""
    headers: list[tuple[bytes, bytes]]
    body: bytes
    pieces: list[Piece] | None
    """Of its prompt; None for a call that has none."""


@dataclass(frozen=True)
class Head:
    """How an answer begins."""

    status: int
    headers: list[tuple[bytes, bytes]]


class Forwarder:
    """Has Ray Serve's router choose a replica for a call, and sends the call there.

    What Ray Serve knows as a request is a place in that replica, held as long as the call lasts.
    """

    def __init__(
        self, handle: DeploymentHandle, session: aiohttp.ClientSession, max_waiting: int
    ) -> None:
        """max_waiting: calls for which no replica has been found yet; more are refused."""
        self._handle = handle
        self._session = session
        self._max_waiting = max_waiting
        self._num_waiting = 0

    async def parts(
        self, call: Call, wait_s: float = _REPLICA_WAIT_S
    ) -> AsyncGenerator[Head | bytes]:
        """The answer: a head, then its body in pieces, a stream's of whole events.

        A replica that is lost before there was anything to yield costs nothing but time: another
        one gets the call. Not more than one, for the call may be what they die of. Where a stream
        has begun an event says that it is cut off.
        """
        has_begun = False
        try:
            for is_last in (False, True):
                try:
                    async with aclosing(self._ask(call, wait_s)) as parts:
                        async for part in parts:
                            has_begun = True
                            yield part
                    return
                except (aiohttp.ClientError, ConnectionError):
                    if has_begun or is_last:
                        text = "the engine that had this request was lost; send it again"
                        raise ApiError(500, text, kind="server_error") from None
        except ApiError as error:
            if has_begun:
                yield b"data: " + error.body() + _EVENT_END + DONE
            else:
                response = error.response()
                yield Head(response.status_code, response.raw_headers)
                yield bytes(response.body)

    async def _ask(self, call: Call, wait_s: float) -> AsyncGenerator[Head | bytes]:
        async with AsyncExitStack() as held:
            address = await self._choose(call, wait_s, held)
            answer = await self._session.request(
                call.method,
                f"http://{address}{call.target}",
                data=call.body,
                headers=[(n.decode(_HEADERS), v.decode(_HEADERS)) for n, v in _kept(call.headers)],
                allow_redirects=False,
            )
            held.callback(answer.close)  # of no effect behind the end; before it the replica hears
            headers = _kept(answer.raw_headers)
            if answer.content_type != "text/event-stream":
                content = await answer.read()
                yield Head(answer.status, [*headers, (b"content-length", b"%d" % len(content))])
                yield content
                return
            head: Head | None = Head(answer.status, headers)
            async for events in _whole_events(answer.content.iter_any()):
                if head is not None:
                    yield head  # now that there is something to read
                    head = None
                yield events

    async def _choose(self, call: Call, wait_s: float, held: AsyncExitStack) -> str:
        """The address of a replica, which is held until the end of `held`."""
        if self._num_waiting >= self._max_waiting:
            raise ApiError(
                429, f"{self._num_waiting} calls wait for an engine that takes them; try again "
                "later", kind="rate_limit_error",
            )  # fmt: skip
        placement = Placement(call.pieces)
        held.callback(setattr, placement, "is_over", True)
        self._num_waiting += 1
        try:
            async with asyncio.timeout(wait_s):
                choice = self._handle.choose_replica(placement)
                replica = await held.enter_async_context(choice)
        except (TimeoutError, RayError, RayServeException):
            text = "no engine is ready; they are being started again"
            raise ApiError(503, text, kind="server_error") from None
        finally:
            self._num_waiting -= 1
        return str(replica.replica_metadata["address"])


class Relayed(Response):
    """An answer as it comes; the call is given up as soon as the client is gone."""

    def __init__(self, parts: AsyncGenerator[Head | bytes], on_end: Callable[[], None]) -> None:
        """on_end: called when nothing will be asked for any more, whether it began or not."""
        super().__init__()
        self._parts = parts
        self._on_end = on_end

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientGone):
                await while_connected(receive, self._send_all(send))
        finally:
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._parts) as parts:
            async for part in parts:
                if isinstance(part, Head):
                    start = {"status": part.status, "headers": part.headers}
                    await send({"type": "http.response.start", **start})
                else:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def make_session() -> aiohttp.ClientSession:
    """For any number of calls at once, each as long as it takes; inside a running event loop."""
    connector = aiohttp.TCPConnector(
        limit=0, keepalive_timeout=_IDLE_CONNECTION_S, socket_factory=_make_socket
    )
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept-Encoding"),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def _make_socket(address: Any) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family=family, type=kind, proto=protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _SILENCE.items():
        if hasattr(socket, name):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made


async def _whole_events(content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same, cut behind events: what has come when the rest does not is fit to be read."""
    rest = b""
    async for piece in content:
        events, end, rest = (rest + piece).rpartition(_EVENT_END)
        if end:
            yield events + end
    if rest:
        yield rest


def _kept(headers: Any) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.lower() not in _NOT_PASSED_ON]
