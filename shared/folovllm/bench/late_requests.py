"""What a request that arrives while others decode costs them, and how long it waits itself."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .metrics import RequestTimes, summarise


def late_indices(arrivals_s: Sequence[float]) -> list[int]:
    """Which requests are late, from when each arrives; [] where the question makes no sense.

    A workload has late requests if most of its requests, the decoders, are there from its first
    moment and the others come later. Arrivals one by one (a Poisson process, a trace) have none:
    there everybody is late for some and early for others. The arrivals decide and not what an
    engine made of them, so that the same requests are late in every stage.
    """
    start_s = min(arrivals_s)
    late = [index for index, arrival_s in enumerate(arrivals_s) if arrival_s > start_s]
    return late if 2 * len(late) < len(arrivals_s) else []


def late_section(
    requests: Sequence[RequestTimes], step_starts_s: Sequence[float]
) -> dict[str, dict[str, float | None] | None]:
    """TTFT of the late requests, and the token gaps (ITL) of the decoders; None without late ones.

    late_ttft_s: over late requests. decoder_itl_s: over all gaps of all decoders.
    decoder_itl_beside_late_s: over their gaps while a late prompt is computed, which is from the
    first step that starts after its arrival to its first token. The numbers are None if nobody
    was decoding then. `step_starts_s` are in ascending order. Only for requests that the clock
    sends: one that follows another is not late.
    """
    late = late_indices([request.arrival_s for request in requests])
    if not late:
        return no_late_section()
    # The step that was running when it arrived knows nothing of it.
    starts = [step_starts_s[bisect_left(step_starts_s, requests[i].arrival_s)] for i in late]
    windows = [(start, requests[i].token_times_s[0]) for start, i in zip(starts, late, strict=True)]
    gaps = [
        (before, after)
        for index, request in enumerate(requests)
        if index not in late
        for before, after in pairwise(request.token_times_s)
    ]
    beside = [
        (before, after)
        for before, after in gaps
        if any(before < end and after > start for start, end in windows)
    ]
    return {
        "late_ttft_s": _with_worst([requests[i].ttft_s for i in late]),
        "decoder_itl_s": _with_worst([after - before for before, after in gaps]),
        "decoder_itl_beside_late_s": _with_worst([after - before for before, after in beside]),
    }


def no_late_section() -> dict[str, dict[str, float | None] | None]:
    """What a workload without late requests has in the place of `late_section`."""
    return dict.fromkeys(("late_ttft_s", "decoder_itl_s", "decoder_itl_beside_late_s"))


def step_ranges(steps: Sequence[int]) -> list[list[int]]:
    """The step of every token as first and last of each run of consecutive ones.

    [4, 5, 6, 9, 9] -> [[4, 6], [9, 9], [9, 9]]: a request that gets a token in every step needs
    one pair, however long its output is. `token_times` turns them back into times.
    """
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    return ranges


def token_times(result: Mapping[str, Any], request: Mapping[str, Any]) -> NDArray[np.float64]:
    """When each token of a request was there, from a stored result and one of its requests.

    [num_output_tokens] seconds since the start: the ends of the steps that gave them.
    """
    columns = result["steps"]
    steps = [step for first, last in request["token_steps"] for step in range(first, last + 1)]
    starts, durations = (np.asarray(columns[name])[steps] for name in ("start_s", "duration_s"))
    return np.asarray(starts + durations, dtype=np.float64)


def _with_worst(values: Sequence[float]) -> dict[str, float | None]:
    return {**summarise(values), "max": max(values, default=None)}
