"""What a chat request costs the process in front of the engine. On a CPU, without a model.

    PYTHONPATH=.:shared python docs/dev/trials/chat_front_cost.py --output FILE.json \
        [--checkouts DIR DIR …]

Servers whose engine only sleeps (`testing/served_llm.py`) are up at the same time, one for each
checkout, and answer the conversations of `stream_client.py` in turns. Reported is the processor
time of the front (kernel included, from /proc/PID/task) per chat request, in milliseconds: of the
thread with the event loop and of the others, which make prompts of conversations. Medians and
quartiles of the rounds, the first of which warms up, and of the ratios to the first checkout. The
workloads differ in how many tokens an answer has: one token says what a request costs, more add
what a token does. Linux only.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from stream_client import run_workload, save_word_tokenizer

from folovllm.hardware import describe_environment
from folovllm.json_files import write_json_atomically
from folovllm.testing.served_llm import VOCAB_SIZE
from folovllm.testing.server_process import SERVED_LLM, ServerProcess
from folovllm.workloads.workload import make_workload

_LIMIT_S = 120.0
"""Of one run."""


@contextmanager
def code_of(checkout: Path) -> Iterator[None]:
    """What is started meanwhile runs the code of this checkout."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{checkout}:{checkout / 'shared'}"
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def processor_s(process_id: int) -> tuple[float, float]:
    """Of the main thread and of the others that there are; the front ends none."""
    spent_s = {
        int(task.name): int((task / "schedstat").read_text().split()[0]) / 1e9
        for task in Path(f"/proc/{process_id}/task").iterdir()
    }
    main_s = spent_s.pop(process_id)
    return main_s, sum(spent_s.values())


def measure(server: ServerProcess, pool: Any, spec: str, seed: int) -> dict[str, float]:
    workload = make_workload(spec, vocab_size=VOCAB_SIZE, seed=seed)
    before = processor_s(server.process.pid)
    parts = run_workload(pool, server.url, "toy", workload, _LIMIT_S)
    after = processor_s(server.process.pid)
    answers = [answer for part in parts for answer in part.answers]
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors or len(answers) != len(workload.requests):
        raise RuntimeError(f"requests failed: {errors[:3]}")
    main_s, others_s = (now - then for now, then in zip(after, before, strict=True))
    first_s = min(answer.due_s for answer in answers)
    return {
        "main_ms": main_s / len(answers) * 1e3,
        "others_ms": others_s / len(answers) * 1e3,
        "main_busy": main_s / (max(answer.token_s[-1] for answer in answers) - first_s),
        "prompt_tokens": statistics.mean(r.num_prompt_tokens for r in workload.requests),
        "output_tokens": workload.num_output_tokens / len(answers),
        "ttft_ms": statistics.median(a.token_s[0] - a.sent_s for a in answers) * 1e3,
    }


def summarise(runs: list[dict[str, float]]) -> dict[str, Any]:
    quartiles = {
        f"{name}_quartiles": statistics.quantiles([run[name] for run in runs], n=4)
        for name in ("main_ms", "others_ms")
    }
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {**medians, **quartiles, "runs": runs}


def over_first(runs: list[dict[str, float]], first: list[dict[str, float]]) -> float:
    """Median of the rounds' ratios: what others do on the machine meets both of a round."""
    pairs = zip(runs, first, strict=True)
    return statistics.median(run["main_ms"] / other["main_ms"] for run, other in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkouts", type=Path, nargs="+", default=[Path()], metavar="DIR")
    parser.add_argument(
        "--workloads", nargs="+", metavar="SPEC",
        default=[
            "multi-turn:conversations=64,turns=8,system=256,question=140,output=1",
            "multi-turn:conversations=64,turns=8,system=256,question=32-128,output=32-128",
        ],
    )  # fmt: skip
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=7, help="that count")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    runs: dict[tuple[str, int], list[dict[str, float]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_word_tokenizer(folder, VOCAB_SIZE)
        pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(1))
        servers = []
        for number, checkout in enumerate(arguments.checkouts):
            with code_of(checkout.resolve()):
                server = ServerProcess(
                    SERVED_LLM, folder, folder / f"log {number}",
                    "--step-ms", str(arguments.step_ms), "--max-queue-len", "4096",
                )  # fmt: skip
            servers.append(stack.enter_context(server))
        for turn in range(arguments.rounds + 1):
            for spec in arguments.workloads:
                for number, server in list(enumerate(servers))[:: -1 if turn % 2 else 1]:
                    run = measure(server, pool, spec, turn)
                    if turn:
                        runs.setdefault((spec, number), []).append(run)
    rows = []
    for (spec, number), of_checkout in sorted(runs.items()):
        row = {"workload": spec, "checkout": number, **summarise(of_checkout)}
        row["main_ms_over_first"] = over_first(of_checkout, runs[spec, 0])
        shown = {name: value for name, value in row.items() if isinstance(value, float)}
        print(spec, number, {name: round(value, 3) for name, value in shown.items()}, flush=True)
        rows.append(row)
    if arguments.output is not None:
        about = {"step_ms": arguments.step_ms, "environment": describe_environment()}
        write_json_atomically(arguments.output, {**about, "rows": rows})


if __name__ == "__main__":
    main()
