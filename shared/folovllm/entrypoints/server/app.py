"""The routes of the server, and what every call has to pass before it is looked at."""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pydantic_core
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...hardware import package_version
from ..async_stream import EngineDeadError
from .errors import ApiError, invalid_body
from .event_stream import ClientGone
from .metrics import EngineMetrics
from .protocol import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, TokenizeChatBody
from .service import Service, json_response
from .settings import ServerSettings

BodyType = TypeVar("BodyType", bound=Body)
Handler = Callable[[Request], Awaitable[Response]]
_CLIENT_GONE = 499
"""nginx's status for nobody to read it."""


class Application(Starlette):
    """Calls that generate go straight to their handlers.

    What Starlette has in between costs such a call a tenth of its time on the way in, and a little
    whenever it goes on; of all that it does, they need the choice by method and path alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._direct: dict[tuple[str, str], Handler] = {}

    def add_direct_route(self, path: str, handler: Handler) -> None:
        """handler: of a POST; it raises nothing that a client should hear of."""
        self.add_route(path, handler, methods=["POST"])
        self._direct["POST", path] = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._direct.get((scope.get("method", ""), scope.get("path", "")))
        if handler is None:
            await super().__call__(scope, receive, send)
            return
        response = await handler(Request(scope, receive, send))
        await response(scope, receive, send)


def make_app(service: Service, metrics: EngineMetrics, settings: ServerSettings) -> Application:
    """The application; nothing of it is logged but what fails."""
    app = Application()
    doors = Doors(settings)
    created = int(time.time())

    async def complete(request: Request) -> Response:
        return await service.complete(request, await doors.body(request, CompletionBody))

    async def chat(request: Request) -> Response:
        return await service.chat(request, await doors.body(request, ChatBody))

    async def tokenize(request: Request) -> Response:
        raw = await doors.raw_body(request)
        if _has_messages(raw):
            return await service.tokenize(_parse(raw, TokenizeChatBody))
        return await service.tokenize(_parse(raw, TokenizeBody))

    async def detokenize(request: Request) -> Response:
        return await service.detokenize(await doors.body(request, DetokenizeBody))

    async def models(request: Request) -> Response:
        doors.check_key(request)
        limit = service.llm.facts.max_model_len
        model = {"id": service.model_name, "object": "model", "created": created}
        model |= {"owned_by": "folovllm", "max_model_len": limit}
        return json_response({"object": "list", "data": [model]})

    async def health(request: Request) -> Response:
        service.llm.check_alive()
        return Response(status_code=503 if service.is_draining else 200)

    async def version(request: Request) -> Response:
        return json_response({"version": package_version("folovllm") or "source checkout"})

    async def scrape(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    for path, handler in {"/v1/completions": complete, "/v1/chat/completions": chat}.items():
        app.add_direct_route(path, answering(handler))
    posts = {"/tokenize": tokenize, "/detokenize": detokenize}
    gets = {"/v1/models": models, "/health": health, "/version": version, "/metrics": scrape}
    for method, handlers in (("POST", posts), ("GET", gets)):
        for path, handler in handlers.items():
            app.add_route(path, answering(handler), methods=[method])
    app.add_exception_handler(HTTPException, refuse)
    return app


class Doors:
    """Who may come in, and with how much."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings

    def check_key(self, request: Request) -> None:
        """Compared in constant time: how long it takes tells nothing of the key."""
        key = self._settings.api_key
        if key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError(
                401, "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                kind="authentication_error", code="invalid_api_key",
            )  # fmt: skip

    async def body(self, request: Request, body_class: type[BodyType]) -> BodyType:
        return _parse(await self.raw_body(request), body_class)

    async def raw_body(self, request: Request) -> bytes:
        """All of it, if it is neither too long nor too late. The key is looked at first."""
        self.check_key(request)
        limit = self._settings.max_body_bytes
        length = request.headers.get("content-length", "0")
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                if not length.isdecimal() or int(length) <= limit:
                    async for chunk in request.stream():
                        body += chunk
                        if len(body) > limit:
                            break
                    else:
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, "the body did not come in time") from None
        except ClientDisconnect:
            raise ClientGone from None
        raise ApiError(413, f"the body is longer than the {limit} bytes that are taken")


def _parse(raw: bytes, body_class: type[BodyType]) -> BodyType:
    try:
        return body_class.model_validate_json(raw)
    except ValidationError as error:
        raise invalid_body(error) from None


def _has_messages(raw: bytes) -> bool:
    try:
        content: Any = pydantic_core.from_json(raw)
    except ValueError:
        return False
    return isinstance(content, dict) and "messages" in content


def answering(handler: Handler) -> Handler:
    """With every error in OpenAI's form."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except ApiError as error:
            return error.response()
        except ClientGone:
            return Response(status_code=_CLIENT_GONE)
        except EngineDeadError as error:
            return ApiError(500, str(error), kind="server_error").response()

    return answer


async def refuse(request: Request, error: Exception) -> Response:
    """A path or a method that there is not."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail)).response()
