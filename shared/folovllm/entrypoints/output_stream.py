"""What `LLM.stream` returns."""

from collections.abc import Iterator

from .output_state import PromptState
from .outputs import RequestOutput
from .shared_engine import SharedEngine


class OutputStream(Iterator[RequestOutput]):
    """The growing output of one prompt whose request is in the engine already.

    It yields all of the output so far whenever there is more of it, and ends with the finished
    one. Closing it, or losing the last reference to it, takes the request back, also if nothing
    was read from it; so does an exception while it is read.
    """

    def __init__(self, engine: SharedEngine, prompt: PromptState) -> None:
        self._engine = engine
        self._prompt = prompt
        self._num_seen = 0
        self._is_closed = False

    def __next__(self) -> RequestOutput:
        if self._is_closed:
            raise StopIteration
        try:
            output = self._engine.next_output(self._prompt, self._num_seen)
        except BaseException:
            self.close()
            raise
        self._is_closed = output.finished
        self._num_seen = sum(len(completion.token_ids) for completion in output.outputs)
        return output

    def close(self) -> None:
        """Take the request back, if it has not finished; nothing comes after that."""
        if not self._is_closed:
            self._is_closed = True
            self._engine.abort([self._prompt])

    def __del__(self) -> None:
        if not self._is_closed:
            self._engine.drop(self._prompt)
