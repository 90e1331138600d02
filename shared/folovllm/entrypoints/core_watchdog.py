"""Notices that an engine hangs: its process lives, and its step does not end."""

import asyncio
from collections.abc import Callable


class CoreWatchdog:
    """Asks an engine core for a sign of life, again and again, and says so if none comes.

    A core answers between two steps, and also when it has nothing to do or is paused. So neither a
    quiet engine nor one that computes for long beside others is taken for one that hangs.
    """

    def __init__(
        self,
        ask: Callable[[], None],
        receive: Callable[[], None],
        on_silence: Callable[[], None],
        timeout_s: float,
    ) -> None:
        """ask: the core, for a message of any kind. receive: take what has come from it.

        on_silence: called once, between one and two times `timeout_s` after the last message.
        """
        self._ask = ask
        self._receive = receive
        self._on_silence = on_silence
        self._timeout_s = timeout_s
        self._has_heard = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """In the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._watch())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def note_message(self) -> None:
        """Something has come from the core."""
        self._has_heard = True

    async def _watch(self) -> None:
        while True:
            self._has_heard = False
            self._ask()
            await asyncio.sleep(self._timeout_s)
            self._receive()  # it may be this loop that has not listened for so long
            if not self._has_heard:
                self._on_silence()
                return
