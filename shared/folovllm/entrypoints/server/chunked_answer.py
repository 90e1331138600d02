"""An answer in chunks: what has come of its streams, as server-sent events."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from ..async_stream import AsyncOutputStream
from ..output_state import CompletionState
from ..outputs import CompletionOutput
from .answers import Shape, usage_of
from .errors import ApiError
from .event_stream import DONE
from .protocol import StreamOptions

_MARK = "(text of a chunk)"


class ChunkedAnswer:
    """The events of one call; an engine that dies on the way is the last one's error.

    This runs for every token. So a chunk that says no more than its text is written between two
    pieces of JSON that were made once, and the tokens are counted when somebody asks.
    """

    def __init__(
        self,
        shape: Shape,
        streams: Sequence[AsyncOutputStream],
        n: int,
        head: dict[str, Any],
        options: StreamOptions | None,
    ) -> None:
        """n: completions per stream, which are streams of deltas; head: what all chunks have."""
        self._shape = shape
        self._streams = streams
        self._n = n
        head = {**head, "object": shape.part}
        self._before = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._tells_usage = options is not None and bool(options.include_usage)
        self._counts_chunks = options is not None and bool(options.continuous_usage_stats)
        self._behind = (b'],"usage":null}' if self._tells_usage else b"]}") + b"\n\n"
        self._encode: Callable[[Any], bytes] = msgspec.json.Encoder().encode
        self._around: dict[int, list[bytes]] = {}
        """Index of a choice that has begun -> its plain chunks before and behind their text; as a
        single piece where it has none."""
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
                for completion in stream.with_news():
                    self._write(events, number, completion)
                is_finished = is_finished and stream.is_closed
        except RuntimeError as error:
            body = ApiError(500, str(error), kind="server_error").body()
            events.append(b"data: " + body + b"\n\n")
            is_finished = True
        else:
            if is_finished and self._tells_usage:
                events.append(self._with_usage(b""))
        if is_finished:
            self.is_finished = True
            events.append(DONE)
        return b"".join(events)

    def _write(self, events: list[bytes], number: int, completion: CompletionState) -> None:
        """The chunks of what is new of a completion of prompt `number`."""
        index = number * self._n + completion.index
        around = self._around.get(index)
        if around is not None and len(around) == 2 and completion.finish_reason is None:
            events += (around[0], self._encode(completion.take_text()), around[1])
            return
        delta = completion.take_delta()
        assert delta is not None  # it has news
        delta = self._shape.visible(delta)
        if around is None:
            opening = self._shape.opening(index, self._streams[number].prompt)
            if opening is not None:
                events.append(self._chunk(opening))
            events.append(self._chunk(self._shape.delta(index, delta)))
            self._around[index] = self._split_plain(index, delta)
        else:
            events.append(self._chunk(self._shape.delta(index, delta)))

    def _split_plain(self, index: int, delta: CompletionOutput) -> list[bytes]:
        """See `_around`."""
        if self._counts_chunks or not self._shape.has_plain_deltas:
            return [b""]
        plain = replace(delta, text=_MARK, finish_reason=None, stop_reason=None)
        return self._chunk(self._shape.delta(index, plain)).split(self._encode(_MARK))

    def _chunk(self, choice: Any) -> bytes:
        if self._counts_chunks:
            return self._with_usage(self._encode(choice))
        return self._before + self._encode(choice) + self._behind

    def _with_usage(self, choice: bytes) -> bytes:
        usage = self._encode(usage_of(self._shape, self._streams))
        return b'%b%b],"usage":%b}\n\n' % (self._before, choice, usage)
