"""Tables of measurements that no comparison of stages makes, from `docs/dev/data`."""

import json
from pathlib import Path
from typing import Any

from folovllm.profiling.report import format_profile

DATA_FOLDER = Path("docs/dev/data")
KEY = "data"
"""`<!-- compare:data/NAME:begin -->` marks the place of the table of NAME.json."""


def data_tables(root: Path) -> dict[str, str]:
    """Key of a marker -> Markdown, for every file of a kind that has a table."""
    tables = {}
    for file in sorted((root / DATA_FOLDER).glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            continue  # a list of rows, which a script of its own reads
        if "groups" in content.get("decode", {}):
            tables[f"{KEY}/{file.stem}"] = format_profile(content, num_rows=12)
        elif "rows" in content and "ceilings" in content:
            tables[f"{KEY}/{file.stem}"] = attention_table(content)
    return tables


def attention_table(content: dict[str, Any]) -> str:
    """What `m4_flash/tests/benchmark_attention.py` measured: a line a case, a column a backend."""
    cases: dict[str, dict[str, Any]] = {}
    for row in content["rows"]:
        cases.setdefault(_case(row), {})[row["backend"]] = row
    backends = list(dict.fromkeys(row["backend"] for row in content["rows"]))
    lines = [
        "| requests x queries, keys, heads, block | " + " | ".join(backends) + " | limit |",
        "|---|" + "---:|" * (len(backends) + 1),
    ]
    for case, rows in cases.items():
        any_row = next(iter(rows.values()))
        cells = [_cell(rows[name]) if name in rows else "–" for name in backends]
        limit = f"{any_row['floor_s'] * 1e6:.0f} µs"
        lines.append(f"| {case} | " + " | ".join(cells) + f" | {limit} |")
    ceilings, environment = content["ceilings"], content["environment"]
    lines += [
        "",
        f"{environment['device']}, {ceilings['dtype']}; limit: bytes of keys and values at "
        f"{ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s or FLOPs at "
        f"{ceilings['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s, whichever takes longer.",
    ]
    return "\n".join(lines)


def _case(row: dict[str, Any]) -> str:
    return (
        f"{row['batch_size']} x {row['query_len']}, {row['seq_len']:,}, "
        f"{row['num_heads']}/{row['num_kv_heads']} of {row['head_dim']}, {row['block_size']}"
    )


def _cell(row: dict[str, Any]) -> str:
    is_decode = row["query_len"] == 1
    rate = (
        f"{row['bytes_per_s'] / 1e12:.2f} TB/s"
        if is_decode
        else f"{row['flops_per_s'] / 1e12:.0f} TFLOP/s"
    )
    return f"{row['seconds'] * 1e6:,.1f} µs, {rate}"
