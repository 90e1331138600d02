"""One sentence on what a stage is worth against the one before it, made of nothing but the runs."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from . import formatting as fmt
from .results import Result, lookup


class Better(Enum):
    HIGHER = "higher"
    LOWER = "lower"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that can decide, and how it is spoken of."""

    phrase: str
    better: Better
    read: Callable[[Result], float | None]
    shown: Callable[[float], str]
    more: str
    """After a factor above 1: `3.0x as many`, `2.0x longer`."""
    less: str
    """The same where the value is smaller; of a metric that is better when higher, `more` again."""


def metrics() -> dict[str, Metric]:
    """Every metric that a stage may declare, by its name: mostly a path in a result."""
    rates = {"output_tokens_per_s": "output tokens per second"}
    times = {
        "ttft_s.p50": "median time to first token",
        "ttft_s.p99": "p99 time to first token",
        "tpot_s.p50": "median time per output token",
        "itl_s.p99": "p99 gap between tokens",
        "e2e_s.p50": "median time to the last token",
        "late_ttft_s.p50": "time to first token of the late prompt",
        "decoder_itl_beside_late_s.p99": "p99 gap between tokens beside the late prompt",
        "decoder_itl_beside_late_s.max": "worst gap between tokens beside the late prompt",
    }
    return {
        **{path: _rate(path, phrase) for path, phrase in rates.items()},
        **{path: _time(path, phrase) for path, phrase in times.items()},
        "peak_memory_bytes.total": Metric(
            phrase="peak memory", better=Better.LOWER, more="more", less="less",
            read=lambda run: lookup(run, "peak_memory_bytes.total"), shown=fmt.num_bytes,
        ),
        "requests_at_once": Metric(
            phrase="requests at once", better=Better.HIGHER, more="as many", less="as many",
            read=lambda run: max(lookup(run, "steps.num_running") or [0]), shown="{:,.6g}".format,
        ),
    }  # fmt: skip


def _rate(path: str, phrase: str) -> Metric:
    return Metric(
        phrase=phrase, better=Better.HIGHER, more="as many", less="as many",
        read=lambda run: lookup(run, path), shown=fmt.number,
    )  # fmt: skip


def _time(path: str, phrase: str) -> Metric:
    return Metric(
        phrase=phrase, better=Better.LOWER, more="longer", less="shorter",
        read=lambda run: lookup(run, path), shown=fmt.seconds,
    )  # fmt: skip


def find_metrics(names: Sequence[str]) -> list[Metric]:
    """ValueError names the first that there is not."""
    known = metrics()
    for name in names:
        if name not in known:
            raise ValueError(f"no metric called {name!r} can decide; there are: {', '.join(known)}")
    return [known[name] for name in names]


def verdict(names: Sequence[str], runs: Sequence[Result], previous: Sequence[Result]) -> str:
    """Whether a stage is better than the one before it by the first of the metrics `names`.

    Medians of the runs are compared. Where one lies in the range of the other stage's runs, the
    sentence claims no difference; a stage that is worse is called worse. The other metrics are
    only told.
    """
    first, *others = find_metrics(names)
    stage, other = runs[0]["stage"], previous[0]["stage"]
    mine, theirs = _values(first, runs), _values(first, previous)
    if not mine or not theirs:
        without = stage if not mine else other
        return f"No verdict: the runs of {without} have no {first.phrase}."
    told = [_told(metric, _values(metric, runs), _values(metric, previous))
            for metric in (first, *others)]  # fmt: skip
    details = "; ".join(text for text in told if text is not None)
    fewest = min(len(mine), len(theirs))
    basis = "one run each" if fewest == 1 else f"medians of {fewest} runs each"
    return f"{_opening(first, stage, mine, other, theirs)}: {details} ({basis})."


def _values(metric: Metric, runs: Sequence[Result]) -> list[float]:
    return [value for value in map(metric.read, runs) if value is not None]


def _opening(
    metric: Metric, stage: str, mine: Sequence[float], other: str, theirs: Sequence[float]
) -> str:
    value, base = statistics.median(mine), statistics.median(theirs)
    if min(theirs) <= value <= max(theirs) or min(mine) <= base <= max(mine):
        return f"{stage} and {other} cannot be told apart here, so much do runs of one stage differ"
    is_higher = value > base
    is_better = is_higher is (metric.better is Better.HIGHER)
    return f"{stage} is {'better' if is_better else 'worse'} than {other} here"


def _told(metric: Metric, mine: Sequence[float], theirs: Sequence[float]) -> str | None:
    """`output tokens per second 40.1 against 20.0, 2.00x as many`."""
    if not mine or not theirs:
        return None
    value, base = statistics.median(mine), statistics.median(theirs)
    text = f"{metric.phrase} {metric.shown(value)} against {metric.shown(base)}"
    if value <= 0 or base <= 0:
        return text
    is_time_saved = metric.better is Better.LOWER and value < base
    factor = base / value if is_time_saved else value / base
    return f"{text}, {fmt.factor(factor)} {metric.less if value < base else metric.more}"
