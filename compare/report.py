"""One HTML file with the table, the charts, the definitions and the environment in it."""

import base64
import html
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from .columns import Column, table_cells, tables_of
from .results import Result
from .stages import is_ladder_stage
from .table import footnotes

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; font-size: 13px; }
.wide { overflow-x: auto; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid #ddd; }
th { vertical-align: bottom; border-bottom: 2px solid #888; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
td { white-space: nowrap; }
tr.peer td { color: #777; }
img { max-width: 100%; margin: 0.6em 0 1.2em; border: 1px solid #eee; }
dt { font-weight: 600; margin-top: 0.5em; } dd { margin: 0 0 0 1.5em; }
.note { color: #555; font-size: 13px; margin: 0.2em 0; }
"""


def write_report(results: Sequence[Result], charts: Sequence[Path], file: Path) -> Path:
    """Write the report of one device and workload; it needs no other file and no network."""
    first, tables = results[0], tables_of(results)
    title = f"FoloVLLM stages on {first['device']}, workload {first['workload']['name']}"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        *(f'<div class="wide">{_table(results, columns)}</div>' for columns in tables),
        *(f'<p class="note">{html.escape(note)}</p>' for note in footnotes(results)),
        "<h2>Charts</h2>",
        *(_image(chart) for chart in charts),
        "<h2>What the columns mean</h2>",
        _definitions([(c.heading, c.meaning) for c in dict.fromkeys(chain(*tables))]),
        "<h2>Environment</h2>",
        f'<div class="wide">{_environment(results)}</div>',
        "</body></html>",
    ]
    file.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return file


def _table(results: Sequence[Result], columns: Sequence[Column]) -> str:
    heading, *rows = table_cells(results, columns)
    lines = [f"<table><thead>{_row(heading, 'th')}</thead><tbody>"]
    for result, row in zip(results, rows, strict=True):
        kind = "" if is_ladder_stage(result["stage"]) else ' class="peer"'
        lines.append(_row(row, "td", kind))
    return "\n".join([*lines, "</tbody></table>"])


def _row(cells: Sequence[str], tag: str, attributes: str = "") -> str:
    inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr{attributes}>{inner}</tr>"


def _image(chart: Path) -> str:
    data = base64.b64encode(chart.read_bytes()).decode("ascii")
    name = html.escape(chart.stem.replace("-", " "))
    return f'<img alt="{name}" src="data:image/png;base64,{data}">'


def _definitions(pairs: Sequence[tuple[str, str]]) -> str:
    inner = "".join(f"<dt>{html.escape(a)}</dt><dd>{html.escape(b)}</dd>" for a, b in pairs)
    return f"<dl>{inner}</dl>"


def _environment(results: Sequence[Result]) -> str:
    """Environment, engine options and warm-up of every stage, a column per stage."""
    columns = [
        {
            **_flat("", result.get("environment") or {}),
            **_flat("engine ", result.get("engine_config") or {}),
            **_flat("warm-up ", result.get("warmup") or {}),
            **_flat("ceiling ", result.get("ceilings") or {}),
            "workload sha256": str(result["workload"]["sha256"]),
            "seed": str(result.get("seed")),
            "tensor parallel size": str(result.get("tensor_parallel_size", 1)),
        }
        for result in results
    ]
    names = list(dict.fromkeys(name for column in columns for name in column))
    lines = [_row(["", *(result["stage"] for result in results)], "th")]
    lines += [_row([name, *(column.get(name, "–") for column in columns)], "td") for name in names]
    return f"<table>{''.join(lines)}</table>"


def _flat(prefix: str, values: object) -> dict[str, str]:
    """Nested objects as one level of `outer inner` names."""
    if not isinstance(values, dict):
        return {prefix.strip(): str(values)}
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(f"{prefix}{name} ", value)
        else:
            flat[f"{prefix}{name}"] = "–" if value is None else str(value)
    return flat
