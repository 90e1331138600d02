"""The life of a server: from the socket to the last answer."""

import asyncio
import importlib.util
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from ...sampling_params import SamplingParams
from ..async_llm import AsyncLLM
from ..llm import DEFAULT_MODEL, LLM
from .app import make_app
from .metrics import EngineMetrics
from .service import Service
from .settings import ServerSettings

EXIT_ENGINE_DIED = 1
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
    listener = _listen(settings)
    factory = None
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_serve(llm_class, model, llm_options, settings, listener))


async def _serve(
    llm_class: type[LLM],
    model: str | None,
    llm_options: dict[str, Any],
    settings: ServerSettings,
    listener: socket.socket,
) -> int:
    name = settings.served_model_name or _short_name(model or str(DEFAULT_MODEL))
    metrics = EngineMetrics(name)
    llm = AsyncLLM(
        llm_class,
        model,
        max_queue_len=settings.max_queue_len,
        observers=[metrics],
        **llm_options,
    )
    async with llm:
        service = Service(llm, name, settings, _defaults(llm, settings))
        app = make_app(service, metrics, settings)
        config = uvicorn.Config(
            app,
            lifespan="off",
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=_LAST_ANSWERS_S,
        )
        ending = asyncio.Event()
        server = _Server(config, ending.set)
        tasks = [
            asyncio.create_task(_end_with_engine(llm, server)),
            asyncio.create_task(_drain(service, server, ending, settings.drain_timeout_s)),
        ]
        host, port = listener.getsockname()[:2]
        print(f"Serving {name} at http://{host}:{port} (Ctrl-C ends it)", flush=True)
        await server.serve(sockets=[listener])
        for task in tasks:
            task.cancel()
        has_died = llm.died.is_set()
    if has_died:
        print(f"error: {llm.death}", file=sys.stderr)
    return EXIT_ENGINE_DIED if has_died else 0


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
    service: Service, server: uvicorn.Server, ending: asyncio.Event, timeout_s: float
) -> None:
    await ending.wait()
    service.is_draining = True
    deadline = asyncio.get_running_loop().time() + timeout_s
    while service.num_calls and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.05)
    server.should_exit = True


async def _end_with_engine(llm: AsyncLLM, server: uvicorn.Server) -> None:
    await llm.died.wait()
    server.should_exit = True


def _listen(settings: ServerSettings) -> socket.socket:
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


def _short_name(model: str) -> str:
    """A directory's last part; a Hub id, or a preset, as it is."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _defaults(llm: AsyncLLM, settings: ServerSettings) -> SamplingParams:
    is_auto = settings.generation_config == "auto"
    return llm.get_default_sampling_params() if is_auto else SamplingParams()
