"""The sampling rules of a batch: collected from its requests on the host, uploaded in one copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from ..request import Request
from ..transfer import upload
from .logits_processors import LogitBias, MinP, TopKTopP
from .logprobs import LogprobsQuery
from .penalties import OutputPenalties, RepetitionPenalty, SeenTokens
from .token_history import HistoryUpdate, TokenHistory
from .token_masks import TokenMask, TokenMasks

_TEMPERATURE_LIMITS = (1e-30, 1e30)
"""Beyond these float32 noise under- or overflows, and no logits could tell the difference."""
_get_settings = attrgetter(
    "temperature",
    "logit_bias",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "bad_words",
    "allowed_token_ids",
    "structured_outputs",
)


@dataclass(frozen=True)
class Noise:
    """What the random numbers of each row depend on."""

    temperatures: torch.Tensor
    """[num_rows] float32; 0 for a greedy row."""
    seeds: torch.Tensor
    """[num_rows] int64, the 64 bits of the request's seed."""
    positions: torch.Tensor
    """[num_rows] int64, output tokens that the request already has."""

    @staticmethod
    def collect(requests: Sequence[Request], temperatures: Sequence[float]) -> list[np.ndarray]:
        """OverflowError if a seed is not in [0, 2^64)."""
        scales = np.array(temperatures)
        scales = np.where(scales > 0, scales.clip(*_TEMPERATURE_LIMITS), 0).astype(np.float32)
        seeds = np.array([request.seed for request in requests], dtype=np.uint64)
        positions = np.array([request.num_output_tokens for request in requests])
        return [scales, seeds.view(np.int64), positions]


@dataclass(frozen=True, kw_only=True)
class SamplingTensors:
    """The rules of a batch on the device; None means that no row asks for it."""

    num_rows: int
    noise: Noise | None = None
    """None: every row is greedy."""
    mask: TokenMask | None = None
    bias: LogitBias | None = None
    repetition: RepetitionPenalty | None = None
    output_penalties: OutputPenalties | None = None
    min_p: MinP | None = None
    few_candidates: TopKTopP | None = None
    """Rows whose top_k is small."""
    max_top_k: int = 0
    """Largest top_k in `few_candidates`."""
    all_candidates: TopKTopP | None = None
    """Rows with a large top_k, or with a top_p and no top_k."""
    logprobs: LogprobsQuery | None = None

    @staticmethod
    def collect(
        requests: Sequence[Request], masks: TokenMasks, history: TokenHistory
    ) -> "SamplingTensors":
        """Row i gets the rules of `requests[i]`; nothing is uploaded if all rows are plain greedy.

        `history`, on the device of the batch, is brought up to date for the rows with penalties.
        OverflowError as `Noise.collect`.
        """
        num_rows = len(requests)
        if num_rows == 0:
            return SamplingTensors(num_rows=0)
        columns = zip(
            *[_get_settings(request.sampling_params) for request in requests], strict=True
        )
        temperatures, biases, min_tokens, repetition, presence, frequency, num_top, *rest = columns
        bad_words, allowed, structures = rest
        host: dict[str, list[np.ndarray]] = {}
        if any(temperatures):
            host |= _collect_random(requests, temperatures, masks.vocab_size)
        if any(biases) or any(min_tokens) or any(bad_words):
            host["bias"] = LogitBias.collect(requests, masks.vocab_size)
        if any(allowed) or any(structures):
            rules = enumerate(zip(allowed, structures, strict=True))
            masked = [row for row, (token_ids, structure) in rules if token_ids or structure]
            host["mask"] = masks.collect(requests, masked)
        if num_top.count(None) < num_rows:
            host["logprobs"] = LogprobsQuery.collect(num_top)
        penalties = enumerate(zip(repetition, presence, frequency, strict=True))
        rows = [row for row, values in penalties if values != (1.0, 0.0, 0.0)]
        update = history.collect([requests[row] for row in rows]) if rows else None
        if update is not None:
            asking = np.array(rows)
            factor, once, each = (np.array(p)[asking] for p in (repetition, presence, frequency))
            host["history"] = [update.positions, update.token_ids]
            host["repetition"] = RepetitionPenalty.collect(asking, factor, update)
            host["output_penalties"] = OutputPenalties.collect(asking, once, each, update)
        return _on_device(host, num_top, history, update)

    @staticmethod
    def collect_noise(requests: Sequence[Request]) -> list[np.ndarray] | None:
        """See `Sampler.collect_noise`."""
        params = [request.sampling_params for request in requests]
        if not all(p.has_only_temperature for p in params):
            return None
        temperatures = [p.temperature for p in params]
        return Noise.collect(requests, temperatures) if any(temperatures) else []

    @property
    def has_only_temperature(self) -> bool:
        """Nothing but the largest logit, with its noise, is wanted of any row."""
        return not self._has_edits and self.logprobs is None

    @property
    def _has_edits(self) -> bool:
        return any((*self._processors, self.few_candidates, self.all_candidates))

    @property
    def _processors(self) -> tuple[Any, ...]:
        return self.mask, self.bias, self.repetition, self.output_penalties, self.min_p

    def edit(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits [num_rows, vocab_size] that tokens are drawn from, less temperature.

        A float32 copy after mask, bias, penalties and filters; `logits` itself if no row asks.
        """
        if not self._has_edits:
            return logits
        edited = logits.to(torch.float32, copy=True)
        for processor in self._processors:
            if processor is not None:
                processor.apply_(edited)
        if self.few_candidates is not None:
            self.few_candidates.apply_(edited, self.max_top_k)
        if self.all_candidates is not None:
            self.all_candidates.apply_(edited, logits.shape[1])
        return edited


def _collect_random(
    requests: Sequence[Request], temperatures: Sequence[float], vocab_size: int
) -> dict[str, list[np.ndarray]]:
    """What only matters in batches with rows that are not greedy."""
    noise = Noise.collect(requests, temperatures)
    few, all_candidates = TopKTopP.collect(requests, noise[0], vocab_size)
    return {
        "noise": noise,
        "min_p": MinP.collect(requests, noise[0]),
        "few_candidates": few,
        "all_candidates": all_candidates,
    }


def _on_device(
    host: dict[str, list[np.ndarray]],
    num_top: tuple[int | None, ...],
    history: TokenHistory,
    update: HistoryUpdate | None,
) -> SamplingTensors:
    """Upload all parts at once; `host` maps fields of `SamplingTensors` to what fills them."""
    parts = {name: arrays for name, arrays in host.items() if arrays}
    if not parts:
        return SamplingTensors(num_rows=len(num_top))
    device = history.token_ids.device
    tensors = iter(upload([array for arrays in parts.values() for array in arrays], device))
    views = {name: [next(tensors) for _ in arrays] for name, arrays in parts.items()}
    if update is not None:
        history.write(update, *views["history"])
    few, all_candidates = views.get("few_candidates"), views.get("all_candidates")
    return SamplingTensors(
        num_rows=len(num_top),
        noise=Noise(*views["noise"]) if "noise" in views else None,
        mask=TokenMask(*views["mask"]) if "mask" in views else None,
        bias=LogitBias(*views["bias"]) if "bias" in views else None,
        **_penalties_on_device(parts, views, history),
        min_p=MinP(*views["min_p"]) if "min_p" in views else None,
        few_candidates=TopKTopP(*few) if few else None,
        max_top_k=int(parts["few_candidates"][1].max()) if few else 0,
        all_candidates=TopKTopP(*all_candidates) if all_candidates else None,
        logprobs=LogprobsQuery(views["logprobs"][0], num_top) if "logprobs" in views else None,
    )


def _penalties_on_device(
    parts: dict[str, list[np.ndarray]],
    views: dict[str, list[torch.Tensor]],
    history: TokenHistory,
) -> dict[str, Any]:
    """The fields `repetition` and `output_penalties`, as far as rows ask for them."""
    fields: dict[str, Any] = {}
    for name, penalty in (("repetition", RepetitionPenalty), ("output_penalties", OutputPenalties)):
        if name in views:
            rows, lengths, offsets, *values = views[name]
            num_entries = int(parts[name][1].sum())
            seen = SeenTokens(history.token_ids, rows, lengths, offsets, num_entries)
            fields[name] = penalty(seen, *values)
    return fields
