"""What Ray Serve runs N times: one engine, with the server of `--replicas 1` in front of it."""

import asyncio
import os
import sys
from dataclasses import replace
from typing import Any

import uvicorn
from ray import serve
from ray.serve.schema import ApplicationStatus
from ray.util import get_node_ip_address

from ...async_llm import AsyncLLM
from ...llm import LLM
from ..app import make_app
from ..metrics import EngineMetrics
from ..run import EXIT_ENGINE_DIED, listen, make_service, open_door, server_config
from ..settings import ServerSettings


class EngineReplica:
    """An engine that answers over HTTP at a port of its own; Ray Serve says who calls it.

    Calls do not pass through Ray: whoever got this replica from Ray Serve's router sends them to
    the address in the replica's metadata, so that streams have TCP's flow control and end with
    their connection, as without replicas.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self,
        llm_class: type[LLM],
        model: str | None,
        llm_options: dict[str, Any],
        settings: ServerSettings,
        name: str,
        host: str | None,
    ) -> None:
        """name: what clients call the model; host: to listen at, None for the machine's in Ray.

        Returns when the engine is ready, or is known to be a mistake.
        """
        self._metrics = EngineMetrics(name, engine=str(serve.get_replica_context().rank.rank))
        self._llm = AsyncLLM(
            llm_class,
            model,
            max_queue_len=settings.max_queue_len,
            step_timeout_s=settings.step_timeout_s,
            observers=[self._metrics],
            **llm_options,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._address = ""
        self._mistake: str | None = None
        try:
            await self._llm.__aenter__()
        except ValueError as error:
            if not _is_first_start():
                raise
            self._mistake = str(error)
            return
        listener = listen(replace(settings, host=host or get_node_ip_address(), port=0))
        app = make_app(make_service(self._llm, name, settings), self._metrics, settings)
        server = uvicorn.Server(server_config(app))
        open_door(listener)
        host, port = listener.getsockname()[:2]
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._tasks = [
            asyncio.create_task(server.serve(sockets=[listener])),
            asyncio.create_task(self._end_with_engine()),
        ]

    async def mistake(self) -> str | None:
        """Of the user, if that is why there is no engine."""
        return self._mistake

    def record_replica_metadata(self) -> dict[str, str]:
        """For Ray Serve, which hands it to whoever chooses this replica."""
        return {"address": self._address}

    def check_health(self) -> None:
        """For Ray Serve; EngineDeadError gets this replica replaced."""
        if self._mistake is None:  # else whoever started all this ends it
            self._llm.check_alive()

    async def metrics_text(self) -> bytes:
        return self._metrics.text()

    async def __del__(self) -> None:
        """Ray Serve awaits it when it ends this replica."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await self._llm.__aexit__()

    async def _end_with_engine(self) -> None:
        """At once, before anybody is answered: whoever waits is answered by another replica."""
        await self._llm.died.wait()
        print(f"error: {self._llm.death}", file=sys.stderr, flush=True)
        os._exit(EXIT_ENGINE_DIED)


def _is_first_start() -> bool:
    """Whether somebody is still waiting for the first engines, who will ask for mistakes."""
    app = serve.get_replica_context().app_name
    return serve.status().applications[app].status == ApplicationStatus.DEPLOYING
