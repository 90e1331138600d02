"""What a public load generator reports of a server, and what the server says of the same requests.

    PYTHONPATH=.:shared python docs/dev/trials/load_generator.py --url http://127.0.0.1:8000 \
        --model DIR --guidellm PATH/TO/guidellm --output FILE.json

The server runs already, and nobody else asks it. guidellm, and then `http_load.py`, send --requests
prompts from --streams clients; /metrics is read before and behind each, so that the sums and counts
that it gained are of these requests alone. Means are compared: sums and counts hold those exactly.
A client's times begin when it sends and end when it reads; the server's begin when a body has been
read and end when the engine has the token.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from folovllm.hardware import describe_environment
from folovllm.json_files import write_json_atomically

HISTOGRAMS = {
    "ttft_ms": "time_to_first_token_seconds",
    "itl_ms": "inter_token_latency_seconds",
    "latency_ms": "e2e_request_latency_seconds",
    "prompt_tokens": "request_prompt_tokens",
    "output_tokens": "request_generation_tokens",
}
"""Figure -> the metric whose mean it is."""
TIMES = ("ttft_ms", "itl_ms", "latency_ms")


def read_metrics(url: str) -> dict[str, float]:
    """`NAME_sum` and `NAME_count` of every histogram, over all engines."""
    with urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    values: dict[str, float] = {}
    for name, value in re.findall(r"^vllm:(\w+_(?:sum|count)){.*} (\S+)$", text, re.M):
        values[name] = values.get(name, 0.0) + float(value)
    return values


def gained(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Means over what came between two readings."""
    found: dict[str, float] = {}
    for figure, name in HISTOGRAMS.items():
        total, count = (
            after[f"{name}_{e}"] - before.get(f"{name}_{e}", 0) for e in ("sum", "count")
        )
        found[figure] = total / count * (1e3 if figure in TIMES else 1.0)
    found["num_requests"] = after["e2e_request_latency_seconds_count"] - before.get(
        "e2e_request_latency_seconds_count", 0
    )
    return found


def run_guidellm(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    report = folder / "guidellm.json"
    command = [
        arguments.guidellm, "run", "--disable-console",
        "--backend", f"kind=openai_http,target={arguments.url},request_format=/v1/completions",
        "--tokenizer", f"kind=huggingface_auto,model={arguments.model}",
        "--data", f"kind=synthetic_text,prompt_tokens={arguments.prompt_tokens},"
        f"output_tokens={arguments.output_tokens}",
        "--profile", f"kind=concurrent,streams={arguments.streams}",
        "--constraint", f"kind=max_requests,count={arguments.requests}",
        "--seed", f"kind=static,value={arguments.seed}",
        "--output", f"kind=json,path={report}",
    ]  # fmt: skip
    # It would look for the tokenizer at the Hub, too.
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    benchmark = json.loads(report.read_text())["benchmarks"][0]
    if benchmark["requests"]["errored"] or benchmark["requests"]["incomplete"]:
        raise RuntimeError(f"requests failed, see {report}")
    metrics = benchmark["metrics"]

    def mean(name: str) -> float:
        return float(metrics[name]["successful"]["mean"])

    return {
        "ttft_ms": mean("time_to_first_token_ms"),
        "itl_ms": mean("inter_token_latency_ms"),
        "latency_ms": mean("request_latency") * 1e3,
        "prompt_tokens": mean("prompt_token_count"),
        "output_tokens": mean("output_token_count"),
        "num_requests": float(metrics["request_totals"]["successful"]),
    }


def run_http_load(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    report = folder / "http_load.json"
    spec = f"fixed:batch={arguments.requests},input={arguments.prompt_tokens}"
    command = [
        sys.executable, str(Path(__file__).with_name("http_load.py")),
        "--url", arguments.url, "--model", served_model(arguments.url),
        "--vocab-size", str(arguments.vocab_size), "--seed", str(arguments.seed),
        "--workload", f"{spec},output={arguments.output_tokens}", "--processes", "1",
        "--concurrency", str(arguments.streams), "--temperature", "0", "--output", str(report),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result = json.loads(report.read_text())
    if result["summary"]["errors"]:
        raise RuntimeError(f"requests failed: {result['summary']['errors'][:3]}")
    times = [(row["due_s"], row["token_s"]) for row in result["requests"]]
    gaps = [after - before for _, t in times for before, after in pairwise(t)]
    return {
        "ttft_ms": 1e3 * statistics.fmean(tokens[0] - due for due, tokens in times),
        "itl_ms": 1e3 * statistics.fmean(gaps),
        "latency_ms": 1e3 * statistics.fmean(tokens[-1] - due for due, tokens in times),
        "prompt_tokens": float(arguments.prompt_tokens),
        "output_tokens": statistics.fmean(len(tokens) for _, tokens in times),
        "num_requests": float(len(times)),
    }


def served_model(url: str) -> str:
    with urlopen(f"{url}/v1/models") as answer:
        return str(json.load(answer)["data"][0]["id"])


def compare(
    name: str, run: Callable[[argparse.Namespace, Path], Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """One run of a client beside what the server counted meanwhile."""
    load_before = os.getloadavg()[0]
    before = read_metrics(arguments.url)
    with tempfile.TemporaryDirectory() as folder:
        client = run(arguments, Path(folder))
    server = gained(before, read_metrics(arguments.url))
    ratios = {figure: client[figure] / server[figure] for figure in server}
    print(name, {figure: f"{client[figure]:.1f}" for figure in ratios}, flush=True)
    print("  over the server's:", {figure: f"{r:.4f}" for figure, r in ratios.items()}, flush=True)
    return {
        "client": name, "client_says": client, "server_says": server,
        "client_over_server": ratios, "load_before": load_before,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", type=Path, required=True, help="for guidellm's tokenizer")
    parser.add_argument("--guidellm", default="guidellm", metavar="PATH")
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    runs = []
    for repeat in range(arguments.repeats):
        arguments.seed = 100 + repeat  # other prompts: none is found in the prefix cache
        runs.append(compare("guidellm", run_guidellm, arguments))
        runs.append(compare("http_load", run_http_load, arguments))
    medians = {
        client: {
            figure: statistics.median(
                run["client_over_server"][figure] for run in runs if run["client"] == client
            )
            for figure in runs[0]["client_over_server"]
        }
        for client in ("guidellm", "http_load")
    }
    print(json.dumps(medians, indent=2))
    if arguments.output is not None:
        about = {name: value for name, value in vars(arguments).items() if name not in _NOT_TOLD}
        version = subprocess.run(
            [arguments.guidellm, "--version"], check=True, capture_output=True, text=True
        ).stdout.strip()
        result = {"environment": describe_environment() | {"guidellm": version}, "about": about}
        result |= {"medians_of_client_over_server": medians, "runs": runs}
        write_json_atomically(arguments.output, result)


_NOT_TOLD = ("output", "guidellm", "model", "url", "seed")


if __name__ == "__main__":
    main()
