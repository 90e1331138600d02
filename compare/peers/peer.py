"""What a peer must look like for the shared benchmark, and the command line around it."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from folovllm.bench.benchmark import run_benchmark
from folovllm.bench.metrics import throughput
from folovllm.bench.probes import PeakMemory
from folovllm.cli.options import add_field_flags, given_fields
from folovllm.interfaces import Engine
from folovllm.model.collectives import Alone
from folovllm.model.config import ModelConfig, kv_bytes_per_token
from folovllm.request import Request
from folovllm.text.tokenizer import Tokenizer
from folovllm.workloads.workload import Workload, WorkloadRequest, make_workload

from ..results import write_json
from ..runner import EXIT_NOT_INSTALLED

EXIT_USAGE = 2
EMBEDDED_MODEL_NAME = "SmolLM2-135M-Instruct"


@dataclass(frozen=True, kw_only=True)
class PeerModel:
    """What reports and rooflines need to know of the model that a peer runs."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    num_parameters: int
    """Tied embeddings count once."""
    collectives: Alone = field(default_factory=Alone)

    @property
    def num_parameter_bytes(self) -> int:
        return self.num_parameters * self.dtype.itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        return kv_bytes_per_token(self.config, self.dtype)


class KVCacheSize(Protocol):
    @property
    def num_bytes(self) -> int:
        """Bytes that the peer's keys and values take now."""


@dataclass(frozen=True)
class FixedKVCache:
    """A cache that is allocated once, at the start."""

    num_bytes: int


class UntimedScheduler:
    """Stands where a stage has a scheduler; a peer's host work is not taken apart."""

    def schedule(self) -> None: ...

    def update(self) -> None: ...


@dataclass
class UntimedModelRunner:
    """Stands where a stage has a model runner; only its memory is asked for."""

    kv_cache: KVCacheSize

    def prepare_inputs(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class PeerLLM:
    """What `run_benchmark` takes: an engine and its model; and what else a peer can tell."""

    engine: Engine
    model: PeerModel
    tokenizer: Tokenizer | None
    memory: PeakMemory | None = None
    """Peak memory of an engine in another process; None: it is in this one."""
    generate: Callable[[Sequence[WorkloadRequest]], float] | None = None
    """Answers requests that all are there at once by the call that the peer's users make for
    that, and returns its seconds; None: the peer has no other way than the engine's steps."""
    settings: Mapping[str, Any] | None = None
    """How the peer was set up, as it tells itself; goes into the result."""


class PeerFactory(Protocol):
    """How a peer is started."""

    def __call__(
        self,
        model: str | None,
        *,
        load_format: str,
        dtype: str,
        device: str,
        seed: int,
        config: Any,
    ) -> AbstractContextManager[PeerLLM]:
        """ImportError where the engine is not installed."""


def require_benchmark_request(request: Request, max_model_len: int) -> None:
    """ValueError for what a peer's adapter does not translate: all but greedy, fixed length."""
    params = request.sampling_params
    if not params.is_greedy or not params.ignore_eos or request.stop_token_ids or params.stop:
        raise ValueError(
            f"request {request.request_id}: a peer answers greedily to the full length; "
            f"set temperature=0 and ignore_eos, and no stop strings or ids"
        )
    num_tokens = request.num_prompt_tokens + request.max_tokens
    if num_tokens > max_model_len:
        raise ValueError(
            f"request {request.request_id} needs {num_tokens} tokens, above "
            f"max_model_len={max_model_len}"
        )


def main(
    stage: str,
    config_class: type[Any],
    factory: PeerFactory,
    argv: Sequence[str] | None = None,
    gate_not_comparable: str | None = None,
) -> int:
    """`bench` of one peer, with the flags of a stage's `bench`.

    gate_not_comparable: why the peer's tokens cannot be compared; None means that they can.
    """
    options = peer_parser(stage, config_class).parse_args(argv)
    try:
        config = config_class(**given_fields(options, config_class))
        started = factory(
            options.model,
            load_format=options.load_format,
            dtype=options.dtype,
            device=options.device,
            seed=options.seed,
            config=config,
        )
        with started as llm:
            result = bench_peer(stage, llm, options, gate_not_comparable)
    except ImportError as error:
        print(f"{stage} is not usable here: {error}", file=sys.stderr)
        return EXIT_NOT_INSTALLED
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    if options.output is not None:
        write_json(options.output, result)
    headline = ("stage", "output_tokens_per_s", "duration_s")
    print(json.dumps({name: result[name] for name in headline}))
    return 0


def bench_peer(
    stage: str, llm: PeerLLM, options: argparse.Namespace, gate_not_comparable: str | None
) -> dict[str, Any]:
    workload = make_workload(
        options.workload,
        tokenizer=llm.tokenizer,
        vocab_size=llm.model.config.vocab_size,
        seed=options.seed,
    )
    result = run_benchmark(
        llm,
        workload,
        stage=stage,
        seed=options.seed,
        gate_requests=options.gate_requests,
        gate_tokens=options.gate_tokens,
        warmup_tokens=options.warmup_tokens,
        model_name=Path(options.model or EMBEDDED_MODEL_NAME).name,
        load_format=options.load_format,
        memory=llm.memory,
    )
    for name in ("host_time_s", "host_time_at_max_running_s"):
        result[name] = dict.fromkeys(result[name])  # was not measured: None, not 0
    if gate_not_comparable:
        result["gate"] = {"tokens": [], "top2_gaps": [], "not_comparable": gate_not_comparable}
    if llm.settings is not None:
        result["peer"] = dict(llm.settings)
    if llm.generate is not None and workload.arrives_at_once:
        result |= offline_section(result, workload, llm.generate(workload.requests))
    return result


def offline_section(
    result: Mapping[str, Any], workload: Workload, duration_s: float
) -> dict[str, Any]:
    """Rates of a run by the peer's own call for many requests; those of the steps beside them.

    Latencies, steps and memory stay those of the run whose tokens were taken one by one.
    """
    rates = throughput(
        num_requests=len(workload.requests),
        num_input_tokens=workload.num_input_tokens,
        num_output_tokens=workload.num_output_tokens,
        duration_s=duration_s,
    )
    offline = {"duration_s": duration_s, **rates}
    by_steps = {name: result[name] for name in offline}
    # The same least time, of another duration.
    roofline = result["roofline_fraction"] * by_steps["duration_s"] / duration_s
    return {
        **offline,
        "roofline_fraction": roofline,
        "rates_from": "generate",
        "rates_by_steps": by_steps,
    }


def peer_parser(stage: str, config_class: type[Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"peer {stage}", allow_abbrev=False)
    bench = parser.add_subparsers(dest="command", required=True).add_parser(
        "bench", help="measure one run of a workload", allow_abbrev=False
    )
    bench.add_argument("--model", help="default: the embedded model")
    bench.add_argument("--load-format", default="auto", choices=["auto", "safetensors", "dummy"])
    bench.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"]
    )
    bench.add_argument("--device", default="auto")
    bench.add_argument("--seed", type=int, default=0)
    bench.add_argument("--workload", required=True)
    bench.add_argument("--output", type=Path)
    for name, default in (("gate-requests", 8), ("gate-tokens", 16), ("warmup-tokens", 4)):
        bench.add_argument(f"--{name}", type=int, default=default)
    add_field_flags(bench.add_argument_group("engine"), config_class)
    return parser


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer beside a checkpoint; None where there is none."""
    return Tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
