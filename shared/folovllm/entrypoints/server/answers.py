"""From the outputs of an engine to OpenAI's objects: what completions and chat have in common."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import msgspec

from ..async_stream import AsyncOutputStream
from ..outputs import CompletionOutput, Logprob, RequestOutput
from .errors import ApiError
from .event_stream import DONE
from .protocol import StreamOptions

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

    def opening(self, index: int, prompt: RequestOutput) -> Any | None:
        """The choice of a first chunk, which comes with the first token; None where none does."""

    def delta(self, index: int, completion: CompletionOutput) -> Any:
        """The choice of a chunk."""


class Answer:
    """One call's answer, in one piece or in chunks."""

    def __init__(self, shape: Shape, model: str, streams: Sequence[AsyncOutputStream], n: int):
        self._shape = shape
        self._streams = streams
        self._n = n
        self._head = {
            "id": f"{shape.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._usage = Usage(len(streams))

    def close(self) -> None:
        for stream in self._streams:
            stream.close()

    async def whole(self) -> bytes:
        """The answer of streams of final outputs."""
        outputs = await asyncio.gather(*map(_last, self._streams))
        choices = []
        for number, output in enumerate(outputs):
            for completion in output.outputs:
                choice = self._shape.choice(number * self._n + completion.index, output, completion)
                choices.append(choice)
            self._usage.count(number, output)
        body = {**self._head, "object": self._shape.whole, "choices": choices}
        return msgspec.json.encode({**body, "usage": self._usage.to_dict()})

    async def chunks(self, options: StreamOptions | None) -> AsyncIterator[bytes]:
        """Events of streams of deltas; an engine that dies on the way is the last of them."""
        head = {**self._head, "object": self._shape.part}
        is_counted = options is not None and bool(options.continuous_usage_stats)
        opened: set[int] = set()
        if options is not None and options.include_usage:
            head["usage"] = None
        try:
            async for number, output in _merge(self._streams):
                self._usage.count(number, output)
                for choice in self._choices(number, output, opened):
                    usage = {"usage": self._usage.to_dict()} if is_counted else {}
                    yield _event({**head, "choices": [choice], **usage})
        except RuntimeError as error:
            yield b"data: " + ApiError(500, str(error), kind="server_error").body() + b"\n\n"
        else:
            if options is not None and options.include_usage:
                yield _event({**head, "choices": [], "usage": self._usage.to_dict()})
        yield DONE

    def _choices(self, number: int, output: RequestOutput, opened: set[int]) -> list[Any]:
        choices = []
        for completion in output.outputs:
            index = number * self._n + completion.index
            if index not in opened:
                opened.add(index)
                choices.append(self._shape.opening(index, output))
            choices.append(self._shape.delta(index, completion))
        return [choice for choice in choices if choice is not None]


class Usage:
    """Tokens of a call so far; a prompt counts once, however many completions it has."""

    def __init__(self, num_prompts: int) -> None:
        self._prompts: list[RequestOutput | None] = [None] * num_prompts
        self._num_completion_tokens = 0

    def count(self, number: int, output: RequestOutput) -> None:
        self._prompts[number] = output
        self._num_completion_tokens += sum(len(c.token_ids) for c in output.outputs)

    def to_dict(self) -> dict[str, Any]:
        seen = [output for output in self._prompts if output is not None]
        num_prompt_tokens = sum(len(output.prompt_token_ids) for output in seen)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": num_prompt_tokens + self._num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(o.num_cached_tokens for o in seen)},
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


async def _merge(streams: Sequence[AsyncOutputStream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Outputs of all streams as they come, with the stream's number; one of each at a time."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    reading: dict[asyncio.Future[RequestOutput | None], int]
    reading = {asyncio.ensure_future(_next(stream)): n for n, stream in enumerate(streams)}
    try:
        while reading:
            done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number, news = reading.pop(task), task.result()
                if news is not None:
                    reading[asyncio.ensure_future(_next(streams[number]))] = number
                    yield number, news
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


async def _next(stream: AsyncOutputStream) -> RequestOutput | None:
    return await anext(stream, None)


def _event(content: Any) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
