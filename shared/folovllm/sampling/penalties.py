"""Penalties on tokens that a request has already seen.

Only logits of seen tokens change, so nothing here makes a table [num_rows, vocab_size]: an entry is
one occurrence of a token, and repeats of a token are told apart by how entries are written. What
was seen is read from the request's own tokens at every step: a recomputation after a preemption
cannot make output look like prompt. The halves `collect` and `apply_` are as in
`logits_processors`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from ..request import Request


@dataclass(frozen=True)
class RepetitionPenalty:
    """Makes every token of prompt and output less likely, however often it occurred (CTRL)."""

    rows: torch.Tensor
    """[num_tokens_seen] int64, row of the logits; the same token may come several times."""
    token_ids: torch.Tensor
    """[num_tokens_seen] int64."""
    penalties: torch.Tensor
    """[num_tokens_seen] float32, divides positive logits and multiplies the others."""

    @staticmethod
    def collect(requests: Sequence[Request]) -> list[np.ndarray]:
        penalties = np.array([request.sampling_params.repetition_penalty for request in requests])
        asking = np.flatnonzero(penalties != 1)
        rows, token_ids = _entries(asking, [requests[row].token_ids for row in asking.tolist()])
        return [rows, token_ids, penalties[rows].astype(np.float32)] if len(asking) else []

    def apply_(self, logits: torch.Tensor) -> None:
        seen = logits[self.rows, self.token_ids]
        # Entries of the same token all read the old logit and write the same new one.
        seen = torch.where(seen > 0, seen / self.penalties, seen * self.penalties)
        logits.index_put_((self.rows, self.token_ids), seen)


@dataclass(frozen=True)
class OutputPenalties:
    """Presence penalty, once per distinct output token; frequency penalty, once per occurrence."""

    rows: torch.Tensor
    """[num_tokens_seen] int64, row of the logits; the same token may come several times."""
    token_ids: torch.Tensor
    """[num_tokens_seen] int64."""
    presence: torch.Tensor
    """[num_tokens_seen] float32, subtracted once."""
    frequency: torch.Tensor
    """[num_tokens_seen] float32, subtracted for every entry."""

    @staticmethod
    def collect(requests: Sequence[Request]) -> list[np.ndarray]:
        params = [request.sampling_params for request in requests]
        presence = np.array([p.presence_penalty for p in params], dtype=np.float32)
        frequency = np.array([p.frequency_penalty for p in params], dtype=np.float32)
        asking = np.flatnonzero((presence != 0) | (frequency != 0))
        rows, token_ids = _entries(
            asking, [requests[row].output_token_ids for row in asking.tolist()]
        )
        return [rows, token_ids, presence[rows], frequency[rows]] if len(rows) else []

    def apply_(self, logits: torch.Tensor) -> None:
        index = (self.rows, self.token_ids)
        # Plain writes of equal values subtract once per token, accumulating ones once per entry.
        logits.index_put_(index, logits[index] - self.presence)
        logits.index_put_(index, -self.frequency, accumulate=True)


def _entries(rows: np.ndarray, token_ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and the id of every token, flat; `token_ids[i]` belong to `rows[i]`.

    Rows [0, 2] with [[7, 7], [5]] give [0, 0, 2] and [7, 7, 5].
    """
    lengths = [len(ids) for ids in token_ids]
    flat = np.fromiter(chain.from_iterable(token_ids), dtype=np.int64, count=sum(lengths))
    return np.repeat(rows, lengths), flat
