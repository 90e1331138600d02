"""The one address of several replicas: takes calls in, has one chosen for each, passes it on."""

import asyncio

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..app import Doors, answering, refuse
from ..errors import ApiError
from ..settings import ServerSettings
from .forwarding import Call, Forwarder, Relayed
from .merged_metrics import merge_metrics
from .prefix_routing import prefix_pieces

_GENERATING = ("/v1/completions", "/v1/chat/completions")
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_METRICS_TIMEOUT_S = 5.0
_HEALTH_TIMEOUT_S = 2.0


class Front:
    """Answers what concerns all replicas and passes on the rest, as their servers will answer it.

    It looks at a body only to have a replica chosen. The doors are those of the server, so that
    nobody without a key, and no endless body, gets as far as that.
    """

    def __init__(self, handle: DeploymentHandle, forwarder: Forwarder, settings: ServerSettings):
        self.is_draining = False
        self.num_calls = 0
        """Calls that generate and have not been answered to the end."""
        self._handle = handle
        self._forwarder = forwarder
        self._doors = Doors(settings)

    def app(self) -> Starlette:
        routes = [
            Route("/health", answering(self.health), methods=["GET"]),
            Route("/metrics", answering(self.metrics), methods=["GET"]),
            Route("/{path:path}", answering(self.pass_on), methods=_METHODS),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: refuse})

    async def health(self, request: Request) -> Response:
        """200 as long as one replica can answer."""
        if self.is_draining:
            return Response(status_code=503)
        call = Call("GET", "/health", [], b"", None)
        return Relayed(self._forwarder.parts(call, _HEALTH_TIMEOUT_S), lambda: None)

    async def metrics(self, request: Request) -> Response:
        """Those of all replicas; the label `engine` says whose they are."""
        broadcast = self._handle.broadcast("metrics_text")
        try:
            texts = await broadcast.results_async(
                timeout_s=_METRICS_TIMEOUT_S, return_exceptions=True
            )
        except (TimeoutError, RayError, RayServeException):
            raise ApiError(503, "the replicas do not answer", kind="server_error") from None
        content = merge_metrics(text.decode() for text in texts if isinstance(text, bytes))
        return Response(content, media_type="text/plain; version=0.0.4")

    async def pass_on(self, request: Request) -> Response:
        path = request.url.path
        is_generating = request.method == "POST" and path in _GENERATING
        body = b""
        if request.method != "GET":
            body = await self._doors.raw_body(request)
        if is_generating and self.is_draining:
            raise ApiError(503, "the server is shutting down", kind="server_error")
        pieces = await asyncio.to_thread(prefix_pieces, body) if is_generating else None
        target = path + (f"?{request.url.query}" if request.url.query else "")
        call = Call(request.method, target, request.headers.raw, body, pieces)
        parts = self._forwarder.parts(call)
        if not is_generating:
            return Relayed(parts, lambda: None)
        self.num_calls += 1
        return Relayed(parts, self._end_call)

    def _end_call(self) -> None:
        self.num_calls -= 1
