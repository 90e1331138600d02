"""Copies of the requests' tokens on the device, so that a step uploads only the new ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ..request import Request

_SPARE_TOKENS = 256
"""Room for outputs that every request gets at least, so that short ones are placed once."""


@dataclass
class _Segment:
    """Where one request's tokens lie: from `start`, room for `capacity`, `num_written` there."""

    start: int
    capacity: int
    num_written: int = 0


@dataclass(frozen=True)
class HistoryUpdate:
    """What has to be written before the histories of a batch are complete."""

    starts: np.ndarray
    """[num_requests] int64, where each request's tokens begin in `TokenHistory.token_ids`."""
    lengths: np.ndarray
    """[num_requests] int64, how many tokens each request has now."""
    prompt_lens: np.ndarray
    """[num_requests] int64, how many of them are its prompt."""
    positions: np.ndarray
    """[num_new_tokens] int64, where the new tokens go."""
    token_ids: np.ndarray
    """[num_new_tokens] int64."""
    written: tuple[tuple[_Segment, int], ...]
    """What every segment with new tokens holds after the write."""


class TokenHistory:
    """A copy of the requests' own tokens, which stay the truth.

    A request that was never seen, or that has fewer tokens than were written, is written anew;
    of any other only the tokens behind the written ones are: requests append and change nothing.
    So it does not matter in which steps a request takes part, nor in which state it is.

    What is written is never overwritten, and a buffer without room is replaced, not cleared:
    whoever holds `token_ids` and `starts` of an earlier step can still read that step's tokens.

        a has tokens 5 6, b has 7:   token_ids = [5 6 . . 7 . . .], starts = [0, 4]
        a appends 8:                 positions = [2], token_ids = [8]
    """

    def __init__(self, device: torch.device) -> None:
        self._segments: WeakKeyDictionary[Request, _Segment] = WeakKeyDictionary()
        self._num_used = 0
        self.token_ids = torch.empty(0, dtype=torch.int64, device=device)
        """[capacity] int64; the tokens of a request follow one another."""

    def collect(self, requests: Sequence[Request]) -> HistoryUpdate:
        """Give every request its room and find the tokens that `write` has to put there.

        Costs O(requests + new tokens), but for a step now and then that replaces the buffer: this
        one writes all tokens of these requests, and then as many new ones find room.
        """
        segments = self._place(requests)
        lengths = [len(request.token_ids) for request in requests]
        firsts: list[int] = []
        new_ids: list[list[int]] = []
        written = {}  # by segment: a request may be there twice
        for request, segment, length in zip(requests, segments, lengths, strict=True):
            num_written = segment.num_written
            if length > num_written and id(segment) not in written:
                firsts.append(segment.start + num_written)
                new_ids.append(request.token_ids[num_written:])
                written[id(segment)] = (segment, length)
        counts = np.array([len(ids) for ids in new_ids], dtype=np.int64)
        num_new = int(counts.sum())
        shifts = np.array(firsts, dtype=np.int64) - (np.cumsum(counts) - counts)
        return HistoryUpdate(
            starts=np.array([segment.start for segment in segments], dtype=np.int64),
            lengths=np.array(lengths, dtype=np.int64),
            prompt_lens=np.array([r.num_prompt_tokens for r in requests], dtype=np.int64),
            positions=np.arange(num_new) + np.repeat(shifts, counts),
            token_ids=np.fromiter(chain.from_iterable(new_ids), dtype=np.int64, count=num_new),
            written=tuple(written.values()),
        )

    @torch.inference_mode()
    def write(
        self, update: HistoryUpdate, positions: torch.Tensor, token_ids: torch.Tensor
    ) -> None:
        """Complete the histories that `update` was collected for; the last one collected.

        positions, token_ids: those of `update`, on the device.
        """
        self.token_ids.index_copy_(0, positions, token_ids)
        for segment, num_written in update.written:
            segment.num_written = num_written

    def _place(self, requests: Sequence[Request]) -> list[_Segment]:
        """A segment with enough room per request; replaces the buffer when it is used up."""
        segments = [self._find_or_append(request) for request in requests]
        if self._num_used > len(self.token_ids):
            # Twice the room of this batch: the next replacement is as many tokens away. Never
            # less than before: steps with few requests take turns with steps of many.
            self._segments.clear()
            self._num_used = 0
            segments = [self._find_or_append(request) for request in requests]
            capacity = max(len(self.token_ids), 2 * self._num_used)
            self.token_ids = self.token_ids.new_empty(capacity)
        return segments

    def _find_or_append(self, request: Request) -> _Segment:
        segment = self._segments.get(request)
        num_tokens = len(request.token_ids)
        if segment is None or not segment.num_written <= num_tokens <= segment.capacity:
            longest = request.num_prompt_tokens + request.max_tokens
            capacity = max(num_tokens, min(longest, 2 * num_tokens + _SPARE_TOKENS))
            segment = self._segments[request] = _Segment(self._num_used, capacity)
            self._num_used += capacity
        return segment
