"""A benchmark result as a table for people."""

from typing import Any


def format_summary(result: dict[str, Any]) -> str:
    """The headline numbers of a benchmark result as a table for people."""
    workload, memory = result["workload"], result["peak_memory_bytes"]
    cut = workload["num_requests_before_cut"]
    size = f"{workload['num_requests']} requests" + (f" of {cut}" if cut else "")
    rows = [
        ("workload", f"{workload['spec']}: {size}"),
        ("output throughput", f"{result['output_tokens_per_s']:.1f} tok/s"),
        ("total throughput", f"{result['total_tokens_per_s']:.1f} tok/s"),
        ("TTFT p50 / p99", _milliseconds(result["ttft_s"])),
        ("TPOT p50 / p99", _milliseconds(result["tpot_s"])),
        ("ITL p50 / p99", _milliseconds(result["itl_s"])),
        ("decode step p50 / p99", _milliseconds(result["decode_step_s"])),
        ("peak memory", f"{memory['total'] / 2**30:.2f} GiB"),
        ("duration", f"{result['duration_s']:.2f} s"),
    ]
    for group, ttft in (result.get("ttft_by_group_s") or {}).items():
        rows.append((f"TTFT {group} p50 / p99", _milliseconds(ttft)))
    if result.get("late_ttft_s") is not None:
        rows += [
            ("late TTFT p50 / p99", _milliseconds(result["late_ttft_s"])),
            ("gap beside p50 / p99", _milliseconds(result["decoder_itl_beside_late_s"])),
            ("worst gap beside", _worst(result["decoder_itl_beside_late_s"])),
        ]
    found = result.get("prefix_cache")
    if found:
        rows += [
            ("prompt tokens cached", _share(found["hit_rate"])),
            ("cached blocks evicted", f"{found['num_evicted_blocks']:,}"),
        ]
    graphs = result.get("cuda_graphs")
    if graphs:
        count, mib = len(graphs["shapes"]), graphs["num_bytes"] / 2**20
        what = f"{count} shapes in {graphs['capture_s']:.1f} s, {mib:.0f} MiB"
        rows.append(("CUDA graphs", what))
    num_ranks = result.get("tensor_parallel_size", 1)
    if num_ranks != 1:
        rows.append(("tensor parallel size", f"{num_ranks}; memory is that of rank 0"))
    title = f"{result['stage']}, {result['model']['name']}, {result['device']}"
    return "\n".join([title, *(f"  {name:<22} {value}" for name, value in rows)])


def _milliseconds(summary: dict[str, float | None]) -> str:
    """p50 and p99; a workload of one token per request has no gaps to summarise."""
    parts = (summary["p50"], summary["p99"])
    return " / ".join("–" if part is None else f"{part * 1000:.2f}" for part in parts) + " ms"


def _share(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.1f} %"


def _worst(summary: dict[str, float | None]) -> str:
    return "–" if summary["max"] is None else f"{summary['max'] * 1000:.2f} ms"
