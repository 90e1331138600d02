"""Log-probabilities of the chosen and the likeliest tokens, for the rows that report them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..interfaces import TokenLogprobs


@dataclass(frozen=True)
class Logprobs:
    """What was asked for, still on the device."""

    values: torch.Tensor
    """[num_asking, 2 + 2 * max_top] float64: logprob and rank of the chosen token, the ids of the
    likeliest tokens, their logprobs. One dtype, so that one transfer fetches all."""
    num_top: tuple[int | None, ...]
    """[num_rows] how many of the likeliest tokens each row reports; None if it did not ask."""

    def unpack(self, fetched: np.ndarray) -> list[TokenLogprobs | None]:
        """fetched: `values` on the host, flat. Returns one entry per row of the batch."""
        records = iter(fetched.reshape(self.values.shape).tolist())
        return [
            None if num_top is None else read_description(next(records), num_top)
            for num_top in self.num_top
        ]


@dataclass(frozen=True)
class LogprobsQuery:
    """Which rows report log-probabilities, and of how many tokens."""

    rows: torch.Tensor
    """[num_asking] int64, row of the logits."""
    num_top: tuple[int | None, ...]
    """As in `Logprobs`."""

    @staticmethod
    def collect(num_top: Sequence[int | None]) -> list[np.ndarray]:
        return [np.array([row for row, num in enumerate(num_top) if num is not None])]

    def compute(self, logits: torch.Tensor, token_ids: torch.Tensor) -> Logprobs:
        """logits: [num_rows, vocab_size], raw; token_ids: [num_rows] int64, the chosen ones.

        A token's rank is one more than the number of strictly likelier tokens.
        """
        raw = logits.index_select(0, self.rows)
        chosen = token_ids.index_select(0, self.rows)
        max_top = max(num for num in self.num_top if num is not None)
        return Logprobs(describe_tokens(raw, chosen, max_top), self.num_top)


def describe_tokens(logits: torch.Tensor, token_ids: torch.Tensor, max_top: int) -> torch.Tensor:
    """Rows as in `Logprobs.values`, of these tokens [num_rows] int64 and the likeliest ones.

    logits: [num_rows, vocab_size], raw.
    """
    raw, chosen = logits.to(torch.float32), token_ids[:, None]
    logprobs = torch.log_softmax(raw, dim=-1)
    rank = (raw > raw.gather(1, chosen)).sum(dim=-1, keepdim=True) + 1
    top_ids = _top_token_ids(raw, max_top)
    parts = (logprobs.gather(1, chosen), rank, top_ids, logprobs.gather(1, top_ids))
    return torch.cat([part.to(torch.float64) for part in parts], 1)


def read_description(values: Sequence[float], num_top: int) -> TokenLogprobs:
    """One row of `Logprobs.values`, on the host, for a request that wants `num_top` tokens."""
    max_top = (len(values) - 2) // 2
    logprob, rank, *rest = values
    token_ids, logprobs = map(int, rest[:num_top]), rest[max_top : max_top + num_top]
    return TokenLogprobs(logprob, int(rank), tuple(zip(token_ids, logprobs, strict=True)))


def _top_token_ids(logits: torch.Tensor, num_top: int) -> torch.Tensor:
    """Return [num_rows, num_top] int64: the likeliest tokens, the lower id first among equals.

    torch.topk promises no order among equals (frequent in 16-bit logits), so it gets integers that
    are never equal: the logit's bits, made to sort like the number, above the reversed token id.
    """
    vocab_size = logits.shape[1]
    # Adding 0 turns -0.0 into 0.0, which equals it but has other bits.
    bits = (logits + 0.0).view(torch.int32).to(torch.int64)
    sortable = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    reversed_ids = vocab_size - 1 - torch.arange(vocab_size, device=logits.device)
    keys = (sortable << 32) | reversed_ids
    return vocab_size - 1 - (keys.topk(num_top, dim=-1).values & 0xFFFFFFFF)
