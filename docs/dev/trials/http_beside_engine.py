"""An engine driven in its own process, and the same one behind the server: rates and token gaps.

    PYTHONPATH=.:shared python docs/dev/trials/http_beside_engine.py --output FILE.json \
        [--model DIR] [--workload SPEC …] [--sleeping SPEC …] [--pairs 10] [--most 30] \
        [--pin]

Two engines: a stage's with a real model, and one that only sleeps (`testing/served_llm.py`): its
steps are as short as a GPU's and leave the processor to those who talk HTTP. Without HTTP, the
engine is stepped as `bench` does it, in a loop that adds requests when they arrive and notes when
tokens come. With it, `http_load.py` asks the server for the same requests and notes when chunks
come to the client. Both engines stay up and take turns, a few seconds each: what others do on the
machine meanwhile meets both of a pair, and the ratio of a pair says what HTTP costs. Every pair has
prompts of its own; the first pair warms up and does not count. It goes on until --pairs of them met
a machine that did little else, or --most were made. With --pin the engines run on core 0, and
server and client on core 1, as on a machine with cores enough; without it, where others keep a core
busy, engine, server and client may come to share one. Linux only: it reads /proc.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
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

QUIET = 0.15
"""Cores that others may use during a run that counts as undisturbed."""
ENGINE_CORE, OTHER_CORE = 0, 1
"""Of --pin."""
FIGURES = ("output_tokens_per_s", "ttft_p50_s", "itl_p50_s", "itl_p99_s", "tpot_p50_s")


@dataclass(frozen=True)
class Case:
    """One engine and what it shall do."""

    name: str
    module: str
    llm_class: str
    model: Path
    spec: str
    """Of its workload."""
    vocab_size: int
    options: dict[str, Any]
    """Of the engine."""
    is_pinned: bool
    """Whether its engines have a core of their own."""

    @property
    def flags(self) -> list[str]:
        pairs = [
            (f"--{name.replace('_', '-')}", str(value)) for name, value in self.options.items()
        ]
        return [word for pair in pairs for word in pair]


class Alone:
    """The engine and nothing else, in a process of its own."""

    def __init__(self, case: Case) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=run_alone, args=(case, there), daemon=True)
        self._process.start()
        self._connection.recv()

    def run(self, workload: Workload) -> dict[str, float]:
        self._connection.send(workload)
        found: dict[str, float] = self._connection.recv()
        return found

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()


def run_alone(case: Case, connection: Connection) -> None:
    """Measure the workloads that come, until None does."""
    torch.set_num_threads(1)
    if case.is_pinned:
        os.sched_setaffinity(0, {ENGINE_CORE})
    llm_class = getattr(importlib.import_module(case.module), case.llm_class)
    engine = llm_class(case.model, **case.options).engine
    connection.send("ready")
    while (workload := connection.recv()) is not None:
        with frozen_heap():
            record = record_run(
                engine, workload, seed=0, clock=SystemClock(),
                before_step=lambda: None, after_step=lambda: None,
            )  # fmt: skip
        times = [
            RequestTimes(request.arrival_s, record.token_times_s(name))
            for name, request in record.requests.items()
        ]
        rate = workload.num_output_tokens / record.duration_s
        connection.send(figures({"output_tokens_per_s": rate, **latency_summary(times)}))


def run_served(server: ServerProcess, workload: Workload) -> dict[str, float]:
    start_s = time.perf_counter() + 0.5
    timings = run_process(server.url, "toy", list(workload.requests), None, start_s, 0.0)
    found = summary(timings)
    if found["errors"]:
        raise RuntimeError(f"requests failed: {found['errors'][:3]}")
    return figures(found)


def figures(found: dict[str, Any]) -> dict[str, float]:
    return {
        "output_tokens_per_s": found["output_tokens_per_s"],
        "ttft_p50_s": found["ttft_s"]["p50"],
        "itl_p50_s": found["itl_s"]["p50"],
        "itl_p99_s": found["itl_s"]["p99"],
        "tpot_p50_s": found["tpot_s"]["p50"],
    }


def measure(case: Case, num_quiet: int, most: int) -> dict[str, Any]:
    flags = [*case.flags, "--generation-config", "vllm", "--max-queue-len", "4096"]
    alone, pairs = Alone(case), []
    with tempfile.TemporaryDirectory() as folder:
        program, log = serving(case.module, case.llm_class), Path(folder) / "log"
        with ServerProcess(program, case.model, log, *flags, start_s=300.0) as server:
            if case.is_pinned:
                pin_children(server.process.pid)
            runs = {"alone": alone.run, "http": partial(run_served, server)}
            for number in range(most + 1):
                workload = make_workload(case.spec, vocab_size=case.vocab_size, seed=number)
                order = ("alone", "http")[:: -1 if number % 2 else 1]
                pair = {kind: beside_others(runs[kind], workload) for kind in order}
                pairs.append(pair)
                what = {figure: f"{ratio(pair, figure):.3f}" for figure in FIGURES}
                print(case.name, case.spec, what, "quiet" if is_quiet(pair) else "", flush=True)
                if sum(map(is_quiet, pairs[1:])) == num_quiet:
                    break
    alone.close()
    del pairs[0]
    quiet = [pair for pair in pairs if is_quiet(pair)]
    row = {
        "engine": case.name, "spec": case.spec, "options": case.options,
        "is_pinned": case.is_pinned,
        "quiet": summarise(quiet), "all": summarise(pairs),
    }  # fmt: skip
    print(json.dumps(row, indent=1), flush=True)
    return row | {"pairs": pairs}


def summarise(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Quartiles of the ratios, and medians of both; None without two pairs."""
    if len(pairs) < 2:
        return {"num_pairs": len(pairs)}
    return {
        "num_pairs": len(pairs),
        "http_over_alone": {f: quartiles(ratio(pair, f) for pair in pairs) for f in FIGURES},
        **{
            kind: {f: statistics.median(pair[kind][f] for pair in pairs) for f in FIGURES}
            for kind in ("alone", "http")
        },
    }


def beside_others(run: Callable[[Workload], dict[str, float]], workload: Workload) -> Any:
    """What a run found, and how many cores others kept busy meanwhile."""
    start_s, busy_s, own_s = time.perf_counter(), machine_busy_s(), own_busy_s()
    found = run(workload)
    others_s = machine_busy_s() - busy_s - (own_busy_s() - own_s)
    return found | {"cores_of_others": max(0.0, others_s / (time.perf_counter() - start_s))}


def pin_children(process_id: int) -> None:
    """The server's engine, with all its threads, to the core of the engines."""
    for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split():
        for thread in Path(f"/proc/{child}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {ENGINE_CORE})


def machine_busy_s() -> float:
    """Processor time of everything on this machine."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def own_busy_s() -> float:
    """Processor time of the processes of this script: those of its group."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == os.getpgrp():
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def is_quiet(pair: dict[str, Any]) -> bool:
    return all(run["cores_of_others"] < QUIET for run in pair.values())


def ratio(pair: dict[str, Any], figure: str) -> float:
    return float(pair["http"][figure] / pair["alone"][figure])


def quartiles(values: Iterable[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"p25": low, "median": median, "p75": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", default="m6_prefix")
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument(
        "--workload",
        nargs="*",
        default=["fixed:batch=8,input=32,output=32"],
        metavar="SPEC",
        help="of the real one",
    )
    parser.add_argument(
        "--sleeping",
        nargs="*",
        default=[
            "fixed:batch=64,input=32,output=300",
            "poisson:rate=20,num=100,input=32,output=300",
        ],
        metavar="SPEC",
        help="of the other; no SPEC leaves an engine out",
    )
    parser.add_argument("--step-ms", type=float, default=10.0, help="of the engine that sleeps")
    parser.add_argument("--pairs", type=int, default=10, help="undisturbed ones, of each engine")
    parser.add_argument("--most", type=int, default=30, help="pairs in all, of each engine")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--pin", action="store_true", help="engines get a core of their own")
    arguments = parser.parse_args()
    if arguments.pin:
        os.sched_setaffinity(0, {OTHER_CORE})
    if os.getpgrp() != os.getpid():  # whatever started this is not ours
        os.setpgrp()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the server: one core for its engine
    with tempfile.TemporaryDirectory() as folder:
        toy = save_byte_level_tokenizer(Path(folder))
        cases = [
            Case(
                arguments.stage, arguments.stage, "LLM", arguments.model, spec,
                arguments.vocab_size, {"max_model_len": 512, "kv_cache_bytes": 256 << 20},
                arguments.pin,
            )
            for spec in arguments.workload
        ]  # fmt: skip
        options = {"max_model_len": 2048, "step_ms": arguments.step_ms}
        served = ("folovllm.testing.served_llm", "ServedLLM")
        cases += [
            Case("sleeping", *served, toy, spec, 256, options, arguments.pin)
            for spec in arguments.sleeping
        ]
        rows = [measure(case, arguments.pairs, arguments.most) for case in cases]
    if arguments.output is not None:
        result = {"environment": describe_environment(), "rows": rows}
        write_json_atomically(arguments.output, result)


if __name__ == "__main__":
    main()
