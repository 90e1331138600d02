"""What a cached prefix saves: time to first token over the part of the prompt that is cached."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..results import Result
from ..stages import is_ladder_stage
from . import style

_NOTHING_CACHED = "cold"
_CACHED = re.compile(r"hit ([0-9.]+)%")
"""Names of the groups of requests in the workload `prefix-hit`."""


def has_hits(result: Result) -> bool:
    """Whether requests of known, different cached parts were measured."""
    return len(_times_by_part(result)) > 1


def ttft_over_hit(results: Sequence[Result]) -> Figure:
    """Median TTFT of each cached part, one line per stage, and every request as a dot."""
    shown = [result for result in results if has_hits(result)]
    prompt_len = shown[0]["requests"][0]["num_prompt_tokens"]
    figure = style.new_figure(
        4.8,
        f"Time to first token of a prompt of {prompt_len:,} tokens whose beginning is cached",
        "Lower is better; a stage without a prefix cache computes every prompt whole",
        shown,
    )
    axes = figure.subplots(gridspec_kw=style.plot_area(figure, 0.075))
    for result, label in zip(shown, style.labels(shown), strict=True):
        times = _times_by_part(result)
        colour = style.stage_colour(result["stage"])
        axes.plot(
            list(times), [statistics.median(values) for values in times.values()],
            color=colour, lw=2, label=label.replace("\n", " "),
            ls="-" if is_ladder_stage(result["stage"]) else (0, (4, 1.5)),
        )  # fmt: skip
        for part, values in times.items():
            axes.plot([part] * len(values), values, "o", ms=3.5, color=colour, alpha=0.6)
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    style.plain_axes(
        axes, "cached part of the prompt", f"time to first token, {style.time_ticks(axes.yaxis)}"
    )
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    return figure


def _times_by_part(result: Result) -> dict[float, list[float]]:
    """Cached part of the prompt, 0 to 1 -> TTFT of the requests, seconds; in order."""
    times: dict[float, list[float]] = {}
    for request in result["requests"]:
        part = _cached_part(request)
        if part is not None:
            times.setdefault(part, []).append(request["first_token_s"] - request["arrival_s"])
    return dict(sorted(times.items()))


def _cached_part(request: Mapping[str, Any]) -> float | None:
    group = request.get("group") or ""
    if group == _NOTHING_CACHED:
        return 0.0
    found = _CACHED.fullmatch(group)
    return float(found[1]) / 100 if found else None
