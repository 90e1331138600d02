"""`python -m STAGE bench`: one measured run, as a table and as JSON."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..bench.summary import format_summary
from ..entrypoints.llm import LLM
from ..json_files import write_json_atomically

_COLUMNS = ("steps", "requests", "gate", "block_map")
"""Parts of a result that grow with the workload; they are in the file only."""


def add_bench_flags(parser: argparse.ArgumentParser) -> None:
    """What is measured and where the result goes."""
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--workload",
        required=True,
        metavar="SPEC",
        help="nano, nano:8 (its first 8 requests), fixed:batch=8,input=512,output=128, chat, "
        "poisson:…, long-arrival:…, shared-prefix:…, few-shot:…, prefix-hit:…, multi-turn:…, "
        "multi-turn:PATH, azure:PATH, mooncake:PATH, sharegpt:PATH",
    )
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="write the result here; without it, a summary goes to the terminal as JSON",
    )
    for flag, default, text in (
        ("--gate-requests", 8, "requests whose greedy tokens are kept to compare stages"),
        ("--gate-tokens", 16, "tokens of each of them"),
        ("--warmup-tokens", 4, "tokens per request of the run before the clock"),
        ("--runs", 1, "measured runs; run 2 goes to FILE.run2.json, and so on"),
    ):
        group.add_argument(
            flag, type=int, default=default, metavar="INT", help=f"{text} (default: {default})"
        )


def run_bench(llm: LLM, stage: str, arguments: argparse.Namespace) -> None:
    """Measure and print a table; write the JSON file, whole or not at all, or print its summary."""
    from ..bench.benchmark import run_benchmark
    from ..workloads.workload import make_workload

    if arguments.output is not None:
        if arguments.output.is_dir():
            raise ValueError(f"--output {arguments.output} is a directory; name a file in it")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)  # fail now, not after the run
    workload = make_workload(
        arguments.workload,
        tokenizer=llm.tokenizer,
        vocab_size=llm.model.config.vocab_size,
        seed=arguments.llm_seed,
    )
    if arguments.runs < 1 or (arguments.runs > 1 and arguments.output is None):
        raise ValueError(f"--runs {arguments.runs}: give at least 1, and --output for more than 1")
    for run in range(1, arguments.runs + 1):
        result = run_benchmark(
            llm,
            workload,
            stage=stage,
            seed=arguments.llm_seed,
            gate_requests=arguments.gate_requests,
            gate_tokens=arguments.gate_tokens,
            warmup_tokens=arguments.warmup_tokens,
            model_name=Path(arguments.model or llm.model_path).name,
            load_format=arguments.load_format,
        )
        _publish({**result, "runs_in_process": arguments.runs}, arguments.output, run)


def _publish(result: dict[str, Any], output: Path | None, run: int) -> None:
    """Print the table; write the file of this run, or print what it would hold but for columns."""
    file = output if output is None or run == 1 else output.with_suffix(f".run{run}.json")
    if file is not None:
        write_json_atomically(file, result)
    print(format_summary(result))
    if file is not None:
        print(f"  every request and step in {file}")
    else:
        print(json.dumps({key: value for key, value in result.items() if key not in _COLUMNS}))
