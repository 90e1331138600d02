"""The other process's end of an engine core: starts it, talks with it, notices when it dies."""

import asyncio
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import zmq

from .core_messages import CoreFacts, CoreOptions, FromCore, Ping, Pong, ShutDown, ToCore
from .core_watchdog import CoreWatchdog
from .engine_core import run_engine_core
from .llm import LLM

_LAST_WORDS_S = 0.2
"""How long a message of a process that has ended may be on its way."""
_GOODBYE_S = 10.0
"""How long a process may take to end when it was told to."""


class CoreClient:
    """Runs an engine in a process of its own, from within an event loop.

    Messages are handed to `on_message` as they come, so that they never pile up on the way. When
    the process ends without having been told to, `on_death` is called once, behind the last one;
    so it is when the engine hangs, and the process is ended then.
    """

    def __init__(
        self,
        on_message: Callable[[FromCore], None],
        on_death: Callable[[str], None],
        step_timeout_s: float | None,
    ) -> None:
        """on_death: gets what is known of the reason.

        step_timeout_s: a ready engine that is longer in one step hangs; None: it may take for ever.
        """
        self._on_message = on_message
        self._on_death = on_death
        self._step_timeout_s = step_timeout_s
        self._watchdog = CoreWatchdog(
            lambda: self.send(Ping()),
            self._receive,
            self._end_hanging,
            step_timeout_s or 0.0,
        )
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromCore)
        self._context = zmq.Context()
        self._push, self._pull = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        self._directory = Path(tempfile.mkdtemp(prefix="folovllm-"))  # nobody else may enter it
        self._process: Any = None

    def start(
        self, llm_class: type[LLM], model: str | Path | None, options: dict[str, Any]
    ) -> None:
        """Start the process, in the running event loop; its first message says what came of it."""
        addresses = [f"ipc://{self._directory / name}" for name in ("to_core", "from_core")]
        for socket, address in zip((self._push, self._pull), addresses, strict=True):
            socket.set_hwm(0)  # a full queue is refused above; a step is taken as it comes
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(address)
        core_options = CoreOptions(
            model=None if model is None else str(model),
            options={name: _plain(value) for name, value in options.items()},
        )
        self._process = multiprocessing.get_context("spawn").Process(
            target=run_engine_core,
            args=(llm_class, self._encoder.encode(core_options), *addresses),
            name="engine-core",
            daemon=True,
        )
        self._process.start()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pull.fileno(), self._receive)
        loop.add_reader(self._process.sentinel, self._notice_end)

    @property
    def process_id(self) -> int:
        return int(self._process.pid)

    def send(self, message: ToCore) -> None:
        """Never waits; to a process that is gone nothing is sent, and `on_death` says so soon."""
        with suppress(zmq.Again):
            self._push.send(self._encoder.encode(message), zmq.NOBLOCK)

    async def stop(self, patience_s: float = _GOODBYE_S) -> None:
        """End the process, by force if it does not listen for so long."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._process.sentinel)
        self._watchdog.stop()
        self.send(ShutDown())
        await asyncio.to_thread(self._process.join, patience_s)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join)
        self._close(loop)

    def _receive(self) -> None:
        """Take all messages that are here: the descriptor says only once that there are some."""
        while True:
            try:
                data = self._pull.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(self._decoder.decode(data))

    def _take(self, message: FromCore) -> None:
        self._watchdog.note_message()
        if isinstance(message, CoreFacts) and self._step_timeout_s is not None:
            self._watchdog.start()  # to load may take as long as it likes
        if not isinstance(message, Pong):
            self._on_message(message)

    def _end_hanging(self) -> None:
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._process.kill()
        self._on_death(
            f"the engine hangs: it has been in one step for more than {self._step_timeout_s} s "
            f"(if its steps may take longer, set a longer step_timeout_s)"
        )

    def _notice_end(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._process.sentinel)
        self._watchdog.stop()
        loop.call_later(_LAST_WORDS_S, self._declare_dead)

    def _declare_dead(self) -> None:
        self._receive()
        self._process.join()
        code = self._process.exitcode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        self._on_death(f"the engine's process {how}")

    def _close(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(self._pull.fileno())
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)


def _plain(value: Any) -> Any:
    """An option in a form that MessagePack has; the stage makes an Enum of its text again."""
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value
