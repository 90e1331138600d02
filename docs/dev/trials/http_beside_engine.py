"""An engine driven in its own process, and the same one behind the server: rates and token gaps.

    PYTHONPATH=.:shared python docs/dev/trials/http_beside_engine.py --output FILE.json \
        [--model DIR] [--workload fixed:…] [--repeats 5] [-- OPTIONS OF THE ENGINE]

Two engines: a stage's with a real model, and one that only sleeps (`testing/served_llm.py`): its
steps are as short as a GPU's and leave the processor to those who talk HTTP. Without HTTP, the
engine is stepped as `bench` does it, in a loop that adds requests when they arrive and notes when
tokens come. With it, `http_load.py` asks the server for the same requests and notes when chunks
come to the client. Both take turns, in fresh processes, after a warm-up with other prompts.
"""

import argparse
import importlib
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from http_load import run_process, summary

from folovllm.bench.metrics import RequestTimes, latency_summary
from folovllm.bench.probes import SystemClock, frozen_heap
from folovllm.bench.recorder import record_run
from folovllm.hardware import describe_environment
from folovllm.json_files import write_json_atomically
from folovllm.testing.server_process import ServerProcess, serving
from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer
from folovllm.workloads.workload import Workload, make_workload

WARM_UP_TOKENS = 4
FIGURES = ("output_tokens_per_s", "ttft_p50_s", "itl_p50_s", "itl_p99_s", "tpot_p50_s")


@dataclass(frozen=True)
class Case:
    """One engine and what it shall do."""

    name: str
    module: str
    llm_class: str
    model: Path
    workload: Workload
    warm_up: Workload
    options: dict[str, Any]
    """Of the engine."""

    @property
    def flags(self) -> list[str]:
        pairs = [
            (f"--{name.replace('_', '-')}", str(value)) for name, value in self.options.items()
        ]
        return [word for pair in pairs for word in pair]


def load(case: Case) -> Any:
    torch.set_num_threads(1)
    llm_class = getattr(importlib.import_module(case.module), case.llm_class)
    return llm_class(case.model, **case.options).engine


def run_alone(case: Case) -> dict[str, Any]:
    """In a process of its own: the engine and nothing else."""
    engine = load(case)

    def run(workload: Workload) -> Any:
        return record_run(
            engine, workload, seed=0, clock=SystemClock(),
            before_step=lambda: None, after_step=lambda: None,
        )  # fmt: skip

    run(case.warm_up)
    with frozen_heap():
        record = run(case.workload)
    times = [
        RequestTimes(request.arrival_s, record.token_times_s(name))
        for name, request in record.requests.items()
    ]
    rate = case.workload.num_output_tokens / record.duration_s
    return figures({"output_tokens_per_s": rate, **latency_summary(times)})


def run_served(case: Case, log: Path) -> dict[str, Any]:
    program = serving(case.module, case.llm_class)
    flags = [*case.flags, "--generation-config", "vllm", "--max-queue-len", "4096"]
    with ServerProcess(program, case.model, log, *flags, start_s=300.0) as server:

        def ask(workload: Workload) -> dict[str, Any]:
            start_s = time.perf_counter() + 1.0
            requests = list(workload.requests)
            return summary(run_process(server.url, "toy", requests, None, start_s, 0.0))

        ask(case.warm_up)
        found = ask(case.workload)
    if found["errors"]:
        raise RuntimeError(f"{case.name}: {found['errors'][:3]}")
    return figures(found)


def figures(found: dict[str, Any]) -> dict[str, float]:
    return {
        "output_tokens_per_s": found["output_tokens_per_s"],
        "ttft_p50_s": found["ttft_s"]["p50"],
        "itl_p50_s": found["itl_s"]["p50"],
        "itl_p99_s": found["itl_s"]["p99"],
        "tpot_p50_s": found["tpot_s"]["p50"],
    }


def measure(case: Case, repeats: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {"alone": [], "http": []}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for kind in ("alone", "http")[:: -1 if repeat % 2 else 1]:
                load_before = os.getloadavg()[0]
                if kind == "alone":
                    with context.Pool(1) as pool:
                        run = pool.apply(run_alone, (case,))
                else:
                    run = run_served(case, Path(folder) / "log")
                runs[kind].append({**run, "load_before": load_before})
                print(case.name, kind, {name: round(run[name], 5) for name in FIGURES}, flush=True)
    medians = {
        kind: {name: statistics.median(run[name] for run in done) for name in FIGURES}
        for kind, done in runs.items()
    }
    ratios = {name: medians["http"][name] / medians["alone"][name] for name in FIGURES}
    print(case.name, "HTTP / alone:", {name: round(ratio, 4) for name, ratio in ratios.items()})
    return {
        "engine": case.name,
        "workload": {"spec": case.workload.spec, "sha256": case.workload.sha256},
        "options": case.options,
        "medians": medians,
        "http_over_alone": ratios,
        "runs": runs,
    }


def make_case(
    name: str, llm: tuple[str, str], model: Path, spec: str, vocab_size: int, **options: Any
) -> Case:
    workload = make_workload(spec, vocab_size=vocab_size, seed=0)
    warm_up = make_workload(spec, vocab_size=vocab_size, seed=1)
    short = tuple(
        replace(request, output_len=min(WARM_UP_TOKENS, request.output_len), arrival_s=0.0)
        for request in warm_up.requests[:16]
    )
    return Case(name, *llm, model, workload, replace(warm_up, requests=short), options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", default="m6_prefix")
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--workload", default="fixed:batch=8,input=32,output=96", metavar="SPEC")
    parser.add_argument("--sleeping", default="fixed:batch=64,input=32,output=600", metavar="SPEC")
    parser.add_argument("--step-ms", type=float, default=10.0, help="of the engine that sleeps")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the server: one core for its engine
    with tempfile.TemporaryDirectory() as folder:
        toy = save_byte_level_tokenizer(Path(folder))
        cases = [
            make_case(
                arguments.stage, (arguments.stage, "LLM"), arguments.model, arguments.workload,
                arguments.vocab_size, max_model_len=512, kv_cache_bytes=256 << 20,
            ),
            make_case(
                "sleeping", ("folovllm.testing.served_llm", "ServedLLM"), toy, arguments.sleeping,
                256, max_model_len=2048, step_ms=arguments.step_ms,
            ),
        ]  # fmt: skip
        rows = [measure(case, arguments.repeats) for case in cases]
    if arguments.output is not None:
        result = {"environment": describe_environment(), "rows": rows}
        write_json_atomically(arguments.output, result)


if __name__ == "__main__":
    main()
