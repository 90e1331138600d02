"""Log-probabilities of prompts: of rows that are computed anyway, but that nobody samples from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ..request import Request
from ..transfer import upload
from .logprobs import describe_tokens, read_description

MOST_ROWS_AT_ONCE = 32
"""Projected to the vocabulary and described together: a long prompt's logits are gigabytes."""


class Scheduled(Protocol):
    """What a stage's ScheduledRequest says of one request's share of a step."""

    @property
    def request(self) -> Request: ...

    @property
    def num_scheduled_tokens(self) -> int: ...


class PromptRows(NamedTuple):
    """Rows of a step behind each of which a known token of the prompt stands."""

    request: Request
    first_row: int
    """In the packed batch."""
    first_place: int
    """In `Request.prompt_logprobs`: the row of the prompt's first token is 0."""
    num_rows: int


def find_prompt_rows(scheduled: Sequence[Scheduled]) -> list[PromptRows]:
    """The rows of those who ask for prompt_logprobs and did not get all of them before.

    scheduled: the requests of a step, in the order in which their tokens are packed. Call it
    before the step counts as computed.
    """
    return list(_find(scheduled))


def _find(scheduled: Sequence[Scheduled]) -> Iterator[PromptRows]:
    if all(s.request.sampling_params.prompt_logprobs is None for s in scheduled):
        return  # as in most steps
    row = 0
    for s in scheduled:
        start = s.request.num_computed_tokens
        end = min(start + s.num_scheduled_tokens, s.request.num_prompt_tokens - 1)
        if s.request.needs_prompt_logits and end > start:
            yield PromptRows(s.request, row, start, end - start)
        row += s.num_scheduled_tokens


@dataclass(frozen=True)
class PromptLogprobs:
    """What was asked for, on its way to the host."""

    fetched: torch.Tensor
    """[num_rows, 2 + 2 * max_top] float64, pinned, rows as in `Logprobs.values`; filled once the
    device has done what was queued with it."""
    asked: Sequence[PromptRows]
    """Whose they are, in order."""

    def record(self) -> None:
        """Add them to what is known of each request; what was known before is left alone.

        For when the step is done. A prompt that is computed again brings the same rows again.
        """
        rows = iter(self.fetched.tolist())
        for request, _, first_place, num_rows in self.asked:
            num_top = request.sampling_params.prompt_logprobs or 0
            new = [read_description(next(rows), num_top) for _ in range(num_rows)]
            num_known = len(request.prompt_logprobs) - first_place
            assert num_known >= 0  # chunks come in order, and nobody skips a part of the prompt
            request.prompt_logprobs += new[num_known:]


def compute_prompt_logprobs(
    scheduled: Sequence[Scheduled],
    hidden: torch.Tensor,
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
) -> PromptLogprobs | None:
    """Queue what a step owes to those who ask for prompt_logprobs; None if nobody does.

    hidden: [num_tokens, hidden_size] of the step, packed in the order of `scheduled`.
    compute_logits: the model's projection of some of these rows to the vocabulary. Call it before
    the step counts as computed; it does not wait for the device.
    """
    asked = find_prompt_rows(scheduled)
    if not asked:
        return None
    indices = np.concatenate([np.arange(r.first_row, r.first_row + r.num_rows) for r in asked])
    token_ids: list[int] = []  # each row's is the one behind it
    for request, _, first_place, num_rows in asked:
        token_ids += request.token_ids[first_place + 1 : first_place + 1 + num_rows]
    rows, targets = upload((indices, np.array(token_ids, dtype=np.int64)), hidden.device)
    max_top = max(r.request.sampling_params.prompt_logprobs or 0 for r in asked)
    shape, is_cuda = (len(indices), 2 + 2 * max_top), hidden.device.type == "cuda"
    fetched = torch.empty(shape, dtype=torch.float64, pin_memory=is_cuda)
    for first in range(0, len(indices), MOST_ROWS_AT_ONCE):
        part = slice(first, first + MOST_ROWS_AT_ONCE)
        logits = compute_logits(hidden.index_select(0, rows[part]))
        described = describe_tokens(logits, targets[part], max_top)
        fetched[part].copy_(described, non_blocking=True)
    return PromptLogprobs(fetched, asked)
