"""Counter-based random numbers and the choice of a token with them, in plain torch.

Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
maps a 64-bit key and a 128-bit counter to four 32-bit words. There is no state to advance: the word
of a token depends on (seed of its request, output position, token id) alone, hence neither on batch
mates nor on their order, on preemption or on the device.

    key     = (seed mod 2^32, seed div 2^32)
    counter = (token_id div 4, position, 0, 0);  token_id mod 4 picks one of the four words
"""

from typing import Protocol

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
_MAX_GROUPS_AT_ONCE = 1 << 16
"""Counters per batch of rows: keeps the int64 temporaries (512 KiB each) near the caches."""
_NAN_CANDIDATE = (1 << 63) - 1
_NO_CANDIDATE = (-0x7F800001 << 32) | _MASK
"""The largest with a score of -inf."""


def philox_4x32(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the four random words of each counter.

    counter: four, key: two int64 tensors with values in [0, 2^32) that broadcast together. The
    words come as int64 in [0, 2^32): torch has next to no arithmetic on uint32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        # The product may pass 2^63: it wraps around, and all 64 bits of the pattern are right.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) & _MASK) ^ c1 ^ k0
        c2 = ((product0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = product1 & _MASK, product0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return list(torch.broadcast_tensors(c0, c1, c2, c3))


def random_words(
    seeds: torch.Tensor, positions: torch.Tensor, num_tokens: int, first_token: int = 0
) -> torch.Tensor:
    """Return [num_rows, num_tokens] int64 in [0, 2^32): the random words of a run of tokens.

    seeds: [num_rows] int64, the 64 bits of each row's seed; positions: [num_rows] int64 in
    [0, 2^32), index of the output token that each row is about to choose; first_token: id of the
    first of these tokens, a multiple of 4.
    """
    groups = torch.arange(-(-num_tokens // 4), device=seeds.device)[None, :] + first_token // 4
    zero = torch.zeros((), dtype=torch.int64, device=seeds.device)
    key = [seeds[:, None] & _MASK, (seeds[:, None] >> 32) & _MASK]
    words = philox_4x32([groups, positions[:, None], zero, zero], key)
    return torch.stack(words, dim=-1).flatten(1)[:, :num_tokens]


def gumbel_from_words(words: torch.Tensor) -> torch.Tensor:
    """Return float32 standard Gumbel noise, always finite, from int64 words in [0, 2^32).

    With v uniform in (0, 1), E = -log(1 - v) is exponential and -log(E) is Gumbel. The winners of
    an argmax have a small E, so v near 0 must be fine-grained: it is (steps of 2^-32), and there
    -log(1 - v) is summed as a series because 1 - v would round the steps away.
    """
    v = (words.to(torch.float32) + 0.5) * 2.0**-32
    series = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v * (1 / 5 + v * (1 / 6))))))
    # v rounds to 1 for the last words; the floor keeps the logarithm finite.
    exponential = torch.where(v < 1 / 16, series, -torch.log((1 - v).clamp(min=2.0**-25)))
    return -torch.log(exponential)


def choose_tokens(
    logits: torch.Tensor,
    temperatures: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return [2, num_rows] int64: the chosen token ids, and 1 where the choice is valid.

    A row chooses argmax(logits + temperature * Gumbel noise), the lowest id among equals: this
    draws from softmax(logits / temperature) (Gumbel-max), and temperature 0 is greedy. A choice
    is invalid (0) if the row holds a NaN or nothing above -inf; its id is then meaningless, but
    in the vocabulary.

    logits: [num_rows, vocab_size], any float dtype; temperatures: [num_rows] float32; seeds and
    positions as in `random_words`. Without these three every row is greedy.
    """
    best, token_ids = _best_of_rows(logits, 0, temperatures, seeds, positions)
    return torch.stack((token_ids, (best > -torch.inf).to(torch.int64)))


def best_candidates(
    logits: torch.Tensor,
    first_token: int,
    temperatures: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return [num_rows] int64: what a part of the vocabulary has to offer to each row.

    Of the candidates of several parts the largest is what `choose_tokens` would choose among all
    of their tokens; `choices_of` reads it. logits: [num_rows, num_tokens], of the tokens from
    first_token on, a multiple of 4; the rest as for `choose_tokens`.

    The upper 32 bits are the score (logit and noise in float32) as an integer that is in the same
    order, the lower ones are larger for lower ids. A row with NaN has the largest of all numbers.
    """
    best, places = _best_of_rows(logits, first_token, temperatures, seeds, positions)
    bits = (best.to(torch.float32) + 0.0).view(torch.int32)  # 0 and -0 are equal
    # The larger the bits of a negative number without its sign, the smaller it is.
    score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    candidates = (score << 32) | (_MASK - (first_token + places))
    return candidates.masked_fill_(best.isnan(), _NAN_CANDIDATE)


def choices_of(candidates: torch.Tensor) -> torch.Tensor:
    """Return what `choose_tokens` does, [2, num_rows] int64, from [num_rows] candidates."""
    is_valid = (candidates > _NO_CANDIDATE) & (candidates < _NAN_CANDIDATE)
    return torch.stack((_MASK - (candidates & _MASK), is_valid.to(torch.int64)))


def _best_of_rows(
    logits: torch.Tensor,
    first_token: int,
    temperatures: torch.Tensor | None,
    seeds: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each row with its noise, and the first column that has it."""
    if temperatures is not None and seeds is not None and positions is not None:
        logits = logits.to(torch.float32, copy=True)
        is_random = temperatures.nonzero().flatten()
        rows_at_once = max(1, _MAX_GROUPS_AT_ONCE * 4 // logits.shape[1])
        for rows in is_random.split(rows_at_once):
            words = random_words(seeds[rows], positions[rows], logits.shape[1], first_token)
            noise = gumbel_from_words(words).mul_(temperatures[rows, None])
            logits.index_add_(0, rows, noise)
    # Both torch.max and torch.argmax promise the first index among equals; max shows NaN too.
    best, places = logits.max(dim=-1)
    return best, places


class BestCandidatesFn(Protocol):
    """`best_candidates` or its twin."""

    def __call__(
        self,
        logits: torch.Tensor,
        first_token: int,
        temperatures: torch.Tensor | None = None,
        seeds: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


class ChooseTokensFn(Protocol):
    """`choose_tokens` or its twin."""

    def __call__(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor | None = None,
        seeds: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


def select_choose_tokens(device: torch.device) -> ChooseTokensFn:
    """The Triton kernel on CUDA devices, plain torch anywhere else."""
    if device.type == "cuda":
        # Imported here because machines without a GPU need no triton.
        from . import fused_sampling

        return fused_sampling.choose_tokens
    return choose_tokens


def select_best_candidates(device: torch.device) -> BestCandidatesFn:
    """Likewise."""
    if device.type == "cuda":
        from . import fused_sampling

        return fused_sampling.best_candidates
    return best_candidates
