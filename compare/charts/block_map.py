"""Who held which block of the KV cache over time: paging, preemption and sharing as a picture."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TABLEAU_COLORS, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from folovllm.bench.block_map import CACHED, FREE, SHARED, BlockMap, unpack_block_map

from ..formatting import percent
from ..results import Result, lookup
from ..stages import stage_label
from . import style

OWNER_COLOURS = tuple(colour for name, colour in TABLEAU_COLORS.items() if name != "tab:gray")
"""Given to requests in turn; without the grey, which is nearly that of shared blocks."""
SHARED_COLOUR = "#222222"
CACHED_COLOUR = "#D9D9D9"
PREEMPTION_COLOUR = "#C00000"
HEIGHT = 6.2
MAX_ROWS = 600
"""Blocks in the picture: about one per pixel."""
MAX_LINES = 12
MAX_NAMES = 40
"""More lines at preemptions, or more names of requests, would cover the picture."""


def has_block_map(result: Result) -> bool:
    return lookup(result, "block_map.owners") is not None and bool(lookup(result, "steps.start_s"))


def block_map(result: Result) -> Figure:
    """One stage, which has blocks: above how full the pool is, below who holds which block."""
    sampled = unpack_block_map(result["block_map"])
    thinning = -(-len(sampled.owners) // MAX_ROWS)
    owners = sampled.owners[::thinning]
    stride = sampled.block_stride * thinning
    figure = style.new_figure(HEIGHT, _title(result), _subtitle(sampled, stride), [result])
    area = style.plot_area(figure, 0.075) | {"top": 0.8, "hspace": 0.1, "height_ratios": [1, 3.4]}
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw=area)
    _fill_panel(upper, result)
    edges = _column_edges(result, sampled.steps)
    _owner_panel(lower, owners, edges, stride)
    preemptions = _preemption_times(result)
    for time in preemptions if len(preemptions) <= MAX_LINES else ():
        lower.axvline(time, color=PREEMPTION_COLOUR, lw=1.0, ls=(0, (3, 2)))
    _name_stays(lower, owners, edges, stride, sampled.request_ids)
    lower.set_xlim(0, edges[-1])
    style.plain_axes(lower, f"time since the start, {style.time_ticks(lower.xaxis)}", "block id")
    handles, names = upper.get_legend_handles_labels()
    handles.append(Patch(facecolor="white", edgecolor="#999999"))
    names.append("free (below)")
    if (owners == SHARED).any():
        handles.append(Patch(facecolor=SHARED_COLOUR))
        names.append("shared by several requests (below)")
    if (owners == CACHED).any():
        handles.append(Patch(facecolor=CACHED_COLOUR))
        names.append("cached, held by nobody (below)")
    figure.legend(
        handles, names, loc="upper left", bbox_to_anchor=(0.065, 1 - 0.7 / HEIGHT), ncols=5,
        frameon=False, fontsize=8.5, handlelength=1.2, columnspacing=1.3,
    )  # fmt: skip
    return figure


def _title(result: Result) -> str:
    blocks = result["kv_blocks"]
    most = max(result["steps"]["num_running"])
    return (
        f"{stage_label(result['stage'])}: {blocks['num_blocks']:,} blocks of "
        f"{blocks['block_size']} tokens, up to {most:,} requests at once"
    )


def _subtitle(sampled: BlockMap, stride: int) -> str:
    text = "Below, a row is a block and a colour the request that holds it"
    if len(sampled.request_ids) > len(OWNER_COLOURS):
        text += "; colours repeat"
    return text + (f"; one block in {stride} is shown" if stride > 1 else "")


def _column_edges(result: Result, steps: Sequence[int]) -> NDArray[np.float64]:
    """[num_samples + 1] s: a sample stands for the time from its step to the next one sampled."""
    starts = np.asarray(result["steps"]["start_s"], dtype=np.float64)
    end = starts[-1] + result["steps"]["duration_s"][-1]
    return np.append(starts[steps], end)


def _fill_panel(axes: Axes, result: Result) -> None:
    """Blocks in use, how many of them the tokens would fill, and when requests gave way."""
    steps, size = result["steps"], result["kv_blocks"]["block_size"]
    num_blocks = result["kv_blocks"]["num_blocks"]
    edges = _column_edges(result, range(len(steps["start_s"])))
    used = np.asarray(steps["num_used_blocks"])
    live = np.asarray(steps["num_kv_tokens_live"]) / size
    colours = style.MEMORY_COLOURS
    axes.stairs(
        used, edges, fill=True, color=colours["KV cache, reserved and empty"],
        label="blocks in use",
    )  # fmt: skip
    filled = percent(1 - result["kv_blocks"]["waste"])
    axes.stairs(
        live, edges, fill=True, color=colours["KV cache, holding tokens"],
        label=f"holding tokens ({filled} of their room)",
    )  # fmt: skip
    axes.axhline(num_blocks, color=style.SOFT_INK, lw=0.8, ls=":")
    times = _preemption_times(result)
    if times.size:
        axes.plot(
            times, [1.12 * num_blocks] * times.size, ls="", marker="v", ms=6,
            color=PREEMPTION_COLOUR, label="a request is preempted: it loses all blocks",
        )  # fmt: skip
    axes.set_ylim(0, 1.25 * num_blocks)
    axes.set_yticks([0, num_blocks], ["0", f"{num_blocks:,}"])
    style.plain_axes(axes, "", "blocks in use")


def _preemption_times(result: Result) -> NDArray[np.float64]:
    """Starts, in s, of the steps that preempted somebody."""
    steps = result["steps"]
    return np.asarray(steps["start_s"])[np.flatnonzero(steps["num_preemptions"])]


def _owner_panel(
    axes: Axes, owners: NDArray[np.int32], edges: NDArray[np.float64], stride: int
) -> None:
    """One coloured cell per block and sample. `stride`: ids between two rows."""
    in_turn = owners % len(OWNER_COLOURS)
    num_colours = len(OWNER_COLOURS)
    cells = np.select([owners == SHARED, owners == CACHED], [num_colours, num_colours + 1], in_turn)
    axes.pcolormesh(
        edges, (np.arange(len(owners) + 1) - 0.5) * stride,
        np.ma.masked_where(owners == FREE, cells),
        cmap=ListedColormap([*OWNER_COLOURS, SHARED_COLOUR, CACHED_COLOUR]), vmin=-0.5,
        vmax=num_colours + 1.5, rasterized=True,
    )  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if len(owners) <= MAX_ROWS // 10:
        for row in range(1, len(owners)):
            axes.axhline((row - 0.5) * stride, color="white", lw=0.8)


def _name_stays(
    axes: Axes,
    owners: NDArray[np.int32],
    edges: NDArray[np.float64],
    stride: int,
    request_ids: Sequence[str],
) -> None:
    """Write each request's id into its blocks, once per stay on the device."""
    places = []
    for index, name in enumerate(request_ids):
        stays = _runs(np.flatnonzero((owners == index).any(axis=0)))
        for number, columns in enumerate(stays):
            middle = columns[len(columns) // 2]
            rows = max(_runs(np.flatnonzero(owners[:, middle] == index)), key=len)
            time = (edges[columns[0]] + edges[columns[-1] + 1]) / 2
            text = f"{name} again" if number else name
            places.append((time, (rows[0] + rows[-1]) / 2 * stride, text))
    if len(places) > MAX_NAMES:
        return
    outline = [withStroke(linewidth=2.0, foreground=style.INK)]
    for time, row, text in places:
        axes.text(
            time, row, text, size=8.5, color="white", weight="bold", ha="center", va="center",
            path_effects=outline,
        )  # fmt: skip


def _runs(indices: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """[2, 3, 4, 7, 8] -> [2, 3, 4], [7, 8]."""
    return np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1) if indices.size else []
