"""Logits of a vocabulary that several processes share: each has the columns of its own tokens."""

import torch

from ..kernels.random import choices_of, select_best_candidates
from .collectives import Collectives


class LogitsParts:
    """What makes one choice, or one tensor, of what the ranks have. All of them must call alike."""

    def __init__(self, vocab_size: int, device: torch.device, collectives: Collectives) -> None:
        ranks = collectives.ranks
        self._vocab_size, self._collectives = vocab_size, collectives
        self._best_candidates = select_best_candidates(device)
        self.num_columns = ranks.share_of_vocab(vocab_size)
        """Of each rank's logits; the last ones may be of no token, and are -inf."""
        self._first_token = ranks.rank * self.num_columns

    def choose_tokens(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor | None = None,
        seeds: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `kernels.random.choose_tokens` among all tokens; logits: [num_rows, num_columns].

        Eight bytes of each row travel, and a captured graph can hold it.
        """
        best = self._best_candidates(logits, self._first_token, temperatures, seeds, positions)
        return choices_of(self._collectives.largest(best))

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """[num_rows, vocab_size], for rules that look at all logits."""
        return self._collectives.gather_columns(logits)[:, : self._vocab_size].contiguous()
