"""From the outputs of an engine to OpenAI's objects: what completions and chat have in common."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from ..async_stream import AsyncOutputStream
from ..output_state import PromptState
from ..outputs import CompletionOutput, Logprob, RequestOutput

_LEAST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON does not have; vLLM's value."""


class Shape(Protocol):
    """How one of the two calls writes its answers."""

    prefix: str
    """Of ids."""
    whole: str
    """The "object" of an answer."""
    part: str
    """The "object" of a chunk."""

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> Any:
        """A finished completion."""

    shows_output: bool
    """False where the prompt is all that the client wants to see."""
    has_plain_deltas: bool
    """Whether a delta of an unfinished completion says its text and nothing else."""

    def visible(self, completion: CompletionOutput) -> CompletionOutput:
        """What the client gets to see of it."""

    def opening(self, index: int, prompt: PromptState) -> Any | None:
        """The choice of a first chunk, which comes with the first token; None where none does."""

    def delta(self, index: int, completion: CompletionOutput) -> Any:
        """The choice of a chunk."""


class Answer:
    """One call's answer, in one piece or in chunks."""

    def __init__(self, shape: Shape, model: str, streams: Sequence[AsyncOutputStream], n: int):
        self._shape = shape
        self._streams = streams
        self._n = n
        self.head: dict[str, Any] = {
            "id": f"{shape.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def close(self) -> None:
        for stream in self._streams:
            stream.close()

    async def whole(self) -> bytes:
        """The answer of streams of final outputs."""
        outputs = await asyncio.gather(*map(_last, self._streams))
        choices = []
        for number, output in enumerate(outputs):
            for completion in map(self._shape.visible, output.outputs):
                choice = self._shape.choice(number * self._n + completion.index, output, completion)
                choices.append(choice)
        body = {**self.head, "object": self._shape.whole, "choices": choices}
        return msgspec.json.encode({**body, "usage": usage_of(self._shape, self._streams)})


def usage_of(shape: Shape, streams: Sequence[AsyncOutputStream]) -> dict[str, Any]:
    """Of what the client has got so far; a prompt counts once, however many completions it has."""
    seen = [stream.prompt for stream in streams if stream.prompt.num_taken_tokens]
    num_prompt_tokens = sum(prompt.num_prompt_tokens for prompt in seen)
    num_completion_tokens = sum(p.num_taken_tokens for p in seen) if shape.shows_output else 0
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(p.num_cached_tokens for p in seen)},
    }


def finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


def token_text(token_id: int, logprob: Logprob) -> str:
    """vLLM's word for a token where there is no text of it."""
    return f"token_id:{token_id}" if logprob.decoded_token is None else logprob.decoded_token


def prompt_logprobs(output: RequestOutput) -> list[dict[str, Any] | None] | None:
    """vLLM's form: per token of the prompt {token id: {logprob, rank, decoded_token}}."""
    if output.prompt_logprobs is None:
        return None
    return [
        None
        if position is None
        else {
            str(token_id): {**logprob._asdict(), "logprob": finite(logprob.logprob)}
            for token_id, logprob in position.items()
        }
        for position in output.prompt_logprobs
    ]


async def _last(stream: AsyncOutputStream) -> RequestOutput:
    return await anext(stream)
