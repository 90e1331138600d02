"""What somebody is told who counts the work of an engine in another process."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from ..request import Request
from .core_messages import Step


class EngineObserver(Protocol):
    """Somebody who counts what an engine does; called between other work, so it must be quick."""

    def on_added(self, requests: Sequence[Request]) -> None:
        """The engine has accepted these."""

    def on_step(self, step: Step) -> None: ...

    def on_stopped(self, request_ids: Iterable[str]) -> None:
        """A stop string ended these, in the step before."""

    def on_aborted(self, request_ids: Iterable[str]) -> None:
        """The client took these back."""

    def on_idle(self) -> None:
        """Nothing is left to run."""
