"""How every chart looks: one colour per stage, the fonts, the title, the footer, the scales."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..formatting import TIME_UNITS
from ..results import Result, lookup
from ..stages import stage_label
from ..table import setting_line

STAGE_COLOURS = {
    "m1": "#E69F00",
    "m2": "#0072B2",
    "m3": "#009E73",
    "m4": "#D55E00",
    "m5": "#56B4E9",
    "m6": "#CC79A7",
    "m7": "#B8A800",
}
"""Okabe and Ito's colour-blind safe palette (the yellow darkened to be seen on white)."""
PEER_COLOURS = {"hf": "#9A9A9A", "vllm": "#4D4D4D", "nano_vllm": "#737373"}
"""Peers are greys: they are the yardstick, not the ladder."""
NOT_NEEDED = "KV cache, not needed"
MEMORY_COLOURS = {
    "weights": "#5D6D7E",
    "KV cache, holding tokens": "#117733",
    "KV cache, reserved and empty": "#A9DFBF",
    "activations": "#CC6677",
    "rest of the process": "#D5D8DC",
    NOT_NEEDED: "#EEF3F0",
}
INK = "#222222"
SOFT_INK = "#666666"
LOG_SCALE_FROM = 15.0
"""Largest over smallest value from which a linear axis would hide the smallest."""
DPI = 150
FOOTER_COLUMNS = 145
"""Characters of the small print that fit into a line."""


def stage_colour(name: str) -> str:
    return STAGE_COLOURS.get(name[:2]) or PEER_COLOURS.get(name, "#B0B0B0")


def labels(results: Sequence[Result]) -> list[str]:
    """Stage names in words; a stage that ran a prefix of the workload says so."""
    most = max(result["workload"]["num_requests"] for result in results)
    named = []
    for result in results:
        num_requests = result["workload"]["num_requests"]
        cut = f"\n(first {num_requests} of {most})" if num_requests < most else ""
        named.append(stage_label(result["stage"]) + cut)
    return named


def new_figure(height: float, title: str, subtitle: str, results: Sequence[Result]) -> Figure:
    """A figure of 10 inches width with title, subtitle and footer; `height` is in inches."""
    figure = Figure(figsize=(10.0, height), dpi=DPI, facecolor="white")
    figure.text(0.02, 1 - 0.16 / height, title, size=14, weight="bold", color=INK, va="top")
    figure.text(0.02, 1 - 0.48 / height, subtitle, size=10, color=SOFT_INK, va="top")
    for line, text in enumerate(reversed(_footer(results))):
        where = (0.08 + 0.155 * line) / height
        figure.text(0.02, where, text, size=7.5, color=SOFT_INK, va="bottom")
    return figure


def plot_area(figure: Figure, left: float, right: float = 0.98) -> dict[str, float]:
    """Margins for `subplots_adjust` that leave room for title and footer, whatever the height."""
    height = figure.get_figheight()
    return {"left": left, "right": right, "top": 1 - 0.88 / height, "bottom": 0.98 / height}


def _footer(results: Sequence[Result]) -> list[str]:
    longest = max(results, key=lambda result: result["workload"]["num_requests"])
    parts = []
    for key in ("torch", "triton", "transformers", "commit"):
        value = lookup(longest, f"environment.{key}")
        if value is not None:
            text = str(value)[:10] if key == "commit" else str(value)
            dirty = lookup(longest, "environment.dirty") is True and key == "commit"
            parts.append(f"{key} {text}{' (modified)' if dirty else ''}")
    repeats = longest.get("repeats", 1)
    parts.insert(
        0,
        f"medians of {repeats} runs (steps and single requests: of the median run)"
        if repeats > 1
        else "one run",
    )
    setting = textwrap.wrap(setting_line(longest), FOOTER_COLUMNS, break_on_hyphens=False)
    return [*setting, ", ".join(parts)]


def plain_axes(axes: Axes, x_label: str, y_label: str = "") -> None:
    """Left and bottom lines only, light grid, labels with units."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_xlabel(x_label, size=9.5, color=INK)
    axes.set_ylabel(y_label, size=9.5, color=INK)
    axes.set_axisbelow(True)


def needs_log(values: Sequence[float]) -> bool:
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) / min(positive) >= LOG_SCALE_FROM


def scale_x(axes: Axes, values: Sequence[float], text_share: float) -> bool:
    """Set the scale and the limits of the value axis of a bar chart; True if it is logarithmic.

    The longest bar leaves `text_share` of the axis free for the text at its end.
    """
    positive = [value for value in values if value > 0] or [1.0]
    if not needs_log(values):
        axes.set_xlim(0, max(positive) / (1 - text_share))
        return False
    low, high = min(positive) / 3, max(positive)
    axes.set_xscale("log")
    axes.set_xlim(low, high * (high / low) ** (text_share / (1 - text_share)))
    return True


def number_ticks(axis: Axis) -> None:
    """Plain numbers at the ticks: 20, 1,000."""
    _few_log_ticks(axis)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def time_ticks(axis: Axis) -> str:
    """Put durations given in seconds at the ticks; returns the unit for the axis label.

    A linear axis gets one unit; on a logarithmic one every tick names its own, and the unit is
    "log scale".
    """
    if axis.get_scale() == "log":
        _few_log_ticks(axis)
        axis.set_major_formatter(FuncFormatter(lambda value, _: _time_tick(value)))
        return "log scale"
    largest = max(abs(limit) for limit in axis.get_view_interval())
    size, unit = next((u for u in TIME_UNITS if largest >= u[0]), TIME_UNITS[-1])
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / size:,.6g}"))
    return unit


def _time_tick(value: float) -> str:
    size, unit = next((u for u in TIME_UNITS if value >= u[0] * 0.999), TIME_UNITS[-1])
    return f"{value / size:,.6g} {unit}"


def _few_log_ticks(axis: Axis) -> None:
    """Label 1, 2, 5, 10, … on a short logarithmic axis and powers of ten on a long one."""
    if axis.get_scale() != "log":
        return
    low, high = axis.get_view_interval()
    short = math.log10(high / low) < 2.2
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if short else (1.0,)))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI)
    return file
