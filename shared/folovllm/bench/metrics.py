"""Definitions of everything that is reported: latencies, throughput, roofline, memory."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from ..model.cost import ModelCost, StepWork


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
