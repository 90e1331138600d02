"""Which tokens a row may get at all, as one bit per token, made on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ..request import Request

_BITS = 32
"""Tokens per word of a mask."""


def mask_length(vocab_size: int) -> int:
    """How many int32 words have a bit for every token."""
    return -(-vocab_size // _BITS)


def mask_of(token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """[mask_length] int32: bit b of word w is set if token 32 * w + b is among these.

    IndexError if one of them is not in [0, vocab_size).
    """
    ids = np.array(token_ids, dtype=np.int64)
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise IndexError(f"an allowed token id is not in [0, {vocab_size})")
    words = np.zeros(mask_length(vocab_size), dtype=np.uint32)
    np.bitwise_or.at(words, ids // _BITS, np.uint32(1) << (ids % _BITS).astype(np.uint32))
    return words.view(np.int32)


@dataclass(frozen=True)
class TokenMask:
    """Forbids every token whose bit is 0."""

    rows: torch.Tensor
    """[num_asking] int64, row of the logits."""
    bits: torch.Tensor
    """[num_asking, mask_length] int32, as in `mask_of`."""

    def apply_(self, logits: torch.Tensor) -> None:
        places = torch.arange(_BITS, dtype=torch.int32, device=logits.device)
        is_forbidden = ((self.bits[:, :, None] >> places) & 1 == 0).flatten(1)
        subset = logits.index_select(0, self.rows)
        subset.masked_fill_(is_forbidden[:, : logits.shape[1]], -torch.inf)
        logits.index_copy_(0, self.rows, subset)


class TokenMasks:
    """Makes the masks of a step; what stays the same for a request is made once."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._allowed: WeakKeyDictionary[Request, np.ndarray] = WeakKeyDictionary()

    def collect(self, requests: Sequence[Request], rows: Sequence[int]) -> list[np.ndarray]:
        """The arrays of `TokenMask` for these rows, row i being that of `requests[i]`."""
        masks = np.empty((len(rows), mask_length(self.vocab_size)), dtype=np.int32)
        for row, mask in zip(rows, masks, strict=True):
            grammar = requests[row].grammar
            if grammar is None:
                mask[:] = self._allowed_by(requests[row])
            else:
                grammar.fill_mask(requests[row], mask)
        return [np.array(rows), masks]

    def _allowed_by(self, request: Request) -> np.ndarray:
        mask = self._allowed.get(request)
        if mask is None:
            token_ids = request.sampling_params.allowed_token_ids or ()
            mask = self._allowed[request] = mask_of(token_ids, self.vocab_size)
        return mask
