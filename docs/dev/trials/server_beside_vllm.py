"""vLLM's server, ours, and our engine without a server: the same requests on the same card.

    PYTHONPATH=.:shared python docs/dev/trials/server_beside_vllm.py --output FILE.json --logs DIR \
        --arrivals azure:PATH/azure_llm_2023_conv.csv.gz,num=600,speed=8 [--limit SECONDS]

A system is `engine:STAGE` (stepped in a loop, as `bench` does it), `server:STAGE` or `server:vllm`
(as `vllm serve` starts it); they run one after the other, each ended before the next one starts.
The model has random weights, and a tokenizer with a word for each of its ids; prompts, limits and
clients are the same for all systems (`stream_client.py`), and no run has a prompt of another.
Requests that arrive by a trace go as token ids to /v1/completions; the conversations of --chats are
64 clients that ask their next question as soon as they have their answer, at /v1/chat/completions.
The file is written again after every run, so that whatever ends this script loses one run.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, Protocol
from urllib.error import URLError
from urllib.request import urlopen

from http_load import Timing, summary
from stream_client import run_workload, save_word_tokenizer

from compare.peers.checkpoint import hf_config
from folovllm.bench.probes import SystemClock, frozen_heap
from folovllm.bench.recorder import record_run
from folovllm.hardware import describe_environment
from folovllm.json_files import write_json_atomically
from folovllm.model.config import ModelConfig
from folovllm.workloads.workload import Workload, make_workload

MODEL_NAME = "dummy"
FIGURES = ("output_tokens_per_s", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "chunk_gap_p99")
VLLM_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
}
"""Nothing but what a machine without network and without these two libraries needs."""
_END_S = 20.0
"""How long a process may take to end when it was told to."""


@dataclass(frozen=True)
class Limits:
    """Of every system."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


class System(Protocol):
    """Something that answers requests."""

    def run(self, workload: Workload, limit_s: float) -> dict[str, Any]:
        """What its clients saw; TimeoutError if they would need longer."""


class Deadline:
    """When all must be over."""

    def __init__(self, limit_s: float) -> None:
        self._end_s = time.perf_counter() + limit_s

    def left_s(self) -> float:
        """TimeoutError when nothing is left."""
        left = self._end_s - time.perf_counter()
        if left <= 0:
            raise TimeoutError("the time that --limit gives is over")
        return left


class EngineAlone:
    """A stage's engine in a process of its own, without a server."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def run(self, workload: Workload, limit_s: float) -> dict[str, Any]:
        self._connection.send(workload)
        return receive(self._connection, limit_s)


class Served:
    """A server in processes of its own, and the clients of this one."""

    def __init__(self, url: str, group: int, pool: Pool) -> None:
        """group: of the server's processes."""
        self._url = url
        self._group = group
        self._pool = pool

    def run(self, workload: Workload, limit_s: float) -> dict[str, Any]:
        before = processor_times(self._group)
        parts = run_workload(self._pool, self._url, MODEL_NAME, workload, limit_s)
        after = processor_times(self._group)
        answers = [answer for part in parts for answer in part.answers]
        cached = [
            (a.usage.get("prompt_tokens_details") or {}).get("cached_tokens") for a in answers
        ]
        found = figures(answers)
        # Conversations end with a turn that fails: what was not asked has failed, too.
        found["num_failed"] += len(workload.requests) - len(answers)
        chunks = [Timing(a.request_id, a.due_s, a.sent_s, a.chunk_s, a.error) for a in answers]
        gaps = summary(chunks)["itl_s"] or {}
        return found | {
            "chunk_gap_p50": gaps.get("p50"),
            "chunk_gap_p99": gaps.get("p99"),
            "num_chunks": sum(len(answer.chunk_s) for answer in answers),
            "num_cached_tokens": sum(filter(None, cached)),
            "busiest_client": max(part.processor_s for part in parts) / found["duration_s"],
            "server_processor_s": {
                process: round(seconds - before.get(process, 0.0), 3)
                for process, seconds in after.items()
            },
        }


def figures(timings: list[Timing]) -> dict[str, Any]:
    """Times in seconds."""
    found = summary(timings)
    if not found["duration_s"]:
        raise RuntimeError(f"no request was answered: {found['errors'][:3]}")
    return {
        "num_requests": found["num_requests"],
        "num_failed": len(found["errors"]),
        "errors": sorted(set(found["errors"]))[:5],
        "duration_s": found["duration_s"],
        "output_tokens_per_s": found["output_tokens_per_s"],
        **{
            f"{name}_{part}": (found[f"{name}_s"] or {}).get(part)
            for name in ("ttft", "itl", "tpot", "sent_late")
            for part in ("p50", "p99")
        },
    }


def run_engine(
    stage: str, model: Path, options: dict[str, Any], log: Path, connection: Connection
) -> None:
    """Measure the workloads that come, until None does; in a process of its own."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    llm = importlib.import_module(stage).LLM(model, load_format="dummy", **options)
    connection.send({})
    while (workload := connection.recv()) is not None:
        with frozen_heap():
            record = record_run(
                llm.engine, workload, seed=0, clock=SystemClock(),
                before_step=lambda: None, after_step=lambda: None,
            )  # fmt: skip
        found = figures(
            [
                Timing(name, request.arrival_s, request.arrival_s, list(record.token_times_s(name)))
                for name, request in record.requests.items()
            ]
        )
        connection.send(found)


@contextmanager
def engine_alone(
    stage: str, model: Path, options: dict[str, Any], log: Path, deadline: Deadline
) -> Iterator[EngineAlone]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=run_engine, args=(stage, model, options, log, there))
    process.start()
    there.close()  # so that the end of the process is an error of whoever waits for it
    try:
        receive(here, deadline.left_s())
        yield EngineAlone(here)
        here.send(None)
        process.join(_END_S)
    finally:
        process.kill()
        process.join()


def receive(connection: Connection, limit_s: float) -> dict[str, Any]:
    if not connection.poll(limit_s):
        raise TimeoutError(f"the engine said nothing for {limit_s:.0f} s")
    found: dict[str, Any] = connection.recv()
    return found


@contextmanager
def serving(
    command: list[str], port: int, pool: Pool, log: Path, deadline: Deadline
) -> Iterator[Served]:
    environment = os.environ | VLLM_ENVIRONMENT
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        while not is_healthy(url):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}")
            deadline.left_s()
            time.sleep(0.2)
        yield Served(url, process.pid, pool)
        process.send_signal(signal.SIGTERM)
        process.wait(_END_S)
    finally:
        end_group(process)


def is_healthy(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=1.0) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the processes, and wait until the card is free of them."""
    end_s = time.perf_counter() + _END_S
    while processor_times(process.pid) and time.perf_counter() < end_s:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            break
        process.poll()
        time.sleep(0.1)
    process.wait()


def processor_times(group: int) -> dict[str, float]:
    """Seconds of every process of a group that has not ended, by number and name. Linux only."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, rest = path.read_text().partition(" (")
        except OSError:
            continue
        name, _, rest = rest.rpartition(") ")
        fields = rest.split()
        if int(fields[2]) == group and fields[0] != "Z":
            ticks = int(fields[11]) + int(fields[12])
            found[f"{number} {name}"] = ticks / os.sysconf("SC_CLK_TCK")
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def serve_command(
    kind: str, model: Path, limits: Limits, arguments: argparse.Namespace
) -> list[str]:
    """Without the port."""
    flags = ["--load-format", "dummy", "--served-model-name", MODEL_NAME]
    flags += ["--generation-config", "vllm"]
    for name, value in asdict(limits).items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    if kind == "vllm":
        # Its log of calls costs it time, and ours has none.
        flags += ["--disable-uvicorn-access-log", "--enable-prompt-tokens-details"]
        flags += ["--dtype", "bfloat16", *arguments.vllm_flags.split()]
        server = "vllm.entrypoints.openai.api_server"
        return [sys.executable, "-m", server, "--model", str(model), *flags]
    flags += ["--max-queue-len", "4096"]
    if arguments.kv_cache_bytes is not None:
        flags += ["--kv-cache-bytes", str(arguments.kv_cache_bytes)]
    return [sys.executable, "-m", kind, "serve", "--model", str(model), *flags]


class Trial:
    """What was asked for, and the file with what came of it."""

    def __init__(self, arguments: argparse.Namespace, config: ModelConfig, folder: Path) -> None:
        self._arguments = arguments
        self._model = folder
        self._vocab_size = config.vocab_size
        self._limits = Limits(
            arguments.max_model_len, arguments.max_num_seqs, arguments.max_num_batched_tokens
        )
        self._deadline = Deadline(arguments.limit)
        self._begin_s = time.perf_counter()
        told = {k: v for k, v in vars(arguments).items() if k not in ("output", "logs")}
        self.result: dict[str, Any] = {
            "environment": describe_environment(), "about": told,
            "workloads": {}, "systems": {}, "ratios": {},
        }  # fmt: skip

    def measure(self, name: str, pool: Pool) -> None:
        """All runs of a system; one that fails leaves its error and the end of its log."""
        row: dict[str, Any] = {"runs": []}
        self.result["systems"][name] = row
        log = self._arguments.logs / f"{name.replace(':', '_')}.log"
        begin_s = time.perf_counter()
        try:
            with self._start(name, pool, log, row) as system:
                row["start_s"] = time.perf_counter() - begin_s
                self._say(f"{name} is up after {row['start_s']:.1f} s")
                for kind, seed, spec in self._runs():
                    self._run(system, row, kind, seed, spec)
        except Exception as error:
            row["error"] = repr(error)
            row["log"] = log.read_text(errors="replace")[-4000:] if log.exists() else ""
            self._say(f"{name} failed: {error!r}\n{row['log']}")
        self._write()

    def _start(self, name: str, pool: Pool, log: Path, row: dict[str, Any]) -> Any:
        what, _, kind = name.partition(":")
        if what == "engine":
            options = asdict(self._limits)
            if self._arguments.kv_cache_bytes is not None:
                options["kv_cache_bytes"] = self._arguments.kv_cache_bytes
            return engine_alone(kind, self._model, options, log, self._deadline)
        command = serve_command(kind, self._model, self._limits, self._arguments)
        model = str(self._model)
        row["command"] = ["python", *("MODEL" if w == model else w for w in command[1:])]
        port = free_port()
        return serving([*command, "--port", str(port)], port, pool, log, self._deadline)

    def _runs(self) -> Iterator[tuple[str, int, str]]:
        """What each system does: kind, seed and workload."""
        arguments = self._arguments
        kinds = [("chats", arguments.chats, arguments.chat_runs)]
        kinds.append(("arrivals", arguments.arrivals, arguments.arrival_runs))
        kinds = [kind for kind in kinds if kind[1] and kind[2]]
        yield from (("warm-up", 0, spec) for _, spec, _ in kinds)
        for kind, spec, num_runs in kinds:
            yield from ((kind, seed, spec) for seed in range(1, num_runs + 1))

    def _run(self, system: System, row: dict[str, Any], kind: str, seed: int, spec: str) -> None:
        workload = make_workload(spec, vocab_size=self._vocab_size, seed=seed)
        if kind == "warm-up" and workload.is_open_loop:
            workload = workload.head(min(len(workload.requests), self._arguments.warm_up))
        found = system.run(workload, self._deadline.left_s())
        row["runs"].append({"workload": kind, "seed": seed, **found})
        about = {"spec": spec, "num_requests": len(workload.requests)}
        about["num_output_tokens"] = workload.num_output_tokens
        about["sha256"] = workload.sha256
        self.result["workloads"][f"{kind} {seed}" if seed else f"{kind} {spec}"] = about
        row["medians"] = {
            kind: {figure: median(row["runs"], kind, figure) for figure in FIGURES}
            for kind in dict.fromkeys(run["workload"] for run in row["runs"])
            if kind != "warm-up"
        }
        self._say(
            f"  {kind} {seed}: "
            + ", ".join(f"{f} {found.get(f)}" for f in (*FIGURES, "num_failed"))
        )
        self._write()

    def _write(self) -> None:
        self.result["ratios"] = ratios(self.result["systems"])
        self.result["seconds"] = time.perf_counter() - self._begin_s
        write_json_atomically(self._arguments.output, self.result)

    def _say(self, what: str) -> None:
        print(f"[{time.perf_counter() - self._begin_s:6.1f} s] {what}", flush=True)


def median(runs: list[dict[str, Any]], kind: str, figure: str) -> float | None:
    values = [run.get(figure) for run in runs if run["workload"] == kind]
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ratios(systems: dict[str, Any]) -> dict[str, Any]:
    """Medians of the first server of ours over those of every other system."""
    first = next((n for n in systems if n.startswith("server:") and n != "server:vllm"), None)
    if first is None:
        return {}
    found: dict[str, Any] = {}
    for name, row in systems.items():
        for kind, medians in row.get("medians", {}).items():
            ours = systems[first].get("medians", {}).get(kind)
            if name == first or ours is None:
                continue
            found.setdefault(f"{first} over {name}", {})[kind] = {
                figure: round(ours[figure] / medians[figure], 4)
                for figure in FIGURES
                if ours[figure] and medians[figure]
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--systems", nargs="+", default=["server:m6_prefix", "server:vllm", "engine:m6_prefix"]
    )
    parser.add_argument("--model", default="qwen3-0.6b", help="its shape: a preset, or a directory")
    parser.add_argument("--arrivals", metavar="SPEC", help="a workload with times of arrival")
    parser.add_argument("--arrival-runs", type=int, default=2)
    parser.add_argument(
        "--chats", metavar="SPEC",
        default="multi-turn:conversations=64,turns=8,system=256,question=32-128,output=32-128",
    )  # fmt: skip
    parser.add_argument("--chat-runs", type=int, default=3)
    parser.add_argument(
        "--warm-up", type=int, default=100, help="of the requests that arrive; of chats all"
    )
    parser.add_argument("--max-model-len", type=int, default=17408)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--kv-cache-bytes", type=int, help="of ours; default: what is free")
    parser.add_argument("--vllm-flags", default="", help="more of them, in one word")
    parser.add_argument("--client-processes", type=int, default=8)
    parser.add_argument("--limit", type=float, default=280.0, help="seconds that all may take")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--logs", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    shape = Path(arguments.model)
    config = ModelConfig.from_directory(shape) if shape.is_dir() else ModelConfig.preset(str(shape))
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(arguments.client_processes) as pool,
    ):
        settings = hf_config(config, "bfloat16")
        Path(folder, "config.json").write_text(json.dumps(settings), encoding="utf-8")
        save_word_tokenizer(Path(folder), config.vocab_size)
        trial = Trial(arguments, config, Path(folder))
        for name in arguments.systems:
            trial.measure(name, pool)
    print(json.dumps(trial.result["ratios"], indent=1))


if __name__ == "__main__":
    main()
