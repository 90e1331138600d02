"""Ctrl-C at a line of our choice, for tests of what an interrupted call leaves behind."""

import sys
from collections.abc import Collection
from types import FrameType, TracebackType
from typing import Any


class LineInterrupt:
    """A context in which the n-th line executed in some files ends with a KeyboardInterrupt.

    It may be entered several times, and goes on counting. It fires once.
    """

    def __init__(self, files: Collection[str], line_number: int) -> None:
        """files: paths as in `__file__`; line_number: 1 is the first line executed in them."""
        self.has_fired = False
        self._files = frozenset(files)
        self.num_lines = 0
        self._line_number = line_number
        self._previous: Any = None

    def __enter__(self) -> None:
        self._previous = sys.gettrace()
        if not self.has_fired:
            sys.settrace(self._trace)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        sys.settrace(self._previous)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        if event == "line":
            self.num_lines += 1
            if self.num_lines == self._line_number:
                self.has_fired = True
                raise KeyboardInterrupt(f"{frame.f_code.co_name}, line {frame.f_lineno}")
        return self._trace
