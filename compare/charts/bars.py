"""Bar charts: throughput ladder, TTFT and TPOT, memory split."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke

from .. import formatting as fmt
from ..columns import Row, make_rows
from ..kv_need import kv_tokens_needed
from ..results import Result, lookup
from ..stages import is_ladder_stage, stage_label
from . import style

BAR_HEIGHT_INCHES = 0.62
FRAME_INCHES = 2.15
"""Title, axis and footer: what a figure needs beside its bars."""


_WORTH_TELLING = 0.01
"""Part of the memory below which it is not told apart."""


def throughput(results: Sequence[Result]) -> Figure:
    """Output tokens per second of every stage, with its factors and the spread of the repeats."""
    rows = make_rows(results)
    rates = [float(lookup(row.result, "output_tokens_per_s") or 0.0) for row in rows]
    height = FRAME_INCHES + BAR_HEIGHT_INCHES * len(rows)
    log = style.needs_log(rates)
    subtitle = "Output tokens per second, higher is better; the thin line is the spread of repeats"
    figure = style.new_figure(
        height, _throughput_title(rows), subtitle + ("; logarithmic axis" if log else ""), results
    )
    axes = figure.subplots(gridspec_kw=style.plot_area(figure, 0.17))
    _bars(axes, results, rates)
    for place, row in enumerate(rows):
        low = lookup(row.result, "spread.output_tokens_per_s.min")
        high = lookup(row.result, "spread.output_tokens_per_s.max")
        if low is not None and high is not None:
            halo = [Stroke(linewidth=3.2, foreground="white"), Normal()]
            axes.plot([low, high], [place, place], color=style.INK, lw=1.5, path_effects=halo)
    ends = [
        max(rate, lookup(row.result, "spread.output_tokens_per_s.max") or 0.0)
        for rate, row in zip(rates, rows, strict=True)
    ]
    style.scale_x(axes, ends, text_share=0.34)
    style.number_ticks(axes.xaxis)
    texts = [_rate_text(row, rate) for row, rate in zip(rows, rates, strict=True)]
    _annotate(axes, ends, texts)
    style.plain_axes(axes, "output tokens per second" + (" (log scale)" if log else ""))
    return figure


def _throughput_title(rows: Sequence[Row]) -> str:
    ladder = [row for row in rows if is_ladder_stage(row.result["stage"])]
    best = ladder[-1] if ladder else None
    if best is None or best.speedup_over_first is None or len(ladder) < 2:
        return "Throughput"
    first, last = ladder[0].result["stage"], best.result["stage"]
    times = fmt.factor(best.speedup_over_first)
    return f"{stage_label(last)} produces {times} the tokens per second of {stage_label(first)}"


def _rate_text(row: Row, rate: float) -> str:
    text = f"{fmt.number(rate)} tok/s"
    if row.speedup_over_first is not None and row.speedup_over_first != 1.0:
        text += f"   {fmt.factor(row.speedup_over_first)} M1"
        previous = row.speedup_over_previous
        if previous is not None and previous != row.speedup_over_first:
            text += f", {fmt.factor(previous)} previous"
    return text


def latency(results: Sequence[Result]) -> Figure:
    """TTFT and TPOT side by side, p50 and p99."""
    height = FRAME_INCHES + BAR_HEIGHT_INCHES * 1.25 * len(results)
    title = "How long until the first token, and between tokens after it"
    subtitle = "Lower is better; full bar: median of requests (p50), pale bar: slowest 1 % (p99)"
    figure = style.new_figure(height, title, subtitle, results)
    area = style.plot_area(figure, 0.17) | {"wspace": 0.1}
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw=area)
    _latency_panel(left, results, "ttft_s", "time to first token (TTFT)")
    _latency_panel(right, results, "tpot_s", "time per output token (TPOT)")
    right.tick_params(left=False)
    return figure


def _latency_panel(axes: Axes, results: Sequence[Result], metric: str, name: str) -> None:
    places = range(len(results))
    p50 = [float(lookup(result, f"{metric}.p50") or 0.0) for result in results]
    p99 = [float(lookup(result, f"{metric}.p99") or 0.0) for result in results]
    colours = [style.stage_colour(result["stage"]) for result in results]
    style.scale_x(axes, [*p50, *p99], text_share=0.24)
    for values, offset, alpha, what in ((p50, -0.2, 1.0, "p50"), (p99, 0.2, 0.4, "p99")):
        axes.barh([place + offset for place in places], values, 0.38, color=colours, alpha=alpha)
        texts = [f"{what} {fmt.seconds(value)}" if value else "–" for value in values]
        _annotate(axes, values, texts, offset)
    axes.set_yticks(list(places), style.labels(results))
    axes.set_ylim(len(results) - 0.45, -0.55)
    style.plain_axes(axes, f"{name}, {style.time_ticks(axes.xaxis)}")


def memory(results: Sequence[Result]) -> Figure:
    """Peak memory of every stage, split by what it is used for."""
    height = FRAME_INCHES + 0.35 + BAR_HEIGHT_INCHES * len(results)
    on_cpu = all(lookup(r, "peak_memory_bytes.activations") is None for r in results)
    what = "peak resident memory of the process" if on_cpu else "peak allocated device memory"
    told = (
        ("holds tokens", "pale green is reserved for tokens and empty")
        if on_cpu
        else ("was needed", "green is what requests reserved at once, the pale end what they left")
    )
    figure = style.new_figure(
        height, f"Where the memory goes, and how much of the KV cache {told[0]}",
        f"The {what}; {told[1]}", results,
    )  # fmt: skip
    area = style.plot_area(figure, 0.17) | {"top": 1 - 1.3 / height}
    axes = figure.subplots(gridspec_kw=area)
    unit, unit_name = _memory_unit(results)
    ends = [0.0] * len(results)
    splits = [memory_parts(result) for result in results]
    for part, colour in style.MEMORY_COLOURS.items():
        sizes = [split.get(part, 0.0) / unit for split in splits]
        if any(sizes):
            axes.barh(range(len(results)), sizes, 0.6, left=ends, color=colour, label=part)
            ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    axes.set_xlim(0, max(ends, default=0.0) * 1.3 or 1.0)
    axes.set_yticks(range(len(results)), style.labels(results))
    axes.set_ylim(len(results) - 0.45, -0.55)
    _annotate(axes, ends, [_memory_text(split) for split in splits])
    style.number_ticks(axes.xaxis)
    style.plain_axes(axes, f"{what}, {unit_name}")
    if any(ends):
        axes.legend(
            loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=5, frameon=False, fontsize=8.5,
            handlelength=1.0, columnspacing=1.2, borderaxespad=0.2,
        )  # fmt: skip
    return figure


def memory_parts(result: Result) -> dict[str, float]:
    """Bytes by use, in the order they are stacked; they add up to the peak where that is known.

    On a CPU the peak is the whole process, whose rest (interpreter, libraries, activations) is
    one part. Weights mapped from a file need not be resident, so that rest can be smaller than
    nothing; it is then left out, and the parts add up to more than the peak.
    """
    sizes = {
        key: float(lookup(result, f"peak_memory_bytes.{key}") or 0.0)
        for key in ("total", "weights", "kv_reserved", "kv_live", "activations")
    }
    needed = _kv_bytes_needed(result, sizes["kv_reserved"])
    parts = {
        "weights": sizes["weights"],
        "KV cache, holding tokens": sizes["kv_live"],
        "KV cache, reserved and empty": max(0.0, needed - sizes["kv_live"]),
        "activations": sizes["activations"],
        style.NOT_NEEDED: max(0.0, sizes["kv_reserved"] - needed),
    }
    rest = sizes["total"] - sum(parts.values())
    if lookup(result, "peak_memory_bytes.activations") is None and rest > 0:
        parts["rest of the process"] = rest
    return parts


def _kv_bytes_needed(result: Result, reserved: float) -> float:
    """What requests held of the KV cache at once; all of it where nothing better is known.

    On a CPU too: what is reserved there and never touched is no part of the peak.
    """
    on_cpu = lookup(result, "peak_memory_bytes.activations") is None
    tokens = None if on_cpu else kv_tokens_needed(result)
    if tokens is None:
        return reserved
    return min(reserved, float(tokens * result["model"]["kv_bytes_per_token"]))


def _memory_text(parts: Mapping[str, float]) -> str:
    """All of it, or what was needed of it where that is less."""
    whole, left = sum(parts.values()), parts[style.NOT_NEEDED]
    if not whole:
        return "–"
    if left < _WORTH_TELLING * whole:
        return fmt.num_bytes(whole)
    needed, _, unit = fmt.num_bytes(whole - left, whole).partition(" / ")
    return f"{needed} needed of {unit}"


def _memory_unit(results: Sequence[Result]) -> tuple[float, str]:
    """Size and name of the unit that suits the largest peak."""
    largest = max(sum(memory_parts(result).values()) for result in results)
    return next((unit for unit in fmt.BYTE_UNITS if largest >= unit[0]), fmt.BYTE_UNITS[-1])


def _bars(axes: Axes, results: Sequence[Result], values: Sequence[float]) -> None:
    colours = [style.stage_colour(result["stage"]) for result in results]
    axes.barh(range(len(results)), values, 0.6, color=colours)
    axes.set_yticks(range(len(results)), style.labels(results))
    axes.set_ylim(len(results) - 0.45, -0.55)


def _annotate(axes: Axes, ends: Sequence[float], texts: Sequence[str], offset: float = 0.0) -> None:
    """Write each text right of the end of its bar."""
    low = axes.get_xlim()[0]
    for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.annotate(
            text, (max(end, low), place + offset), xytext=(5, 0), textcoords="offset points",
            va="center", size=9, color=style.INK,
        )  # fmt: skip
