"""A page of figures of what `compare.measure_table` measured and did not publish.

    PYTHONPATH=.:shared python docs/dev/trials/run_medians.py build/table --output FILE.json

Of every engine and workload: output tokens per second of each run, and medians of the rest, in
seconds and bytes; memory is that of the first run, since it is the same every time.
"""

import argparse
import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from compare.session import read_runs

PERCENTILES = {
    "ttft_p50_s": ("ttft_s", "p50"),
    "ttft_p99_s": ("ttft_s", "p99"),
    "tpot_p50_s": ("tpot_s", "p50"),
    "itl_p99_s": ("itl_s", "p99"),
    "decode_step_p50_s": ("decode_step_s", "p50"),
}


def describe(folder: str, engine: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def middle(of_run: Callable[[dict[str, Any]], float]) -> float:
        return round(median(map(of_run, runs)), 6)

    first = runs[0]
    row: dict[str, Any] = {
        "folder": folder,
        "stage": engine,
        "workload": first["workload"]["spec"],
        "output_tokens_per_s": [round(run["output_tokens_per_s"], 1) for run in runs],
    }
    for name, (section, percentile) in PERCENTILES.items():
        if first[section]:
            row[name] = middle(lambda run, s=section, p=percentile: run[s][p])
    groups = first.get("ttft_by_group_s") or {}
    if groups:
        row["ttft_p50_by_group_s"] = {
            group: middle(lambda run, g=group: run["ttft_by_group_s"][g]["p50"]) for group in groups
        }
    if follower_waits(first):
        row["arrival_to_step_p50_s"] = middle(lambda run: median(follower_waits(run)))
    row["peak_memory_bytes"] = first["peak_memory_bytes"]
    row["model"] = {name: first["model"][name] for name in ("name", "weight_bytes")}
    return row


def follower_waits(run: dict[str, Any]) -> list[float]:
    """From the arrival of a request that follows another to the beginning of the next step."""
    starts = run["steps"]["start_s"]
    arrivals = [request["arrival_s"] for request in run["requests"] if request["follows"]]
    return [starts[bisect_left(starts, arrival)] - arrival for arrival in arrivals]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    by_folder = read_runs(options.folder, None)
    rows = [
        describe(folder, engine, runs)
        for folder, by_engine in sorted(by_folder.items())
        for engine, runs in sorted(by_engine.items())
    ]
    environment = next(iter(next(iter(by_folder.values())).values()))[0]["environment"]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    head = f' "environment": {json.dumps(environment)},\n "rows": [\n'
    options.output.write_text(f"{{\n{head}{lines}\n ]\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
