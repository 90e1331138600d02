"""The life of a server: from the socket to the last answer."""

import asyncio
import gc
import importlib.util
import socket
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import uvicorn

from ...sampling_params import SamplingParams
from ..async_llm import AsyncLLM
from ..engine_observer import EngineObserver
from ..llm import DEFAULT_MODEL, LLM
from .app import make_app
from .event_stream import with_direct_send
from .metrics import EngineMetrics
from .page.routes import add_page
from .service import Service
from .settings import ServerSettings

Result = TypeVar("Result")
EXIT_ENGINE_DIED = 1
_BACKLOG = 2048
"""Connections that may wait to be accepted; uvicorn's own."""
_ALLOCATIONS_PER_COLLECTION = 20_000
"""Nearly nothing of a call waits for the collector; 700 would have it look after every other."""
_LAST_ANSWERS_S = 5
"""How long clients may take to read what was sent to them before the end."""


def run_server(
    llm_class: type[LLM], model: str | None, llm_options: dict[str, Any], settings: ServerSettings
) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit status, which is 1 if the engine died.

    After the signal new calls get status 503, and those under way their answers; a second signal
    does not wait for them. OSError if the address is in use, before anything is loaded; ValueError
    as from `LLM`.
    """
    listener = listen(settings)
    return run_in_loop(_serve(llm_class, model, llm_options, settings, listener))


def run_in_loop(work: Coroutine[Any, Any, Result]) -> Result:
    """In an event loop of uvloop's, where that is installed."""
    factory = None
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)


async def _serve(
    llm_class: type[LLM],
    model: str | None,
    llm_options: dict[str, Any],
    settings: ServerSettings,
    listener: socket.socket,
) -> int:
    name = served_name(model, settings)
    metrics = EngineMetrics(name)
    observers: list[EngineObserver] = [metrics]
    llm = AsyncLLM(
        llm_class,
        model,
        max_queue_len=settings.max_queue_len,
        step_timeout_s=settings.step_timeout_s,
        observers=observers,
        **llm_options,
    )
    async with llm:
        service = make_service(llm, name, settings)
        app = make_app(service, metrics, settings)
        if settings.page != "off" and llm.facts.can_be_watched:
            stage = llm_class.engine_class.__module__.partition(".")[0]
            observers.append(add_page(app, service, stage, settings))
        await serve_until_told(app, service, name, settings, listener, llm.died)
        has_died = llm.died.is_set()
    if has_died:
        print(f"error: {llm.death}", file=sys.stderr)
    return EXIT_ENGINE_DIED if has_died else 0


class Calls(Protocol):
    """What is under way behind an application."""

    is_draining: bool
    num_calls: int


async def serve_until_told(
    app: Any,
    calls: Calls,
    name: str,
    settings: ServerSettings,
    listener: socket.socket,
    died: asyncio.Event,
) -> None:
    """Serve an ASGI application until a signal, and the calls under way then; or until `died`.

    name: of the model, for the line that says where it is served.
    """
    ending = asyncio.Event()
    server = _Server(server_config(app), ending.set)
    tasks = [
        asyncio.create_task(_end_when(died, server)),
        asyncio.create_task(_drain(calls, server, ending, settings.drain_timeout_s)),
    ]
    open_door(listener)
    host, port = listener.getsockname()[:2]
    print(f"Serving {name} at http://{host}:{port} (Ctrl-C ends it)", flush=True)
    await server.serve(sockets=[listener])
    for task in tasks:
        task.cancel()


def open_door(listener: socket.socket) -> None:
    """All is loaded: whoever hears of the address may come at once."""
    # What is there now stays: looking through it again and again for garbage would stop tokens.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS_PER_COLLECTION)
    listener.listen(_BACKLOG)


def server_config(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        with_direct_send(app),
        lifespan="off",
        access_log=False,
        proxy_headers=False,  # nobody asks where a call came from
        log_level="warning",
        timeout_graceful_shutdown=_LAST_ANSWERS_S,
    )


class _Server(uvicorn.Server):
    """Tells of a signal instead of ending at once; the second one does that."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]) -> None:
        super().__init__(config)
        self._loop = asyncio.get_running_loop()
        self._on_signal = on_signal
        self._was_told = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._was_told:
            self.should_exit = self.force_exit = True
        self._was_told = True
        self._loop.call_soon_threadsafe(self._on_signal)


async def _drain(
    calls: Calls, server: uvicorn.Server, ending: asyncio.Event, timeout_s: float
) -> None:
    await ending.wait()
    calls.is_draining = True
    deadline = asyncio.get_running_loop().time() + timeout_s
    while calls.num_calls and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.05)
    server.should_exit = True


async def _end_when(died: asyncio.Event, server: uvicorn.Server) -> None:
    await died.wait()
    server.should_exit = True


def listen(settings: ServerSettings) -> socket.socket:
    """Bound, so that the address is taken; OSError if it is already."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot listen at {settings.host}:{settings.port} ({error.strerror}); choose another "
            f"--port, or 0 for a free one"
        ) from error
    return listener


def served_name(model: str | None, settings: ServerSettings) -> str:
    """A directory's last part; a Hub id, or a preset, as it is."""
    if settings.served_model_name is not None:
        return settings.served_model_name
    model = model or str(DEFAULT_MODEL)
    return Path(model).resolve().name if Path(model).is_dir() else model


def make_service(llm: AsyncLLM, name: str, settings: ServerSettings) -> Service:
    """name: what clients call the model."""
    is_auto = settings.generation_config == "auto"
    defaults = llm.get_default_sampling_params() if is_auto else SamplingParams()
    return Service(llm, name, settings, defaults)
