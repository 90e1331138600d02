"""The comparison as text: a table for terminals, one for Markdown, and the notes below them."""

import unicodedata
from collections.abc import Sequence

from .agreement import has_random_weights, is_quantized
from .columns import (
    PREFIX_MARK,
    SHORT_COLUMNS,
    Column,
    make_rows,
    perplexity_columns,
    table_cells,
    tables_of,
)
from .perplexities import protocol_line, shown_in
from .results import Result, lookup, model_label

_WIDE_SPREAD = 2.0
"""Fastest over slowest run of a stage from which a reader is warned."""


def footnotes(results: Sequence[Result]) -> list[str]:
    """What a reader must know to read the table: setting, medians, prefixes, unchecked peers."""
    if not results:
        return []
    longest = max(results, key=lambda result: result["workload"]["num_requests"])
    notes = [setting_line(longest)]
    repeats = sorted({str(result.get("repeats", 1)) for result in results})
    runs = "One run" if repeats == ["1"] else f"Medians of {' or '.join(repeats)} runs"
    shared = [r["stage"] for r in results if r.get("runs_in_process", 1) > 1]
    where = "each in a fresh process"
    if shared:
        where += f", but for {', '.join(shared)}: all in one process"
    notes.append(f"{runs}, {where}; warm-up not counted.")
    commits = {r["stage"]: str(lookup(r, "environment.commit"))[:10] for r in results}
    if len(set(commits.values())) > 1:
        stated = ", ".join(f"{stage} {commit}" for stage, commit in commits.items())
        notes.append(f"Measured at different commits: {stated}.")
    for result in results:
        num_ranks = result.get("tensor_parallel_size", 1)
        if num_ranks != 1:
            notes.append(
                f"{result['stage']}: {num_ranks} processes held the model together, each on a "
                f"device of its own if on GPUs; memory and roofline are those of the first."
            )
    for row in make_rows(results):
        workload = row.result["workload"]
        if row.ran_prefix:
            notes.append(
                f"{PREFIX_MARK} {row.result['stage']} answered only the first "
                f"{workload['num_requests']} requests; its rates and times are of those."
            )
        low, high = (
            lookup(row.result, f"spread.output_tokens_per_s.{end}") for end in ("min", "max")
        )
        if low and high and high > _WIDE_SPREAD * low:
            notes.append(
                f"{row.result['stage']}: its runs differ by {high / low:.1f} times; something else "
                f"used the machine, so do not compare this row with others."
            )
        reason = lookup(row.result, "gate.not_comparable")
        if reason is not None:
            notes.append(f"{row.result['stage']}: its tokens were not compared ({reason}).")
        elif is_quantized(row.result):
            notes.append(_quantized_line(row.result))
    return notes + [protocol_line(name, entry) for name, entry in shown_in(results).items()]


def _quantized_line(result: Result) -> str:
    """What a row with a quantised model ran, and what its tokens were compared with."""
    model = result["model"]
    settings = model["quantization"]
    bits = f" to {settings['bits']} bits" if "bits" in settings else ""
    told = f"{result['stage']} ran {model_label(str(model['name']))}, quantised{bits}"
    if has_random_weights(result):
        return f"{told}, with random weights of its own; its tokens were not compared."
    stage = lookup(result, "gate.reference.stage")
    return f"{told}; its tokens were compared with those of {stage} on these weights, dequantised."


def setting_line(result: Result) -> str:
    """Device, model, dtype and workload in one line."""
    workload, model = result["workload"], result["model"]
    name = lookup(result, "environment.device") or result["device"]
    cut = workload.get("num_requests_before_cut")
    cut_text = f", the first of {cut}" if cut else ""
    random = ", random weights" if model.get("load_format") == "dummy" else ""
    spec = workload.get("spec") or workload["name"]
    return (
        f"{name}; {model_label(str(model['name']))}{random}, {model['dtype']}; workload {spec} "
        f"({workload['num_requests']} requests{cut_text}: {workload['num_input_tokens']:,} input "
        f"and {workload['num_output_tokens']:,} output tokens)."
    )


def _width(text: str) -> int:
    """Columns that a terminal gives it."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def terminal_table(results: Sequence[Result], max_width: int) -> str:
    """Aligned text; columns that do not fit into `max_width` go below, under the names again."""
    text: list[str] = []
    for columns in tables_of(results):
        text += _aligned(table_cells(results, columns), max_width)
    return "\n".join(text + footnotes(results))


def _aligned(cells: Sequence[Sequence[str]], max_width: int) -> list[str]:
    """Lines of one table."""
    num_columns = len(cells[0])
    widths = [max(_width(line[index]) for line in cells) for index in range(num_columns)]
    blocks: list[list[int]] = [[0]]
    used = widths[0]
    for index in range(1, num_columns):
        if used + 2 + widths[index] > max_width and len(blocks[-1]) > 1:
            blocks.append([0])
            used = widths[0]
        blocks[-1].append(index)
        used += 2 + widths[index]
    text = []
    for block in blocks:
        for number, line in enumerate(cells):
            parts = [
                line[i] + " " * (widths[i] - _width(line[i]))
                if i == 0
                else " " * (widths[i] - _width(line[i])) + line[i]
                for i in block
            ]
            text.append("  ".join(parts).rstrip())
            if number == 0:
                text.append("  ".join("─" * widths[i] for i in block))
        text.append("")
    return text


def short_table(results: Sequence[Result]) -> str:
    """Four columns, for a first look, and perplexity where a quantised model ran: the text between
    markers that end in `/short`."""
    return _markdown(results, [(*SHORT_COLUMNS, *perplexity_columns(results))])


def markdown_table(results: Sequence[Result]) -> str:
    """Pipe tables with their footnotes; the text between the markers of a document."""
    return _markdown(results, tables_of(results))


def _markdown(results: Sequence[Result], tables: Sequence[Sequence[Column]]) -> str:
    lines: list[str] = []
    for columns in tables:
        heading, *rows = table_cells(results, columns)
        lines += [_markdown_line(heading), "|---|" + "---:|" * (len(heading) - 1)]
        lines += [*(_markdown_line(row) for row in rows), ""]
    return "\n".join(lines + [f"{note}  " for note in footnotes(results)]).rstrip()


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
