"""`python -m STAGE serve`: an OpenAI-compatible server over the stage's engine."""

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..entrypoints.llm import LLM
from ..entrypoints.server.replica_settings import ReplicaSettings
from ..entrypoints.server.settings import ServerSettings
from .options import add_field_flags, given_fields

API_KEY_VARIABLE = "FOLOVLLM_API_KEY"


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field of ServerSettings and of ReplicaSettings."""
    add_field_flags(parser.add_argument_group("server"), ServerSettings)
    add_field_flags(parser.add_argument_group("replicas"), ReplicaSettings)


def run_serve(
    llm_class: type[LLM], arguments: argparse.Namespace, llm_options: Mapping[str, Any]
) -> int:
    """Serve until a signal; llm_options: of the LLM but for `model`. Returns the exit status.

    ValueError that names the packages if the extra `serve`, or `ray`, is not installed.
    """
    given = given_fields(arguments, ServerSettings)
    key = os.environ.get(API_KEY_VARIABLE)
    if key and "api_key" not in given:
        given["api_key"] = key
    settings = ServerSettings(**given)
    replica_settings = ReplicaSettings(**given_fields(arguments, ReplicaSettings))
    options = (llm_class, arguments.model, dict(llm_options), settings)
    if replica_settings.replicas == 1:
        with _naming_extra("serve"):
            from ..entrypoints.server.run import run_server
        return run_server(*options)
    with _naming_extra("serve,ray"):
        from ..entrypoints.server.replicas.run import run_replicas
    return run_replicas(*options, replica_settings)


@contextmanager
def _naming_extra(extra: str) -> Iterator[None]:
    """Of imports: a package that is missing becomes a ValueError with what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("folovllm"):
            raise
        raise ValueError(
            f"serve needs the package {error.name!r}, which is not installed; install the extra: "
            f"pip install 'folovllm[{extra}]', or run `make` with the verb -serve, which does that"
        ) from error
