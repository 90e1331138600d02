"""The result of `python -m STAGE profile` as Markdown: for the terminal and for the documents."""

from collections.abc import Sequence
from typing import Any


def format_profile(result: dict[str, Any], num_rows: int = 25) -> str:
    """Both steps as Markdown tables, the most expensive kernels first."""
    what = "operator" if result["device"].startswith("cpu") else "kernel"
    lines = [
        f"{result['stage']}, batch {result['batch_size']}, {result['context_len']} tokens of "
        f"context, {result['num_layers']} layers, {result['dtype']}, {result['device']}"
    ]
    for label in ("decode", "prompt"):
        section = result[label]
        lines += [
            "",
            f"{label} step{_size(section)}: {section['step_s'] * 1e3:.2f} ms, of which {what}s "
            f"{section['kernels_s'] * 1e3:.2f} ms in {section['num_launches']} launches",
            "",
            *_format_groups(section["groups"]),
            "",
            f"| {what} | launches | per layer | µs in all |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| `{row['name'][:72]}` | {row['count']} | {row['count'] / result['num_layers']:.1f} "
            f"| {row['total_s'] * 1e6:.0f} |"
            for row in section["kernels"][:num_rows]
        ]
        if len(section["kernels"]) > num_rows:
            lines.append(f"| … {len(section['kernels']) - num_rows} more | | | |")
    return "\n".join(lines)


def _format_groups(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as lines of a Markdown table."""
    lines = [
        "| what | launches | µs | MB at least | GFLOP | limit, µs | of the limit |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [row["group"], str(row["count"]), f"{row['total_s'] * 1e6:,.0f}"]
        if row["num_bytes"] is None:
            cells += ["", "", "", ""]
        else:
            cells += [
                f"{row['num_bytes'] / 1e6:,.1f}",
                f"{row['num_flops'] / 1e9:,.1f}",
                f"{row['limit_s'] * 1e6:,.0f}",
                "" if row["limit_fraction"] is None else f"{row['limit_fraction']:.0%}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _size(section: dict[str, Any]) -> str:
    """What the step computed; results from before it was kept have nothing to say."""
    if "num_scheduled_requests" not in section:
        return ""
    requests, tokens = section["num_scheduled_requests"], section["num_scheduled_tokens"]
    return f" of {requests} requests and {tokens:,} tokens"
