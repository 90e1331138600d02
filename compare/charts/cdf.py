"""Which share of the requests was served within a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..results import Result
from ..stages import is_ladder_stage
from . import style

NAMES_PER_ROW = 4


def latency_cdf(results: Sequence[Result]) -> Figure:
    """Cumulative distributions of TTFT and of end-to-end latency over the requests of one run."""
    title = "Share of the requests served within a time"
    subtitle = "Further left is better; the dotted lines mark half and 99 % of the requests"
    num_rows = -(-len(results) // NAMES_PER_ROW)
    height = 4.8 + 0.2 * num_rows
    figure = style.new_figure(height, title, subtitle, results)
    above = 0.98 + 0.2 * num_rows
    area = style.plot_area(figure, 0.075) | {"top": 1 - above / height, "wspace": 0.08}
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw=area)
    _panel(left, results, "time to first token", lambda r: r["first_token_s"] - r["arrival_s"])
    _panel(right, results, "arrival to last token", lambda r: r["last_token_s"] - r["arrival_s"])
    left.set_ylabel("share of the requests", size=9.5)
    handles, names = left.get_legend_handles_labels()
    figure.legend(
        handles, [name.replace("\n", " ") for name in names], loc="upper left", frameon=False,
        bbox_to_anchor=(0.06, 1 - 0.68 / height), ncols=NAMES_PER_ROW, fontsize=8.5,
        handlelength=1.6, columnspacing=1.4,
    )  # fmt: skip
    return figure


def _panel(
    axes: Axes,
    results: Sequence[Result],
    name: str,
    latency_of: Callable[[Mapping[str, Any]], float],
) -> None:
    every: list[float] = []
    for result, label in zip(results, style.labels(results), strict=True):
        times = np.sort([latency_of(request) for request in result["requests"]])
        if not times.size:
            continue
        every += times.tolist()
        shares = np.arange(times.size + 1) / times.size
        axes.step(
            np.concatenate([times[:1], times]), shares, where="post", label=label, lw=2,
            color=style.stage_colour(result["stage"]),
            ls="-" if is_ladder_stage(result["stage"]) else (0, (4, 1.5)),
        )  # fmt: skip
    for share in (0.5, 0.99):
        axes.axhline(share, color="#999999", lw=0.8, ls=":")
    if style.needs_log(every):
        axes.set_xscale("log")
        axes.set_xlim(min(time for time in every if time > 0) / 1.3, max(every) * 1.3)
    else:
        axes.set_xlim(0, max(every, default=1.0) * 1.04)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.set_ylim(0, 1.03)
    style.plain_axes(axes, f"{name}, {style.time_ticks(axes.xaxis)}")
