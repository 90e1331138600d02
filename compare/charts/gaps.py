"""How long decoding requests waited for each token, over time: what a late prompt costs them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from folovllm.bench.late_requests import late_indices, token_times

from .. import formatting as fmt
from ..results import Result, lookup
from ..stages import stage_label
from . import style

MAX_PANELS = 4
PANEL_INCHES = 1.45
FRAME_INCHES = 2.2
"""Title, legend, time axis and footer."""
LATE_COLOUR = "#AA3377"


@dataclass(frozen=True)
class _Gaps:
    """The gaps of all decoders of one run."""

    ends_s: NDArray[np.float64]
    """[num_gaps] when the token at the end of each gap was there."""
    lengths_s: NDArray[np.float64]
    """[num_gaps]"""


def has_gaps(result: Result) -> bool:
    """Whether it has late requests and says when every token was there."""
    requests = result["requests"]
    known = bool(lookup(result, "steps.start_s")) and all("token_steps" in r for r in requests)
    return known and bool(_late_requests(result))


def token_gaps(results: Sequence[Result]) -> Figure:
    """A panel per stage: every gap of every decoder over time, on one time axis and one scale."""
    shown = [result for result in results if has_gaps(result)][-MAX_PANELS:]
    gaps = [_decoder_gaps(result) for result in shown]
    lengths = np.concatenate([run.lengths_s for run in gaps])
    log = style.needs_log(lengths.tolist())
    height = FRAME_INCHES + PANEL_INCHES * len(shown)
    subtitle = (
        "Every gap between two tokens of a request that decodes: a line as long as the gap, "
        "its end the token"
    )
    figure = style.new_figure(height, _title(shown), subtitle, shown)
    area = style.plot_area(figure, 0.085) | {"top": 1 - 1.15 / height, "hspace": 0.32}
    grid = figure.subplots(
        len(shown), 1, squeeze=False, sharex=True, sharey=True, gridspec_kw=area
    )[:, 0]  # fmt: skip
    for axes, result, run in zip(grid, shown, gaps, strict=True):
        axes.set_yscale("log" if log else "linear")
        _panel(axes, result, run)
    grid[0].set_xlim(0, max(float(result["duration_s"]) for result in shown) * 1.01)
    if not log:
        grid[0].set_ylim(0, float(lengths.max(initial=1e-9)) * 1.1)
    for axes in grid:
        style.plain_axes(axes, "", f"gap, {style.time_ticks(axes.yaxis)}")
    grid[-1].set_xlabel("time since the start, s", size=9.5)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="upper left", bbox_to_anchor=(0.075, 1 - 0.66 / height), ncols=3,
        frameon=False, fontsize=9,
    )  # fmt: skip
    return figure


def _panel(axes: Axes, result: Result, run: _Gaps) -> None:
    colour = style.stage_colour(result["stage"])
    axes.plot(run.ends_s, run.lengths_s, "o", ms=3.5, mew=0, color=colour)
    axes.hlines(run.lengths_s, run.ends_s - run.lengths_s, run.ends_s, color=colour, lw=1.2)
    for number, request in enumerate(_late_requests(result)):
        arrival, first = request["arrival_s"], request["first_token_s"]
        named = number == 0
        axes.axvspan(arrival, first, color=LATE_COLOUR, alpha=0.12, lw=0)
        axes.axvline(
            arrival, color=LATE_COLOUR, lw=1.3, label="the late prompt arrives" if named else None
        )
        axes.axvline(
            first, color=LATE_COLOUR, lw=1.3, ls=(0, (3, 2)),
            label="its first token" if named else None,
        )  # fmt: skip
    axes.set_title(_panel_title(result), size=10, loc="left", color=style.INK)


def _panel_title(result: Result) -> str:
    worst = lookup(result, "decoder_itl_beside_late_s.max")
    ttft = lookup(result, "late_ttft_s.p50")
    worst_text = "nobody decoded beside it" if worst is None else f"worst gap {fmt.seconds(worst)}"
    return f"{stage_label(result['stage'])}: {worst_text}, late prompt's TTFT {fmt.seconds(ttft)}"


def _title(shown: Sequence[Result]) -> str:
    return "What a late prompt does to those who decode" + (
        f": {stage_label(shown[0]['stage'])}" if len(shown) == 1 else ""
    )


def _late_requests(result: Result) -> list[Mapping[str, Any]]:
    requests = result["requests"]
    if any(request.get("follows") for request in requests):
        return []
    return [requests[i] for i in late_indices([r["arrival_s"] for r in requests])]


def _decoder_gaps(result: Result) -> _Gaps:
    late = {request["request_id"] for request in _late_requests(result)}
    times = [token_times(result, r) for r in result["requests"] if r["request_id"] not in late]
    return _Gaps(
        ends_s=np.concatenate([t[1:] for t in times]),
        lengths_s=np.concatenate([np.diff(t) for t in times]),
    )
