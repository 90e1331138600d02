"""Bias and filters of logits, each for the rows that ask for it and no others.

Every processor is a frozen dataclass of device tensors with two halves: `collect` runs on the host
and returns numpy arrays in the order of the fields (or nothing, if no row asks), `apply_` edits
float32 logits [num_rows, vocab_size] in place on the device. Shapes of the tensors follow from what
the requests ask for, never from values on the device, so nothing here waits for the device.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..request import Request

_MAX_TOP_K_CANDIDATES = 1024
"""Up to this k the k largest are selected; beyond it the whole row is sorted. Not tuned."""


@dataclass(frozen=True)
class LogitBias:
    """Biases added to single logits; -inf forbids a token (`min_tokens`, `bad_words`)."""

    rows: torch.Tensor
    """[num_biases] int64, row of the logits."""
    token_ids: torch.Tensor
    """[num_biases] int64; no (row, token id) occurs twice."""
    values: torch.Tensor
    """[num_biases] float32."""

    @staticmethod
    def collect(requests: Sequence[Request], vocab_size: int) -> list[np.ndarray]:
        """Merge `logit_bias`, the ends of bad words that are almost there, and the stop tokens
        that `min_tokens` still forbids.

        Stop ids beyond the vocabulary cannot be sampled anyway and need no bias. IndexError if a
        biased id is not in [0, vocab_size): on a GPU it would take the whole process down.
        """
        rows: list[int] = []
        token_ids: list[int] = []
        values: list[float] = []
        for row, request in enumerate(requests):
            params = request.sampling_params
            biases = dict(params.logit_bias or {})
            if request.num_output_tokens < params.min_tokens:
                stop_token_ids = (i for i in request.stop_token_ids if 0 <= i < vocab_size)
                biases.update(dict.fromkeys(stop_token_ids, -math.inf))
            if request.bad_words_token_ids:
                biases.update(dict.fromkeys(_ends_of_bad_words(request), -math.inf))
            rows += [row] * len(biases)
            token_ids += biases.keys()
            values += biases.values()
        if not rows:
            return []
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            raise IndexError(f"a biased token id is not in [0, {vocab_size})")
        return [np.array(rows), np.array(token_ids), np.array(values, dtype=np.float32)]

    def apply_(self, logits: torch.Tensor) -> None:
        biased = logits[self.rows, self.token_ids] + self.values
        logits.index_put_((self.rows, self.token_ids), biased)


def _ends_of_bad_words(request: Request) -> Iterator[int]:
    """The tokens that would complete a word whose other tokens are the last of the output."""
    num_output_tokens = len(request.token_ids) - request.num_prompt_tokens
    for *beginning, end in request.bad_words_token_ids:
        num_before = len(beginning)
        if num_before <= num_output_tokens:
            first = len(request.token_ids) - num_before
            if request.token_ids[first:] == beginning:
                yield end


@dataclass(frozen=True)
class MinP:
    """Drops tokens less likely than `min_p` times the likeliest one."""

    rows: torch.Tensor
    """[num_asking] int64, row of the logits."""
    gaps: torch.Tensor
    """[num_asking] float32, temperature * -log(min_p): how far below the largest logit (before
    temperature) a token may lie."""

    @staticmethod
    def collect(requests: Sequence[Request], temperatures: np.ndarray) -> list[np.ndarray]:
        """temperatures: [num_rows] float32; rows at 0 are greedy, which no filter changes."""
        min_p = np.array([request.sampling_params.min_p for request in requests])
        rows = np.flatnonzero((min_p > 0) & (temperatures > 0))
        if not len(rows):
            return []
        return [rows, (temperatures[rows] * -np.log(min_p[rows])).astype(np.float32)]

    def apply_(self, logits: torch.Tensor) -> None:
        subset = logits.index_select(0, self.rows)
        floor = subset.amax(dim=-1, keepdim=True) - self.gaps[:, None]
        logits.index_copy_(0, self.rows, subset.masked_fill_(subset < floor, -torch.inf))


@dataclass(frozen=True)
class TopKTopP:
    """Keeps the `top_k` likeliest tokens, and of these the smallest set that reaches `top_p`.

    The token that crosses `top_p` stays. Among equal logits the lower token ids stay, as in greedy
    choice: exactly k tokens are left (vLLM and Transformers keep every token that ties with the
    k-th), and `top_k=1` is greedy.
    """

    rows: torch.Tensor
    """[num_asking] int64, row of the logits."""
    top_k: torch.Tensor
    """[num_asking] int64, in [1, vocab_size]."""
    top_p: torch.Tensor
    """[num_asking] float32, inf where top_p is off."""
    temperatures: torch.Tensor
    """[num_asking] float32, above 0."""

    @staticmethod
    def collect(
        requests: Sequence[Request], temperatures: np.ndarray, vocab_size: int
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the arrays for rows whose top_k is small, and for the rows that need a sort."""
        params = [request.sampling_params for request in requests]
        top_k = np.array([p.top_k for p in params], dtype=np.int64)
        top_k = np.where((top_k > 0) & (top_k < vocab_size), top_k, vocab_size)
        top_p = np.array([p.top_p for p in params], dtype=np.float32)
        top_p[top_p >= 1] = np.inf
        asks = ((top_k < vocab_size) | np.isfinite(top_p)) & (temperatures > 0)
        is_small = top_k <= min(_MAX_TOP_K_CANDIDATES, vocab_size - 1)
        small, large = np.flatnonzero(asks & is_small), np.flatnonzero(asks & ~is_small)
        return (
            [small, top_k[small], top_p[small], temperatures[small]] if len(small) else [],
            [large, top_k[large], top_p[large], temperatures[large]] if len(large) else [],
        )

    def apply_(self, logits: torch.Tensor, num_candidates: int) -> None:
        """num_candidates: at least the largest top_k of these rows; the vocabulary size sorts."""
        subset = logits.index_select(0, self.rows)
        if num_candidates < logits.shape[1]:
            ordered = subset.topk(num_candidates, dim=-1).values
        else:
            ordered = subset.sort(dim=-1, descending=True).values
        num_kept = self._count_kept(ordered)
        # The last value kept, and how many of the tokens that have this value are kept.
        last = ordered.gather(1, num_kept[:, None] - 1)
        quota = num_kept[:, None] - (ordered > last).sum(dim=-1, keepdim=True)
        ties = subset == last
        is_kept = (subset > last) | (ties & (ties.cumsum(dim=-1, dtype=torch.int32) <= quota))
        logits.index_copy_(0, self.rows, subset.masked_fill_(~is_kept, -torch.inf))

    def _count_kept(self, ordered: torch.Tensor) -> torch.Tensor:
        """Return [num_asking] int64 from logits [num_asking, num_candidates] in falling order."""
        ranks = torch.arange(ordered.shape[1], device=ordered.device)
        is_top_k = ranks < self.top_k[:, None]
        # Subtracting the largest first keeps tiny temperatures from overflowing.
        weights = torch.exp((ordered - ordered[:, :1]) / self.temperatures[:, None])
        cumulative = (weights * is_top_k).cumsum(dim=-1)
        before = cumulative.roll(1, dims=-1)
        before[:, 0] = 0
        is_kept = is_top_k & (before < self.top_p[:, None] * cumulative[:, -1:])
        # A top_p that underflows still leaves the likeliest token.
        return is_kept.sum(dim=-1).clamp(min=1)
