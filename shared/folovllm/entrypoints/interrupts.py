"""Ctrl-C between steps and not within them."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any]


class HeldInterrupt:
    """A signal handler that keeps the first signal until it is let through."""

    def __init__(self) -> None:
        self.handler: _Handler | None = None
        """Whom the signals are for; None where there are none to keep."""
        self._signal: tuple[int, FrameType | None] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            self.let_through()
        self._signal = (number, frame)

    def let_through(self) -> None:
        """Let the signal that came, if one did, take effect: mostly, raise KeyboardInterrupt."""
        held, self._signal = self._signal, None
        if held is not None and self.handler is not None:
            self.handler(*held)


@contextmanager
def interrupt_held_back() -> Iterator[HeldInterrupt]:
    """Let a Ctrl-C take effect after the block, or where the block lets it; a second one at once.

    A KeyboardInterrupt may be raised between any two instructions of the main thread. In the
    middle of a step it would leave the books of an engine half written, for all who share it.
    Other threads get none, and exceptions raised within the block pass as ever.
    """
    held = HeldInterrupt()
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield held
        return
    held.handler = handler
    signal.signal(signal.SIGINT, held)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, handler)
        held.let_through()
