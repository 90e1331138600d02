"""Which charts there are, and how they become files."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..results import Result
from . import style
from .bars import latency, memory, throughput
from .cdf import latency_cdf
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

    `results` are in ladder order; the timeline needs at least one with steps.
    """
    if not results:
        raise ValueError("no results to draw; run `python -m compare run` first")
    charts = dict(ALWAYS)
    if any(has_steps(result) for result in results):
        charts["timeline"] = timeline
    return [style.save(chart(results), folder / f"{name}.png") for name, chart in charts.items()]
