"""The processes that hold the other parts of a model, and take every step that this one takes.

Each runs the whole stage: its scheduler gets the same requests in the same order and decides the
same, because nothing that a stage decides depends on time or chance. So a step needs one word, and
what travels in it are activations alone.
"""

import gc
import io
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..interfaces import Engine, StepOutput
from ..model.collectives import ProcessGroup
from ..model.ranks import Ranks
from ..request import Request
from ..text.grammars import Grammar
from .request_builder import grammar_compiler

_JOIN_TIMEOUT = timedelta(minutes=10)
"""Until every rank has loaded its part; a step that takes longer counts as stuck."""
_END_TIMEOUT_S = 5.0
_GRAMMAR = "grammar"
_FOLLOW = "from folovllm.entrypoints.followers import follow; follow()"


class Place(NamedTuple):
    """Where a process finds the others."""

    ranks: Ranks
    rendezvous: str
    """A file that all of them can reach."""

    def join(self, device: torch.device) -> ProcessGroup:
        """Wait for the others."""
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{self.rendezvous}",
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            timeout=_JOIN_TIMEOUT,
        )
        return ProcessGroup(device)


class Followers:
    """Processes of ranks 1, 2, …; `llm_class(**options, place=…)` is what they run.

    They end when this object is closed or gone, when this process is, or when one of them does.
    Plain subprocesses, because a server's engine is a daemon, whose `multiprocessing` makes none.
    """

    def __init__(self, llm_class: type, size: int, options: Mapping[str, Any]) -> None:
        _require_no_other_model()
        self._folder = tempfile.TemporaryDirectory(prefix="folovllm-ranks-")
        rendezvous = str(Path(self._folder.name, "rendezvous"))
        self.place = Place(Ranks(0, size), rendezvous)
        self.connections: list[Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(1, size):
            ours, theirs = Pipe()
            with theirs:
                file = theirs.fileno()
                process = subprocess.Popen(
                    [sys.executable, "-c", _FOLLOW, str(file)],
                    pass_fds=[file],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )
            ours.send((llm_class, dict(options), Place(Ranks(rank, size), rendezvous)))
            self.connections.append(ours)
            self.processes.append(process)
        self.close = weakref.finalize(self, _end, self.connections, self.processes, self._folder)

    def send(self, message: bytes) -> None:
        """To every rank, in order. RuntimeError if one of them is no longer there."""
        try:
            for connection in self.connections:
                connection.send_bytes(message)
        except OSError as error:
            raise self.failure() or RuntimeError(
                "the other processes of this model were ended; make a new LLM"
            ) from error

    def failure(self) -> RuntimeError | None:
        """What became of the others, in words; None if they are all still there after a while.

        None of them can go on alone: they are ended.
        """
        deadline = time.monotonic() + _END_TIMEOUT_S
        while not (ended := self._ended()) and time.monotonic() < deadline:
            time.sleep(0.01)
        self.close()
        if not ended:
            return None
        return RuntimeError(
            f"{ended} ended, and the others cannot go on without it; its last words are on stderr; "
            f"make a new LLM"
        )

    def _ended(self) -> str:
        return ", ".join(
            f"rank {rank} of {self.place.ranks.size} (exit status {process.returncode})"
            for rank, process in enumerate(self.processes, 1)
            if process.poll() is not None
        )


class _SentRequests:
    """Requests that the followers have, by numbers.

    A request is sent once; where a later one names it, as a fork names its parent, a number goes in
    its place, and stands for the follower's own. Its grammar stays here: the follower compiles one
    from the same parameters.
    """

    def __init__(self) -> None:
        self._numbers: weakref.WeakKeyDictionary[Request, int] = weakref.WeakKeyDictionary()
        self._num_sent = 0
        self._gone: deque[int] = deque()

    def message(self, call: str, *arguments: object) -> bytes:
        """ValueError for what cannot be sent."""
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer)
        pickler.persistent_id = self._stand_in_for  # type: ignore[method-assign]
        gone = [self._gone.popleft() for _ in range(len(self._gone))]
        try:
            pickler.dump((gone, call, arguments))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{call} has something that cannot be sent to the other processes of this model "
                f"({error}); give tensor_parallel_size=1"
            ) from error
        return buffer.getvalue()

    def add(self, request: Request) -> None:
        """It was sent, as the next one."""
        self._numbers[request] = self._num_sent
        weakref.finalize(request, self._gone.append, self._num_sent).atexit = False
        self._num_sent += 1

    def _stand_in_for(self, item: object) -> int | str | None:
        if isinstance(item, Grammar):
            return _GRAMMAR
        return self._numbers.get(item) if isinstance(item, Request) else None


class LeadingEngine:
    """The engine of rank 0: whatever it is told, the others are told first.

    Also gives whatever else the stage's engine has, to those that look inside.
    """

    def __init__(self, engine: Engine, followers: Followers) -> None:
        self._engine, self.followers = engine, followers
        self._requests = _SentRequests()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def add_request(self, request: Request) -> None:
        message = self._requests.message("add_request", request)  # before the engine changes it
        self._engine.add_request(request)
        self._requests.add(request)
        self.followers.send(message)

    def abort_request(self, request_id: str) -> None:
        self._tell("abort_request", request_id)
        self._engine.abort_request(request_id)

    def step(self) -> StepOutput:
        self._tell("step")
        with led(self.followers):
            return self._engine.step()

    def _tell(self, call: str, *arguments: object) -> None:
        self.followers.send(self._requests.message(call, *arguments))


class PrefixForgettingEngine(LeadingEngine):
    """Of a stage that keeps prefixes."""

    def reset_prefix_cache(self) -> None:
        self._tell("reset_prefix_cache")
        self._engine.reset_prefix_cache()  # type: ignore[attr-defined]


@contextmanager
def led(followers: Followers | None) -> Iterator[None]:
    """Around what all ranks do at once: an error says which of them ended, if one did."""
    try:
        yield
    except RuntimeError as error:  # torch's, when the connection to a rank breaks
        if followers is None:
            raise
        raise followers.failure() or error from error


def lead(engine: Engine, followers: Followers) -> LeadingEngine:
    """The engine of rank 0, with the calls that the stage's engine has."""
    has_prefixes = hasattr(engine, "reset_prefix_cache")
    return (PrefixForgettingEngine if has_prefixes else LeadingEngine)(engine, followers)


class _Unpickler(pickle.Unpickler):
    """Of messages of `_SentRequests`."""

    def __init__(self, message: bytes, requests: Mapping[int, Request]) -> None:
        super().__init__(io.BytesIO(message))
        self._requests = requests

    def persistent_load(self, stand_in: int | str) -> Request | None:
        return None if stand_in == _GRAMMAR else self._requests[int(stand_in)]


def follow() -> None:
    """Rank 1 and above: do what rank 0 is told, until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what an interrupt ends
    connection = Connection(int(sys.argv[1]))
    llm_class, options, place = connection.recv()
    llm = llm_class(**options, place=place)
    llm.use_device()
    grammars = grammar_compiler(llm.tokenizer, llm.request_settings)
    requests: dict[int, Request] = {}
    num_received = 0
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)  # without waiting for collectives that nobody joins any more
        gone, call, arguments = _Unpickler(message, requests).load()
        for number in gone:
            del requests[number]
        if call == "add_request":
            request = requests[num_received] = arguments[0]
            structure = request.sampling_params.structured_outputs
            if structure is not None:
                request.grammar = grammars.compile(structure)
            num_received += 1
        getattr(llm.engine, call)(*arguments)


def _require_no_other_model() -> None:
    if dist.is_initialized():
        gc.collect()  # an LLM that is gone, but not collected yet, leaves its group then
    if dist.is_initialized():
        raise RuntimeError(
            "this process holds a part of another model already, and can hold one at a time; call "
            "`close()` of the other LLM first"
        )


def _end(
    connections: list[Connection],
    processes: list[subprocess.Popen[bytes]],
    folder: "tempfile.TemporaryDirectory[str]",
) -> None:
    for connection in connections:
        connection.close()
    for process in processes:
        process.kill()  # there is nothing that it could lose
    for process in processes:
        process.wait()
    if dist.is_initialized():
        dist.destroy_process_group()
    folder.cleanup()
