"""The life of a server of several replicas: a Ray cluster, N engines in it, one address."""

import asyncio
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.experimental.round_robin_router import RoundRobinRouter
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from ...llm import LLM
from ..replica_settings import ReplicaSettings
from ..run import listen, run_in_loop, serve_until_told, served_name
from ..settings import ServerSettings
from .forwarding import Forwarder, make_session
from .front import Front
from .replica import EngineReplica
from .router import PrefixRouter

_DEFAULT_MAX_LOAD_GAP = 2
_LOOPBACK = "127.0.0.1"
_HEALTH_CHECK_S = 1.0
"""How long it may take until a replica that is gone begins to be replaced."""
_OBJECT_STORE_BYTES = 80 << 20
"""About the least that Ray takes; nothing of ours goes through it."""
_REACH_S = 5.0
_LEAST_SHARE = 1 / 64
"""Of a core; Ray counts ten-thousandths, and three rounded thirds are more than one."""
_NO_LIMIT = 1 << 20
"""Calls of a replica: its own server knows how many it can take, and refuses the rest."""


def run_replicas(
    llm_class: type[LLM],
    model: str | None,
    llm_options: dict[str, Any],
    settings: ServerSettings,
    replica_settings: ReplicaSettings,
) -> int:
    """Serve until SIGTERM or Ctrl-C, as `run_server` does, with several engines; the exit status.

    ValueError if an engine cannot be started, or if the cluster has too few GPUs for all of them.
    """
    if settings.page in ("control", "watch"):
        raise ValueError("the page shows one engine; leave --page out, or serve without replicas")
    listener = listen(settings)
    with (
        _cluster(replica_settings.ray_address),
        _engines(llm_class, model, llm_options, settings, replica_settings) as handle,
    ):
        max_waiting = settings.max_queue_len * replica_settings.replicas
        name = served_name(model, settings)
        run_in_loop(_serve(handle, name, settings, listener, max_waiting))
    return 0


async def _serve(
    handle: DeploymentHandle,
    name: str,
    settings: ServerSettings,
    listener: socket.socket,
    max_waiting: int,
) -> None:
    async with make_session() as session:
        front = Front(handle, Forwarder(handle, session, max_waiting), settings)
        never = asyncio.Event()  # engines that die are replaced
        await serve_until_told(front.app(), front, name, settings, listener, never)


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Be part of a cluster; of one on this machine that ends behind the block, where none is named.

    OSError if there is nothing at the address.
    """
    if address not in (None, "auto"):
        _check_reachable(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray asks for it nowhere else
    own: dict[str, Any] = {
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    ray.init(address or "local", logging_level=logging.WARNING, **({} if address else own))
    # What becomes of replicas the controller says; here are only traces of calls that they had.
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
    except OSError as error:
        raise OSError(f"nothing answers at ray_address {address}: {error}") from error


@contextmanager
def _engines(
    llm_class: type[LLM],
    model: str | None,
    llm_options: dict[str, Any],
    settings: ServerSettings,
    replica_settings: ReplicaSettings,
) -> Iterator[DeploymentHandle]:
    """The replicas, ready; they end behind the block. ValueError as from `run_replicas`."""
    num = replica_settings.replicas
    is_own = replica_settings.ray_address is None
    deployment = serve.deployment(
        EngineReplica,
        name="engine",
        num_replicas=num,
        ray_actor_options=resources(num, llm_options["device"], ray.cluster_resources()),
        max_ongoing_requests=_NO_LIMIT,
        health_check_period_s=_HEALTH_CHECK_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=1.0,
        max_constructor_retry_count=1,
        request_router_config=_router_config(replica_settings),
    ).bind(
        llm_class,
        model,
        llm_options,
        settings,
        served_name(model, settings),
        _LOOPBACK if is_own else None,
    )
    app = f"folovllm-{uuid4().hex[:8]}"  # in a cluster of others there may be one already
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    serve.start(proxy_location="Disabled", logging_config=quiet)
    try:
        handle = serve.run(deployment, name=app, route_prefix=None, logging_config=quiet)
        mistakes = handle.broadcast("mistake").results()
        if any(mistakes):
            raise ValueError(next(filter(None, mistakes)))
        yield handle
    finally:
        serve.delete(app)


def _router_config(settings: ReplicaSettings) -> RequestRouterConfig:
    if settings.routing == "round-robin":
        return RequestRouterConfig(request_router_class=RoundRobinRouter)
    gap = settings.max_load_gap
    gap = _DEFAULT_MAX_LOAD_GAP if gap is None else gap
    return RequestRouterConfig(
        request_router_class=PrefixRouter, request_router_kwargs={"max_load_gap": gap}
    )


def resources(num_replicas: int, device: str, cluster: dict[str, float]) -> dict[str, float]:
    """What Ray sets aside for each replica: a GPU if there are any, else its share of the cores."""
    num_gpus = int(cluster.get("GPU", 0))
    if ":" in device:
        raise ValueError(
            f"device {device} is one for all replicas; leave out the number, so that Ray gives "
            f"each its own"
        )
    if device == "cuda" or (device == "auto" and num_gpus):
        if num_gpus < num_replicas:
            raise ValueError(
                f"{num_replicas} replicas need as many GPUs, and this cluster has {num_gpus}; "
                f"take fewer replicas, or device cpu"
            )
        return {"num_gpus": 1, "num_cpus": 1}
    share = cluster.get("CPU", 1.0) / num_replicas
    unit = 1.0 if share >= 1 else _LEAST_SHARE
    return {"num_cpus": int(share / unit) * unit}
