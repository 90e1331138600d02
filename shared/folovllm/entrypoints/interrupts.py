"""Ctrl-C between steps and not within them."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def interrupt_held_back() -> Iterator[None]:
    """Let a Ctrl-C take effect after the block; a second one takes effect at once.

    A KeyboardInterrupt may be raised between any two instructions of the main thread. In the
    middle of a step it would leave the books of an engine half written, for all who share it.
    Other threads get none, and exceptions raised within the block pass as ever.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held = _HeldInterrupt(handler)
    signal.signal(signal.SIGINT, held)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        held.release()


class _HeldInterrupt:
    """A signal handler that keeps the first signal to itself."""

    def __init__(self, handler: _Handler) -> None:
        self._handler = handler
        self._signal: tuple[int, FrameType | None] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            self._handler(number, frame)
        self._signal = (number, frame)

    def release(self) -> None:
        if self._signal is not None:
            self._handler(*self._signal)
