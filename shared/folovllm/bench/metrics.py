"""Definitions of everything that is reported: latencies, throughput, roofline, memory."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean


def percentile(values: Sequence[float], percent: float) -> float:
    """The `percent`-th percentile, linear between the two nearest order statistics.

    Sorted values v[0] to v[n - 1] stand at 0 % to 100 % in equal steps, as in numpy's default
    method (Hyndman and Fan 1996, definition 7): the 90th of [1, 2, 3] stands at index 1.8 and
    is 2.8. ValueError without values or outside [0, 100].
    """
    if not values:
        raise ValueError("a percentile needs at least one value")
    if not 0 <= percent <= 100:
        raise ValueError(f"a percentile must be asked for in [0, 100], got {percent}")
    ordered = sorted(values)
    position = percent / 100 * (len(ordered) - 1)
    below = math.floor(position)
    above = math.ceil(position)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def summarise(values: Iterable[float]) -> dict[str, float | None]:
    """p50, p90, p99 and mean; all None when there is nothing to summarise."""
    values = list(values)
    if not values:
        return {"p50": None, "p90": None, "p99": None, "mean": None}
    summary: dict[str, float | None] = {
        f"p{percent}": percentile(values, percent) for percent in (50, 90, 99)
    }
    return {**summary, "mean": fmean(values)}


@dataclass(frozen=True)
class RequestTimes:
    """When one request arrived and when each of its tokens was there, in seconds of one clock."""

    arrival_s: float
    token_times_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.token_times_s:
            raise ValueError("a request without output tokens has no latencies")

    @property
    def ttft_s(self) -> float:
        """Time to first token: from arrival, so waiting counts."""
        return self.token_times_s[0] - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        num_gaps = len(self.token_times_s) - 1
        return (self.token_times_s[-1] - self.token_times_s[0]) / num_gaps if num_gaps else None

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Inter-token latencies: each gap between two tokens."""
        return tuple(after - before for before, after in pairwise(self.token_times_s))

    @property
    def e2e_s(self) -> float:
        """End to end: from arrival to the last token."""
        return self.token_times_s[-1] - self.arrival_s


def latency_summary(requests: Sequence[RequestTimes]) -> dict[str, dict[str, float | None]]:
    """`summarise` of TTFT, TPOT and E2E over requests, and of ITL over all gaps of all requests."""
    return {
        "ttft_s": summarise(request.ttft_s for request in requests),
        "tpot_s": summarise(r.tpot_s for r in requests if r.tpot_s is not None),
        "itl_s": summarise(gap for request in requests for gap in request.itl_s),
        "e2e_s": summarise(request.e2e_s for request in requests),
    }


def throughput(
    *, num_requests: int, num_input_tokens: int, num_output_tokens: int, duration_s: float
) -> dict[str, float]:
    """Output tokens, all tokens and requests per second of a run of `duration_s` seconds."""
    if duration_s <= 0:
        raise ValueError(f"throughput needs a duration above 0 s, got {duration_s}")
    return {
        "output_tokens_per_s": num_output_tokens / duration_s,
        "total_tokens_per_s": (num_input_tokens + num_output_tokens) / duration_s,
        "requests_per_s": num_requests / duration_s,
    }


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What one step must compute and move whatever the implementation."""

    num_tokens: int
    """Tokens that go through the model."""
    num_logits_rows: int
    """Tokens that are projected to the vocabulary: one per request that gets a token."""
    num_cached_tokens_read: int
    """Tokens computed in earlier steps that this step's queries attend to, over all requests."""
    num_attention_pairs: int
    """Pairs of a query and a key it may see, over all requests."""


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Bytes and floating point operations of a model: its lower bound on any device.

    Every weight and every cached key and value that a step needs is read once, and every new
    one is written once; activations are free. Weights cost 2 FLOPs per token and parameter.
    """

    num_layer_parameters: int
    """All but the embedding table and the output projection."""
    num_logits_parameters: int
    """Of the output projection (vocab_size · hidden_size), tied or not."""
    weight_bytes_read: int
    """Per step; an embedding table that is not tied is only looked up and does not count."""
    kv_bytes_per_token: int
    attention_flops_per_pair: int
    """4 · layers · heads · head_dim: one multiply-add each for the score and for the value."""

    def step_bytes(self, work: StepWork) -> int:
        num_kv_tokens = work.num_cached_tokens_read + work.num_tokens
        return self.weight_bytes_read + self.kv_bytes_per_token * num_kv_tokens

    def step_flops(self, work: StepWork) -> int:
        linear = self.num_layer_parameters * work.num_tokens
        logits = self.num_logits_parameters * work.num_logits_rows
        attention = self.attention_flops_per_pair * work.num_attention_pairs
        return 2 * (linear + logits) + attention


def roofline_fraction(
    cost: ModelCost,
    steps: Iterable[StepWork],
    *,
    duration_s: float,
    copy_bytes_per_s: float,
    matmul_flops_per_s: float,
) -> float:
    """Share of `duration_s` that the device's measured ceilings would have needed.

    Sum over steps of max(bytes / bandwidth, FLOPs / peak), over the duration.
    """
    if min(duration_s, copy_bytes_per_s, matmul_flops_per_s) <= 0:
        raise ValueError(
            f"roofline needs a duration and ceilings above 0, got {duration_s} s, "
            f"{copy_bytes_per_s} bytes/s, {matmul_flops_per_s} FLOP/s"
        )
    floor_s = sum(
        max(cost.step_bytes(step) / copy_bytes_per_s, cost.step_flops(step) / matmul_flops_per_s)
        for step in steps
    )
    return floor_s / duration_s


def kv_utilisation(live: Sequence[int], reserved: Sequence[int]) -> float | None:
    """Mean over steps of live / reserved KV tokens; None if no step reserved any."""
    ratios = [used / room for used, room in zip(live, reserved, strict=True) if room]
    return fmean(ratios) if ratios else None


def device_memory_parts(
    *, total: int | None, weights: int, kv_reserved: int, kv_live: int
) -> dict[str, int | None]:
    """Peak memory of a device in bytes; what is neither weights nor KV cache is activations.

    Where nobody can tell the total, there is none, and no activations.
    """
    return {
        "total": total,
        "weights": weights,
        "kv_reserved": kv_reserved,
        "kv_live": kv_live,
        "activations": None if total is None else total - weights - kv_reserved,
    }


def host_memory_parts(
    *, total: int | None, weights: int, kv_reserved: int, kv_live: int
) -> dict[str, int | None]:
    """As `device_memory_parts`, for a process on the CPU.

    `total` holds the interpreter and libraries too, so activations cannot be told from it
    and are None.
    """
    parts = device_memory_parts(
        total=total, weights=weights, kv_reserved=kv_reserved, kv_live=kv_live
    )
    return {**parts, "activations": None}
