"""Stands in for CUDA graphs where there is no GPU: a replay runs the recorded function again.

It shares with a graph what makes graphs hard: what the function read from Python when it was
recorded stays as it was, and only what it reads from tensors can change. Padding that is written,
buffers that keep what the step before left and rows of other requests then show in the tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class FakeGraph:
    """One recorded function."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.num_replays = 0
        self._run = run

    def replay(self) -> None:
        self.num_replays += 1
        self._run()


class FakeGraphRecorder:
    """The interface of a stage's GraphRecorder."""

    num_bytes = 0

    @contextmanager
    def session(self) -> Iterator[None]:
        yield

    def record(self, run: Callable[[], object]) -> FakeGraph:
        """Runs twice, as recording does."""
        run()
        run()
        return FakeGraph(run)
