"""Which charts there are, and how they become files."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from ..results import Result
from . import style
from .bars import latency, memory, throughput
from .block_map import block_map, has_block_map
from .cdf import latency_cdf
from .gaps import has_gaps, token_gaps
from .hits import has_hits, ttft_over_hit
from .timeline import has_steps, timeline

Chart = Callable[[Sequence[Result]], Figure]
ALWAYS: dict[str, Chart] = {
    "throughput": throughput,
    "latency": latency,
    "memory": memory,
    "latency-cdf": latency_cdf,
}


def draw_all(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw every chart of one device and workload into `folder` as PNG; returns the files.

    `results` are in ladder order; the timeline needs at least one with steps, the token gaps one
    with late requests, the TTFT over the hit one with prompts of which parts are cached. Every
    stage whose cache is cut into blocks gets a block map of its own.
    """
    if not results:
        raise ValueError("no results to draw; run `python -m compare run` first")
    charts = charts_of(results)
    return [style.save(chart(results), folder / f"{name}.png") for name, chart in charts.items()]


def draw_chart(name: str, results: Sequence[Result], folder: Path) -> Path:
    """Draw one chart; ValueError says which these results have if it is none of them."""
    charts = charts_of(results)
    if name not in charts:
        raise ValueError(f"no chart called {name!r} of these results; there are: "
                         f"{', '.join(charts)}")  # fmt: skip
    return style.save(charts[name](results), folder / f"{name}.png")


def charts_of(results: Sequence[Result]) -> dict[str, Chart]:
    """The charts that these results have, by the name of their files."""
    charts = dict(ALWAYS)
    if any(has_steps(result) for result in results):
        charts["timeline"] = timeline
    if any(has_gaps(result) for result in results):
        charts["token-gaps"] = token_gaps
    if any(has_hits(result) for result in results):
        charts["ttft-over-hit"] = ttft_over_hit
    for result in filter(has_block_map, results):
        charts[f"block-map-{result['stage']}"] = partial(_block_map_of, result)
    return charts


def _block_map_of(result: Result, results: Sequence[Result]) -> Figure:
    """A chart of one stage alone."""
    return block_map(result)
