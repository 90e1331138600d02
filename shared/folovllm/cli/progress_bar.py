"""A bar for commands that do one thing after another."""

from types import TracebackType
from typing import Self

from tqdm import tqdm


class ProgressBar:
    """On stderr, from when it is made until it is left."""

    def __init__(self, num_items: int, description: str, unit: str) -> None:
        self._bar = tqdm(total=num_items, desc=description, unit=unit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()

    def show(self, num_done: int, text: str) -> None:
        """So many items are done, whoever did them; text: about the last one."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(num_done - self._bar.n)
