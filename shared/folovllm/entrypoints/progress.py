"""The progress bar of `LLM.generate`."""

import time
from collections.abc import Iterable
from types import TracebackType

from tqdm import tqdm

from .output_state import PromptState


class ThroughputBar:
    """Finished prompts of one call, with input and output tokens per second since the start.

    A prompt's tokens are counted when it is finished, as in vLLM.
    """

    def __init__(self, num_prompts: int, is_shown: bool) -> None:
        # tqdm has a lock and a thread for all of its bars, also for those that it does not show.
        self._bar = (
            tqdm(total=num_prompts, desc="Processed prompts", unit="prompt") if is_shown else None
        )
        self._start = time.perf_counter()
        self._num_input_tokens = 0
        self._num_output_tokens = 0

    def __enter__(self) -> "ThroughputBar":
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, finished: Iterable[PromptState]) -> None:
        """Count these prompts as done."""
        if self._bar is None:
            return
        num_finished = 0
        for prompt in finished:
            num_finished += 1
            self._num_input_tokens += prompt.num_prompt_tokens
            self._num_output_tokens += prompt.num_output_tokens
        if num_finished:
            elapsed = time.perf_counter() - self._start
            self._bar.set_postfix_str(
                f"input {self._num_input_tokens / elapsed:.1f} tok/s, "
                f"output {self._num_output_tokens / elapsed:.1f} tok/s",
                refresh=False,
            )
            self._bar.update(num_finished)
