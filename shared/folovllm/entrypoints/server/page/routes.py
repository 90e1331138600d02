"""The page, the events that it shows, and its buttons, as routes of the server."""

import base64
import hashlib
import ipaddress
from importlib.resources import files
from typing import Literal

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ..app import Doors, answering
from ..errors import ApiError
from ..protocol import Body
from ..service import Service, json_response
from ..settings import ServerSettings
from .live_view import LiveView
from .stage_facts import stage_facts

_FILES = files("folovllm.entrypoints.server.page")
_MAX_READERS = 64
_OWN_SITES = ("same-origin", "none")
"""Values of Sec-Fetch-Site for what the page itself, or a person, asks for."""


class ControlBody(Body):
    """Of /page/control."""

    action: Literal["pause", "step", "resume"]


def add_page(app: Starlette, service: Service, stage: str, settings: ServerSettings) -> LiveView:
    """Add `GET /`, `GET /page/events` and `POST /page/control` to the server's routes.

    stage: the name of its package. Returns who has to be told what the engine does.
    """
    doors = Doors(settings)
    html, policy = _whole_page()
    may_control = lets_pause(settings)
    facts = stage_facts(
        stage, service.model_name, service.llm.facts, has_roofline=settings.measure_roofline
    )
    if settings.measure_roofline:
        service.llm.measure_roofline()
    view = LiveView(
        service.llm,
        {**facts, "may_control": may_control},
        lambda: service.is_draining,
        settings.pause_timeout_s,
    )

    async def page(request: Request) -> Response:
        headers = {"content-security-policy": policy, "cache-control": "no-cache"}
        headers |= {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    async def events(request: Request) -> Response:
        doors.check_key(request)
        _check_site(request)
        service.llm.check_alive()
        if view.num_readers >= _MAX_READERS:
            raise ApiError(429, f"{_MAX_READERS} watch already", kind="rate_limit_error")
        return StreamingResponse(
            view.events(), media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )

    async def control(request: Request) -> Response:
        doors.check_key(request)
        _check_site(request)
        if not request.headers.get("content-type", "").startswith("application/json"):
            raise ApiError(
                415, "send JSON, and say so: then a browser asks before another site may"
            )
        body = await doors.body(request, ControlBody)
        service.llm.check_alive()
        if not may_control:
            raise ApiError(403, f"this server lets nobody pause it: {WHY_NOT}")
        if service.is_draining:
            raise ApiError(503, "the server is shutting down", kind="server_error")
        if not view.num_readers:
            raise ApiError(409, "nobody watches, and a pause ends when the last one leaves")
        {"pause": view.pause, "step": view.step_once, "resume": view.resume}[body.action]()
        return json_response({"is_paused": view.is_paused})

    app.add_route("/", answering(page), methods=["GET"])
    app.add_route("/page/events", answering(events), methods=["GET"])
    app.add_route("/page/control", answering(control), methods=["POST"])
    return view


WHY_NOT = (
    "pausing stops everybody's requests, and --page auto allows it only where a key is set or no "
    "other machine can come; --page control allows it to all who come in"
)


def lets_pause(settings: ServerSettings) -> bool:
    if settings.page == "auto":
        return settings.api_key is not None or _is_loopback(settings.host)
    return settings.page == "control"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_site(request: Request) -> None:
    """Another site's page, in the browser of somebody who may come in, is not let in."""
    if request.headers.get("sec-fetch-site", "none") not in _OWN_SITES:
        raise ApiError(403, "only this server's own page may do that")


def _whole_page() -> tuple[bytes, str]:
    """The page in one piece, and the policy that lets nothing else run in it."""
    html = (_FILES / "page.html").read_text(encoding="utf-8")
    hashes = {}
    for kind, name in (("style", "page.css"), ("script", "page.js")):
        text = (_FILES / name).read_text(encoding="utf-8")
        html = html.replace(f"<{kind}></{kind}>", f"<{kind}>{text}</{kind}>")
        digest = hashlib.sha256(text.encode()).digest()
        hashes[kind] = f"'sha256-{base64.b64encode(digest).decode()}'"
    policy = (
        f"default-src 'none'; style-src {hashes['style']}; script-src {hashes['script']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return html.encode(), policy
