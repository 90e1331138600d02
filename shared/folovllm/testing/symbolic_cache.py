"""A model without numbers: its keys and values are symbols of what they were computed from."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from ..interfaces import SamplerOutput
from ..request import FinishReason, Request

_MODULUS = (1 << 61) - 1
VOCAB_SIZE = 50


def _symbols(token_ids: Iterable[int], cache_salt: str | None) -> list[int]:
    """One number per token, which stands for it and all before it, and for nobody else's salt."""
    symbols, symbol = [], 1 + sum(map(ord, cache_salt or ""))
    for token_id in token_ids:
        symbol = (symbol * 1_000_003 + token_id + 1) % _MODULUS
        symbols.append(symbol)
    return symbols


def _sample(symbol: int, seed: int) -> int:
    return (symbol * (2 * seed + 1) >> 7) % VOCAB_SIZE


def tokens_alone(request: Request) -> list[int]:
    """What a request must produce, whoever else is there: its whole output."""
    token_ids = list(request.prompt_token_ids)
    num_output_tokens = 0
    while num_output_tokens < request.max_tokens:
        token_ids.append(_sample(_symbols(token_ids, request.cache_salt)[-1], request.seed))
        num_output_tokens += 1
        if expected_finish_reason(request, token_ids[-1], num_output_tokens) is not None:
            break
    return token_ids[request.num_prompt_tokens :]


def expected_finish_reason(
    request: Request, token_id: int, num_output_tokens: int
) -> FinishReason | None:
    """Of the request's n-th output token."""
    if token_id in request.stop_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if num_output_tokens == request.max_tokens else None


class SymbolicCache:
    """Runs a step as a stage's model does: copies, stores, then reads, and samples.

    Every place holds the symbol of the prefix that was computed there. A request must read its
    own prefixes and nobody else's; a place that was freed holds nothing.
    """

    def __init__(self, locate: Callable[[Any, int], tuple[int, int]], block_size: int) -> None:
        """locate: (ScheduledRequest, position) -> (block or slot, place in it)."""
        self._locate = locate
        self._block_size = block_size
        self._device: dict[tuple[int, int], int] = {}
        self._host: dict[tuple[int, int], int] = {}
        self._last_tokens: dict[Request, int] = {}
        """What was sampled last for each request; the host may not know it yet."""

    def execute(self, scheduler_output: Any) -> SamplerOutput:
        for copy in getattr(scheduler_output, "block_copies", ()):
            source, destination = {
                "COPY_ON_WRITE": (self._device, self._device),
                "SWAP_OUT": (self._device, self._host),
                "SWAP_IN": (self._host, self._device),
            }[copy.kind.name]
            for offset in range(self._block_size):
                symbol = source.get((copy.source, offset))
                if symbol is None:
                    destination.pop((copy.destination, offset), None)
                else:
                    destination[copy.destination, offset] = symbol
        symbols = [
            _symbols(self._token_ids(s), s.request.cache_salt) for s in scheduler_output.scheduled
        ]
        self._store(scheduler_output.scheduled, symbols)
        for s, own in zip(scheduler_output.scheduled, symbols, strict=True):
            read = [self._device.get(self._locate(s, position)) for position in range(len(own))]
            assert read == own, f"{s.request.request_id} reads what is not its own"
        tokens = [
            _sample(own[-1], s.request.seed)
            for s, own in zip(scheduler_output.scheduled, symbols, strict=True)
        ]
        for s, token_id in zip(scheduler_output.scheduled, tokens, strict=True):
            self._last_tokens[s.request] = token_id
        return SamplerOutput(token_ids=tokens, logprobs=[None] * len(tokens))

    def _token_ids(self, scheduled: Any) -> list[int]:
        """All that a request has computed after this step; the last may be known here only."""
        request = scheduled.request
        end = request.num_computed_tokens + scheduled.num_scheduled_tokens
        assert end <= request.num_tokens
        assert end <= len(request.token_ids) + 1, "only the last token may be pending"
        if end <= len(request.token_ids):
            return list(request.token_ids[:end])
        return [*request.token_ids, self._last_tokens[request]]

    def _store(self, scheduled: Iterable[Any], symbols: list[list[int]]) -> None:
        written: dict[tuple[int, int], str] = {}
        for s, own in zip(scheduled, symbols, strict=True):
            for position in range(s.request.num_computed_tokens, len(own)):
                place = self._locate(s, position)
                assert place not in written, (
                    f"{s.request.request_id} and {written[place]} write to one place"
                )
                written[place] = s.request.request_id
                self._device[place] = own[position]

    def forget(self, free_block_ids: Iterable[int], free_swap_block_ids: Iterable[int]) -> None:
        """Empty the places of free blocks, so that reading them is noticed."""
        for places, block_ids in (
            (self._device, free_block_ids),
            (self._host, free_swap_block_ids),
        ):
            held = defaultdict(list)
            for block_id, offset in places:
                held[block_id].append(offset)
            for block_id in block_ids:
                for offset in held.get(block_id, ()):
                    del places[block_id, offset]
