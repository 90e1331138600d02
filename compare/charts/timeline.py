"""What every step of a stage worked on, over time: the picture of batching."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from ..results import Result, lookup
from ..stages import is_ladder_stage, stage_label
from . import style

MAX_PANELS = 4
TOKEN_FLOOR = 0.7
"""Bottom of the logarithmic token axis: one token is still a visible column."""
OWN_TIME_FROM = 6.0
"""Ratio of run lengths from which a common time axis would squeeze the shorter run."""


def has_steps(result: Result) -> bool:
    return bool(lookup(result, "steps.start_s"))


def timeline(results: Sequence[Result]) -> Figure:
    """Requests and tokens in each step, M1 beside the latest stages of the ladder."""
    shown = [r for r in results if is_ladder_stage(r["stage"]) and has_steps(r)]
    shown = shown or [r for r in results if has_steps(r)]
    shown = shown[:1] + shown[1:][-(MAX_PANELS - 1) :]
    ends = [_end(result) for result in shown]
    common_time = max(ends) / max(min(ends), 1e-9) < OWN_TIME_FROM
    subtitle = "Every step of one run, as wide as it took; above: requests, below: tokens"
    if not common_time:
        subtitle += "; mind the time axes, they differ"
    figure = style.new_figure(6.4, _title(shown), subtitle, shown)
    area = style.plot_area(figure, 0.075) | {"hspace": 0.16, "wspace": 0.08, "top": 0.765}
    grid = figure.subplots(
        2, len(shown), squeeze=False, sharex=("all" if common_time else "col"), sharey="row",
        gridspec_kw=area,
    )  # fmt: skip
    for column, result in enumerate(shown):
        upper, lower = grid[0, column], grid[1, column]
        _requests_panel(upper, result)
        _tokens_panel(lower, result)
        upper.set_title(_panel_title(result, shown), size=10.5, loc="left")
        for axes in (upper, lower):
            axes.set_xlim(0, max(ends) if common_time else ends[column])
            style.plain_axes(axes, "")
        lower.set_xlabel("time since the start, s", size=9.5)
    grid[0, 0].set_ylabel("requests", size=9.5)
    grid[1, 0].set_ylabel("tokens in the step (log scale)", size=9.5)
    grid[0, 0].set_ylim(0, _most(shown, "num_scheduled_requests", "num_waiting") * 1.06)
    grid[1, 0].set_ylim(TOKEN_FLOOR, _most(shown, "num_scheduled_tokens") * 1.5)
    handles, names = grid[0, -1].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="upper left", bbox_to_anchor=(0.065, 1 - 0.72 / 6.4), ncols=2,
        frameon=False, fontsize=9,
    )  # fmt: skip
    return figure


def _most(shown: Sequence[Result], *columns: str) -> float:
    return max(
        (float(np.max(result["steps"][name])) for result in shown for name in columns), default=1.0
    )


def _title(shown: Sequence[Result]) -> str:
    ends = shown if len(shown) == 1 else (shown[0], shown[-1])
    means = (f"{stage_label(result['stage'])} {_mean_batch(result):.3g}" for result in ends)
    return f"Requests per step, mean: {', '.join(means)}"


def _panel_title(result: Result, shown: Sequence[Result]) -> str:
    name = style.labels(shown)[shown.index(result)].replace("\n", " ")
    if len(shown) > 2:
        return name
    return f"{name}: {len(result['steps']['start_s']):,} steps"


def _mean_batch(result: Result) -> float:
    """Requests in a step, averaged over steps."""
    return float(np.mean(result["steps"]["num_scheduled_requests"]))


def _end(result: Result) -> float:
    steps = result["steps"]
    return float(steps["start_s"][-1] + steps["duration_s"][-1])


def _outline(result: Result, column: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A step function of one column of the steps, zero where no step runs.

    Returns times and values, each [4 * num_steps]: every step is a rectangle from its start to
    its end, so gaps between steps stay empty.
    """
    start = np.asarray(result["steps"]["start_s"], dtype=np.float64)
    end = start + np.asarray(result["steps"]["duration_s"], dtype=np.float64)
    value = np.asarray(result["steps"][column], dtype=np.float64)
    # Host time between steps is no idleness of the engine worth a white line: 2 % of a step.
    near = start[1:] - end[:-1] < 0.02 * (end[1:] - start[1:]) + 1e-3
    end[:-1] = np.where(near, start[1:], end[:-1])
    zero = np.zeros_like(value)
    times = np.stack([start, start, end, end], axis=1).reshape(-1)
    return times, np.stack([zero, value, value, zero], axis=1).reshape(-1)


def _requests_panel(axes: Axes, result: Result) -> None:
    times, scheduled = _outline(result, "num_scheduled_requests")
    colour = style.stage_colour(result["stage"])
    axes.fill_between(
        times, scheduled, facecolor=colour, edgecolor=colour, lw=0.3, label="in the step"
    )
    steps = result["steps"]
    axes.step(
        [*steps["start_s"], _end(result)], [*steps["num_waiting"], steps["num_waiting"][-1]],
        where="post", color=style.INK, lw=1.2, ls=(0, (4, 2)), label="waiting in the queue",
    )  # fmt: skip


def _tokens_panel(axes: Axes, result: Result) -> None:
    times, tokens = _outline(result, "num_scheduled_tokens")
    colour = style.stage_colour(result["stage"])
    axes.set_yscale("log")
    top = np.maximum(tokens, TOKEN_FLOOR)
    axes.fill_between(times, TOKEN_FLOOR, top, facecolor=colour, edgecolor=colour, lw=0.3)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
