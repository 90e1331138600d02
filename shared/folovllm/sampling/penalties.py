"""Penalties on tokens that a request has already seen.

Only logits of seen tokens change, so nothing here makes a table [num_rows, vocab_size]: an entry is
one occurrence of a token, and repeats of a token are told apart by how entries are written. The
tokens lie on the device already (see `token_history`): what a step uploads is where each request's
begin and how many they are, and the entries are spread out there. The halves `collect` and `apply_`
are as in `logits_processors`.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .token_history import HistoryUpdate


@dataclass(frozen=True)
class SeenTokens:
    """Where the tokens lie that the rows with one kind of penalty have seen."""

    history: torch.Tensor
    """[capacity] int64, the token ids of all requests: `TokenHistory.token_ids` of this step."""
    rows: torch.Tensor
    """[num_asking] int64, row of the logits."""
    lengths: torch.Tensor
    """[num_asking] int64, how many tokens each row has seen."""
    offsets: torch.Tensor
    """[num_asking] int64: entry e of row i is at `offsets[i] + e`, e counted over all rows."""
    num_entries: int
    """Sum of the lengths, known on the host: sizes must not wait for the device."""

    @staticmethod
    def collect(rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """The arrays `rows`, `lengths` and `offsets`; row i's tokens begin at `starts[i]`.

        Starts [4, 0] and lengths [2, 3] give offsets [4, -2]: entries 0 and 1 are at 4 and 5,
        entries 2 to 4 at 0 to 2.
        """
        return [rows, lengths, starts - (np.cumsum(lengths) - lengths)]

    def entries(self) -> "SeenEntries":
        """One entry per token, in the order of the rows."""
        asking = torch.repeat_interleave(self.lengths, output_size=self.num_entries)
        positions = torch.arange(self.num_entries, device=asking.device)
        token_ids = self.history[positions + self.offsets[asking]]
        return SeenEntries(asking, self.rows[asking], token_ids)


@dataclass(frozen=True)
class SeenEntries:
    """One entry per token seen; the same token may come several times."""

    asking: torch.Tensor
    """[num_entries] int64, which of the asking rows."""
    rows: torch.Tensor
    """[num_entries] int64, row of the logits."""
    token_ids: torch.Tensor
    """[num_entries] int64."""


@dataclass(frozen=True)
class RepetitionPenalty:
    """Makes every token of prompt and output less likely, however often it occurred (CTRL)."""

    seen: SeenTokens
    penalties: torch.Tensor
    """[num_asking] float32, divides positive logits and multiplies the others."""

    @staticmethod
    def collect(rows: np.ndarray, penalties: np.ndarray, update: HistoryUpdate) -> list[np.ndarray]:
        """rows: [num_rows] int64, the rows with any penalty, for which `update` was collected;
        penalties: [num_rows], theirs."""
        asking = np.flatnonzero(penalties != 1)
        if not len(asking):
            return []
        seen = SeenTokens.collect(rows[asking], update.starts[asking], update.lengths[asking])
        return [*seen, penalties[asking].astype(np.float32)]

    def apply_(self, logits: torch.Tensor) -> None:
        entries = self.seen.entries()
        index, penalties = (entries.rows, entries.token_ids), self.penalties[entries.asking]
        seen = logits[index]
        # Entries of the same token all read the old logit and write the same new one.
        logits.index_put_(index, torch.where(seen > 0, seen / penalties, seen * penalties))


@dataclass(frozen=True)
class OutputPenalties:
    """Presence penalty, once per distinct output token; frequency penalty, once per occurrence."""

    seen: SeenTokens
    presence: torch.Tensor
    """[num_asking] float32, subtracted once."""
    frequency: torch.Tensor
    """[num_asking] float32, subtracted for every entry."""

    @staticmethod
    def collect(
        rows: np.ndarray, presence: np.ndarray, frequency: np.ndarray, update: HistoryUpdate
    ) -> list[np.ndarray]:
        """rows, update: as in `RepetitionPenalty`; presence, frequency: [num_rows], theirs."""
        num_output_tokens = update.lengths - update.prompt_lens
        asking = np.flatnonzero(((presence != 0) | (frequency != 0)) & (num_output_tokens > 0))
        if not len(asking):
            return []
        starts = (update.starts + update.prompt_lens)[asking]
        seen = SeenTokens.collect(rows[asking], starts, num_output_tokens[asking])
        return [*seen, *(v[asking].astype(np.float32) for v in (presence, frequency))]

    def apply_(self, logits: torch.Tensor) -> None:
        entries = self.seen.entries()
        index, asking = (entries.rows, entries.token_ids), entries.asking
        # Plain writes of equal values subtract once per token, accumulating ones once per entry.
        logits.index_put_(index, logits[index] - self.presence[asking])
        logits.index_put_(index, -self.frequency[asking], accumulate=True)
