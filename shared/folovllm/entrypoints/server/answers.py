"""From the outputs of an engine to OpenAI's objects: what completions and chat have in common."""

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from ..async_stream import AsyncOutputStream
from ..output_processor import PromptState
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
        self._head = {
            "id": f"{shape.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._usage = Usage()

    def close(self) -> None:
        for stream in self._streams:
            stream.close()

    async def whole(self) -> bytes:
        """The answer of streams of final outputs."""
        outputs = await asyncio.gather(*map(_last, self._streams))
        choices = []
        for number, output in enumerate(outputs):
            visible = [self._shape.visible(completion) for completion in output.outputs]
            self._usage.count(self._streams[number].prompt, visible)
            for completion in visible:
                choice = self._shape.choice(number * self._n + completion.index, output, completion)
                choices.append(choice)
        body = {**self._head, "object": self._shape.whole, "choices": choices}
        return msgspec.json.encode({**body, "usage": self._usage.to_dict()})

    def stream(self, options: StreamOptions | None) -> "ChunkedAnswer":
        """The answer of streams of deltas, in events."""
        head = {**self._head, "object": self._shape.part}
        return ChunkedAnswer(self._shape, self._streams, self._n, head, options)


class ChunkedAnswer:
    """An answer in chunks, as events; an engine that dies on the way is the last one's error."""

    def __init__(
        self,
        shape: Shape,
        streams: Sequence[AsyncOutputStream],
        n: int,
        head: dict[str, Any],
        options: StreamOptions | None,
    ) -> None:
        """head: what all chunks have in common."""
        self._shape = shape
        self._streams = streams
        self._n = n
        self._usage = Usage()
        self._format = _ChunkFormat(head, options, self._usage)
        self._opened: set[int] = set()
        self.is_finished = False

    def ring_with(self, ring: Callable[[], None]) -> None:
        for stream in self._streams:
            stream.ring_with(ring)

    def take_events(self) -> bytes:
        """Of all that is new, prompt by prompt; b"" if nothing is."""
        events: list[bytes] = []
        is_finished = True
        try:
            for number, stream in enumerate(self._streams):
                deltas = [self._shape.visible(delta) for delta in stream.take_deltas()]
                if deltas:
                    self._usage.count(stream.prompt, deltas)
                    for completion in deltas:
                        self._write(events, number, completion)
                is_finished = is_finished and stream.is_closed
        except RuntimeError as error:
            events.append(_event(ApiError(500, str(error), kind="server_error").body()))
            is_finished = True
        else:
            if is_finished:
                events.append(self._format.last())
        if is_finished:
            self.is_finished = True
            events.append(DONE)
        return b"".join(events)

    def _write(self, events: list[bytes], number: int, completion: CompletionOutput) -> None:
        """The chunks of a completion of prompt `number`."""
        index = number * self._n + completion.index
        if index not in self._opened:
            self._opened.add(index)
            opening = self._shape.opening(index, self._streams[number].prompt)
            if opening is not None:
                events.append(self._format.chunk(opening))
        events.append(self._format.chunk(self._shape.delta(index, completion)))


class Usage:
    """Tokens of a call so far; a prompt counts once, however many completions it has."""

    def __init__(self) -> None:
        self._prompts: dict[str, PromptState] = {}
        self._num_completion_tokens = 0

    def count(self, prompt: PromptState, outputs: Sequence[CompletionOutput]) -> None:
        self._prompts[prompt.request_id] = prompt
        for completion in outputs:
            self._num_completion_tokens += len(completion.token_ids)

    def to_dict(self) -> dict[str, Any]:
        seen = self._prompts.values()
        num_prompt_tokens = sum(prompt.num_prompt_tokens for prompt in seen)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": num_prompt_tokens + self._num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(p.num_cached_tokens for p in seen)},
        }


class _ChunkFormat:
    """Writes chunks of one answer, of which all but the choice is the same in every one."""

    def __init__(self, head: dict[str, Any], options: StreamOptions | None, usage: Usage) -> None:
        self._before = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._usage = usage
        self._has_last = options is not None and bool(options.include_usage)
        self._is_counted = options is not None and bool(options.continuous_usage_stats)
        self._behind = (b'],"usage":null}' if self._has_last else b"]}") + b"\n\n"
        self._encode = msgspec.json.Encoder().encode

    def chunk(self, choice: Any) -> bytes:
        if self._is_counted:
            return self._with_usage(self._encode(choice))
        return self._before + self._encode(choice) + self._behind

    def last(self) -> bytes:
        """The chunk of the usage, where it was asked for."""
        return self._with_usage(b"") if self._has_last else b""

    def _with_usage(self, choice: bytes) -> bytes:
        usage = self._encode(self._usage.to_dict())
        return b'%b%b],"usage":%b}\n\n' % (self._before, choice, usage)


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


def _event(content: bytes) -> bytes:
    return b"data: " + content + b"\n\n"
