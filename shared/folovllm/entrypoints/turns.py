"""Gives one thing to several threads in turns, in the order in which they asked."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LONGEST_SLEEP_S = 0.5


class _Ticket:
    """A thread's place in the queue."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self.thread_id = threading.get_ident()
        self.is_over = is_over
        """Whether what the thread waits for has happened without it."""
        self.wake = threading.Lock()
        """The thread sleeps until this lock is free."""
        self.wake.acquire()


class Turns:
    """A lock that nobody is kept out of: whoever has waited longest is next.

    With a plain lock, a thread that takes it for step after step would take it again before the
    others have woken up. A thread gives up its place whatever interrupts it, also while it waits;
    where even giving up was interrupted, the place goes when the thread asks for the next.
    """

    def __init__(self) -> None:
        self._mutex = threading.RLock()
        """Held for moments only. Reentrant, since a finaliser may run within one of them."""
        self._queue: deque[_Ticket] = deque()
        """The first one has the turn."""

    @contextmanager
    def turn(self, is_over: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Wait for the turn and keep it during the block.

        False if `is_over` came true in another thread's turn before ours came: then the block
        has no turn, and no need for one. `is_over` is asked at the end of every turn, so it must
        be cheap. Not reentrant.
        """
        ticket = _Ticket(is_over)
        try:
            with self._mutex:
                self._leave_old_place()
                self._queue.append(ticket)
            while not self._has_come(ticket):
                # In vain where an interrupt came between another thread's leaving and its notice.
                ticket.wake.acquire(timeout=_LONGEST_SLEEP_S)
            with self._mutex:
                has_turn = self._queue[0] is ticket
                if not has_turn:
                    self._queue.remove(ticket)
            yield has_turn
        finally:
            with self._mutex:
                self._leave(ticket)

    def try_turn(self, block: Callable[[], None]) -> bool:
        """Run `block`, a short one, in a turn if nobody has one; else False, at once."""
        with self._mutex:
            if self._queue:
                return False
            block()
        return True

    def _leave_old_place(self) -> None:
        """A thread has one place: an older one is what an interrupt has left behind."""
        for ticket in list(self._queue):
            if ticket.thread_id == threading.get_ident():
                self._leave(ticket)

    def _has_come(self, ticket: _Ticket) -> bool:
        """Whether it is the turn of this one, or what it is for is over."""
        with self._mutex:
            return self._queue[0] is ticket or ticket.is_over()

    def _leave(self, ticket: _Ticket) -> None:
        if ticket not in self._queue:
            return
        self._queue.remove(ticket)
        for place, waiting in enumerate(self._queue):
            if (place == 0 or waiting.is_over()) and waiting.wake.locked():
                waiting.wake.release()
