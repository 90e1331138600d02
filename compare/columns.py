"""Rows and columns of the comparison, from result files only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import formatting as fmt
from .kv_need import memory_needed_bytes
from .perplexities import KEY, shown_in
from .results import Result, lookup
from .stages import is_ladder_stage

PREFIX_MARK = "†"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stage in the table, with what its factors are relative to."""

    result: Result
    speedup_over_first: float | None
    """Output tokens/s over those of M1; None without M1."""
    speedup_over_previous: float | None
    """Over the stage before it on the ladder; None for M1, peers, and without one."""
    ran_prefix: bool
    """It answered fewer requests than the other rows."""

    @property
    def name(self) -> str:
        return self.result["stage"] + (PREFIX_MARK if self.ran_prefix else "")


@dataclass(frozen=True)
class Column:
    heading: str
    meaning: str
    """The definition, for the report."""
    cell: Callable[[Row], str]


def make_rows(results: Sequence[Result]) -> list[Row]:
    """One row per result; `results` are in ladder order."""
    most = max((result["workload"]["num_requests"] for result in results), default=0)
    ladder = [result for result in results if is_ladder_stage(result["stage"])]
    first = ladder[0] if ladder and ladder[0]["stage"].startswith("m1_") else None
    rows = []
    for result in results:
        place = ladder.index(result) if result in ladder else 0
        previous = ladder[place - 1] if place else None
        rows.append(
            Row(
                result=result,
                speedup_over_first=_ratio(result, first),
                speedup_over_previous=_ratio(result, previous),
                ran_prefix=result["workload"]["num_requests"] < most,
            )
        )
    return rows


def _ratio(result: Result, base: Result | None) -> float | None:
    rate = lookup(result, "output_tokens_per_s")
    base_rate = lookup(base, "output_tokens_per_s") if base is not None else None
    return rate / base_rate if rate and base_rate else None


def _value(row: Row, path: str) -> float | None:
    value = lookup(row.result, path)
    return float(value) if isinstance(value, int | float) else None


def _memory_split(row: Row) -> str:
    parts = ("weights", "kv_reserved", "kv_live", "activations")
    return fmt.num_bytes(*(_value(row, f"peak_memory_bytes.{part}") for part in parts))


def _spread(row: Row) -> str:
    low = _value(row, "spread.output_tokens_per_s.min")
    high = _value(row, "spread.output_tokens_per_s.max")
    if low is None or high is None:
        return fmt.MISSING
    return f"{fmt.number(low)}–{fmt.number(high)}"


COLUMNS = (
    Column("stage", "the engine; rows follow the ladder, peers come last", lambda row: row.name),
    Column(
        "output tok/s",
        "tokens produced per second of the whole run, prompts not counted",
        lambda row: fmt.number(_value(row, "output_tokens_per_s")),
    ),
    Column(
        "× M1",
        "output tok/s over those of m1_baseline",
        lambda row: fmt.factor(row.speedup_over_first),
    ),
    Column(
        "× previous",
        "output tok/s over those of the stage before",
        lambda row: fmt.factor(row.speedup_over_previous),
    ),
    Column(
        "TTFT p50 / p99",
        "time to first token: first token minus arrival, per request",
        lambda row: fmt.seconds(_value(row, "ttft_s.p50"), _value(row, "ttft_s.p99")),
    ),
    Column(
        "TPOT p50",
        "time per output token: (last − first token) / (output tokens − 1), per request",
        lambda row: fmt.seconds(_value(row, "tpot_s.p50")),
    ),
    Column(
        "ITL p99",
        "inter-token latency: every single gap between two tokens of a request",
        lambda row: fmt.seconds(_value(row, "itl_s.p99")),
    ),
    Column(
        "peak memory",
        "CUDA: most bytes allocated on the device; CPU: peak resident memory of the process",
        lambda row: fmt.num_bytes(_value(row, "peak_memory_bytes.total")),
    ),
    Column(
        "weights / KV reserved / KV live / activations",
        "parts of the peak; KV live is the part of KV reserved that holds tokens, at its largest",
        _memory_split,
    ),
    Column(
        "KV use",
        "tokens held over tokens reserved in the KV cache, mean over steps",
        lambda row: fmt.percent(_value(row, "kv_utilisation")),
    ),
    Column(
        "GPU use",
        "share of time in which a kernel ran, as NVML samples it",
        lambda row: fmt.percent(_value(row, "gpu_utilisation")),
    ),
    Column(
        "of roofline",
        "time that the bytes and FLOPs of every step need at measured ceilings, over time taken",
        lambda row: fmt.percent(_value(row, "roofline_fraction")),
    ),
    Column("spread", "smallest and largest output tok/s of the repeats", _spread),
)


SHORT_COLUMNS = (
    *COLUMNS[:2],
    Column(
        "TTFT p50",
        "time to first token: first token minus arrival, of the middle request",
        lambda row: fmt.seconds(_value(row, "ttft_s.p50")),
    ),
    Column(
        "memory",
        "weights, the KV cache that requests held at once, activations: what the run needed, which "
        "may be less than it was given; on a CPU the most that the process had in memory",
        lambda row: fmt.num_bytes(memory_needed_bytes(row.result)),
    ),
)
"""Of the table for those who see the stages for the first time."""


def _gaps(path: str) -> Callable[[Row], str]:
    """p50, p99 and worst of the token gaps at `path`."""
    return lambda row: fmt.seconds(*(_value(row, f"{path}.{end}") for end in ("p50", "p99", "max")))


LATE_COLUMNS = (
    COLUMNS[0],
    Column(
        "late TTFT p50",
        "first token minus arrival of the requests that arrive while the others (the decoders) run",
        lambda row: fmt.seconds(_value(row, "late_ttft_s.p50")),
    ),
    Column(
        "decoders' gap beside a late prompt p50 / p99 / worst",
        "gaps between tokens of the decoders into which a late request falls, from its arrival to "
        "its first token",
        _gaps("decoder_itl_beside_late_s"),
    ),
    Column(
        "decoders' gap, whole run p50 / p99 / worst",
        "every gap between two tokens of the decoders",
        _gaps("decoder_itl_s"),
    ),
)
"""Of a second table, for workloads in which requests arrive late."""


def has_late_requests(result: Result) -> bool:
    return lookup(result, "late_ttft_s") is not None


def group_columns(results: Sequence[Result]) -> tuple[Column, ...]:
    """One column per group of requests, as "cold" and "hit 90%"; none without groups."""
    found = [lookup(result, "ttft_by_group_s") or {} for result in results]
    groups = dict.fromkeys(group for summaries in found for group in summaries)
    return (COLUMNS[0], *map(_group_column, groups)) if groups else ()


def _group_column(group: str) -> Column:
    def cell(row: Row) -> str:
        summary = (lookup(row.result, "ttft_by_group_s") or {}).get(group, {})
        return fmt.seconds(summary.get("p50"), summary.get("p99"))

    meaning = f"time to first token of the requests that the workload calls {group!r}"
    return Column(f"TTFT {group} p50 / p99", meaning, cell)


def perplexity_columns(results: Sequence[Result]) -> tuple[Column, ...]:
    """One column per text on which the quality of a quantised model among these is known."""
    return tuple(map(_perplexity_column, shown_in(results)))


def _perplexity_column(name: str) -> Column:
    def cell(row: Row) -> str:
        return fmt.number(row.result.get(KEY, {}).get(name, {}).get("perplexity"))

    meaning = (
        "exp of the mean negative log-likelihood that the row's model gives a text: what "
        "quantising has cost; lower is better"
    )
    return Column(f"perplexity {name}", meaning, cell)


def tables_of(results: Sequence[Result]) -> list[tuple[Column, ...]]:
    """The columns of each table that these results have."""
    late = LATE_COLUMNS if any(map(has_late_requests, results)) else ()
    first = (*COLUMNS, *perplexity_columns(results))
    return [columns for columns in (first, late, group_columns(results)) if columns]


def table_cells(results: Sequence[Result], columns: Sequence[Column] = COLUMNS) -> list[list[str]]:
    """Heading and rows as text, one list per line."""
    rows = make_rows(results)
    return [[column.heading for column in columns]] + [
        [column.cell(row) for column in columns] for row in rows
    ]
