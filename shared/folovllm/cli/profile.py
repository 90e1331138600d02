"""`python -m STAGE profile`: the kernels of one step as a table and a JSON file."""

import argparse
from pathlib import Path

from ..entrypoints.llm import LLM
from ..json_files import write_json_atomically


def add_profile_flags(parser: argparse.ArgumentParser) -> None:
    """Which step is profiled and where the result goes."""
    group = parser.add_argument_group("profile")
    group.add_argument("--batch-size", type=_positive, default=1, metavar="INT", help="requests")
    group.add_argument(
        "--context-len", type=_positive, default=512, metavar="INT", help="prompt tokens of each"
    )
    group.add_argument("--output", type=Path, metavar="FILE.json", help="write the result here")


def run_profile(llm: LLM, stage: str, arguments: argparse.Namespace) -> None:
    """Profile; write the file whole or not at all; print the tables."""
    from ..profiling.report import format_profile
    from ..profiling.steps import profile_steps

    if arguments.output is not None and arguments.output.is_dir():
        raise ValueError(f"--output {arguments.output} is a directory; name a file in it")
    result = profile_steps(
        llm, stage=stage, batch_size=arguments.batch_size, context_len=arguments.context_len
    )
    if arguments.output is not None:
        write_json_atomically(arguments.output, result)
    print(format_profile(result))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
