"""The command line of every stage: `python -m STAGE generate | chat | bench | serve | profile`."""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..entrypoints.llm import LLM
from ..request import SamplingParams
from .bench import add_bench_flags, run_bench
from .chat import ChatSession
from .options import FlagArguments, add_field_flags, given_fields, optional
from .profile import add_profile_flags, run_profile
from .serve import add_serve_flags, run_serve
from .text import print_logprobs, print_outputs, print_stream, statistics_line

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_GENERATE_DEFAULTS = {"temperature": 0.0, "max_tokens": 256}
_CHAT_DEFAULTS = {"temperature": 0.0, "max_tokens": None}


def _token_bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ID=BIAS like 42=-1.5, got {text!r}") from None


_SAMPLING_FLAGS: dict[str, FlagArguments] = {
    "max_tokens": {"type": optional(int), "metavar": "INT|none"},
    "seed": {"flag": "--sampling-seed", "type": int, "metavar": "INT"},
    "stop": {"action": "append", "metavar": "TEXT"},
    "stop_token_ids": {"action": "append", "type": int, "metavar": "ID"},
    "allowed_token_ids": {"action": "append", "type": int, "metavar": "ID"},
    "bad_words": {"action": "append", "metavar": "TEXT"},
    "logit_bias": {"action": "append", "type": _token_bias, "metavar": "ID=BIAS"},
}
_PYTHON_ONLY = ("prompt_logprobs", "structured_outputs", "detokenize")
"""Settings whose values or results these commands have no form for."""


def main(llm_class: type[LLM], argv: Sequence[str] | None = None) -> int:
    """Run one command of a stage; returns the exit status.

    A mistake of the user (ValueError, a file that is not there) is one line on standard error and
    status 2. An interrupt is status 130.
    """
    arguments = build_parser(llm_class).parse_args(argv)
    try:
        return int(arguments.command(llm_class, arguments))
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def build_parser(llm_class: type[LLM]) -> argparse.ArgumentParser:
    """Flags for the model, every field of the stage's EngineConfig and of SamplingParams."""
    stage = stage_name(llm_class)
    parser = argparse.ArgumentParser(
        prog=f"python -m {stage}", description=f"Run the engine of {stage}.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = _add_command(commands, llm_class, "generate", "complete or answer prompts")
    generate.set_defaults(command=_generate)
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument(
        "--raw",
        action="store_true",
        help="continue the text as it is; else an instruct model answers it as a user's message",
    )
    _add_sampling_flags(generate, _GENERATE_DEFAULTS, skipped=())

    chat = _add_command(commands, llm_class, "chat", "talk with the model")
    chat.set_defaults(command=_chat)
    chat.add_argument("--system", metavar="TEXT", help="how the model should behave")
    _add_sampling_flags(chat, _CHAT_DEFAULTS, skipped=("n", "logprobs"))

    bench = _add_command(commands, llm_class, "bench", "measure one run of a workload")
    bench.set_defaults(command=_bench)
    add_bench_flags(bench)

    serve = _add_command(commands, llm_class, "serve", "answer OpenAI's API over HTTP")
    serve.set_defaults(command=_serve)
    add_serve_flags(serve)

    step_profile = _add_command(
        commands, llm_class, "profile", "list the kernels of a prompt step and a decode step"
    )
    step_profile.set_defaults(command=_profile)
    add_profile_flags(step_profile)
    return parser


def stage_name(llm_class: type[LLM]) -> str:
    """The package that the class belongs to: `m2_batching`."""
    return llm_class.__module__.partition(".")[0]


def _add_command(
    commands: Any, llm_class: type[LLM], name: str, description: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=description, description=description, allow_abbrev=False
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="PATH|ID|PRESET", help="default: the embedded model under models/"
    )
    model.add_argument("--tokenizer", metavar="PATH|ID", help="default: the model's own")
    model.add_argument("--load-format", default="auto", choices=["auto", "safetensors", "dummy"])
    model.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"]
    )
    model.add_argument("--device", default="auto", metavar="auto|cpu|cuda|cuda:N")
    model.add_argument(
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="INT",
        help="devices, each with a process, that share the model out (default: 1)",
    )
    model.add_argument(
        "--seed",
        dest="llm_seed",
        type=int,
        default=0,
        metavar="INT",
        help="of dummy weights, of workloads, and of sampling where a request has no seed",
    )
    add_field_flags(parser.add_argument_group("engine"), llm_class.config_class)
    return parser


def _add_sampling_flags(
    parser: argparse.ArgumentParser, defaults: Mapping[str, Any], skipped: Sequence[str]
) -> None:
    add_field_flags(
        parser.add_argument_group("sampling"),
        SamplingParams,
        special=_SAMPLING_FLAGS,
        defaults=defaults,
        skipped=(*skipped, *_PYTHON_ONLY),
    )


def make_llm(llm_class: type[LLM], arguments: argparse.Namespace) -> LLM:
    return llm_class(arguments.model, **_llm_options(llm_class, arguments))


def _llm_options(llm_class: type[LLM], arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "load_format": arguments.load_format,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "seed": arguments.llm_seed,
        "tokenizer": arguments.tokenizer,
        "tensor_parallel_size": arguments.tensor_parallel_size,
        **given_fields(arguments, llm_class.config_class),
    }


def _make_sampling_params(
    arguments: argparse.Namespace, defaults: Mapping[str, Any]
) -> SamplingParams:
    given = {**defaults, **given_fields(arguments, SamplingParams)}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return SamplingParams(**given)


def _generate(llm_class: type[LLM], arguments: argparse.Namespace) -> int:
    params = _make_sampling_params(arguments, _GENERATE_DEFAULTS)
    llm = make_llm(llm_class, arguments)
    is_chat = llm.tokenizer is not None and llm.tokenizer.has_chat_template and not arguments.raw
    prompts = [
        llm.render_chat([{"role": "user", "content": text}]) if is_chat else text
        for text in arguments.prompts
    ]
    start = time.perf_counter()
    if len(prompts) == 1 and params.n == 1:
        last = print_stream(llm.stream(prompts[0], params), sys.stdout)
        if last is None:
            return EXIT_INTERRUPTED
        outputs = [last]
        print_logprobs(last.outputs[0], sys.stdout)
    else:
        outputs = llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
        print_outputs(outputs, sys.stdout)
    print(statistics_line(outputs, time.perf_counter() - start), file=sys.stderr)
    return 0 if all(output.finished for output in outputs) else EXIT_INTERRUPTED


def _chat(llm_class: type[LLM], arguments: argparse.Namespace) -> int:
    params = _make_sampling_params(arguments, _CHAT_DEFAULTS)
    llm = make_llm(llm_class, arguments)
    llm.render_chat([{"role": "user", "content": "Hello"}])  # a model that cannot chat says so now
    session = ChatSession(llm, params, arguments.system, sys.stdout)
    session.run("> " if sys.stdin.isatty() else "")
    return 0


def _bench(llm_class: type[LLM], arguments: argparse.Namespace) -> int:
    run_bench(make_llm(llm_class, arguments), stage_name(llm_class), arguments)
    return 0


def _serve(llm_class: type[LLM], arguments: argparse.Namespace) -> int:
    return run_serve(llm_class, arguments, _llm_options(llm_class, arguments))


def _profile(llm_class: type[LLM], arguments: argparse.Namespace) -> int:
    run_profile(make_llm(llm_class, arguments), stage_name(llm_class), arguments)
    return 0
