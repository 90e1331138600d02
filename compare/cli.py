"""The command line: `run` measures all stages, `show` compares a stage with the one before it,
`table` and `charts` redraw what is stored, `stale` says what of it is out of date."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .publish import (
    RESULTS_FOLDER,
    USER_FOLDER,
    gate_folder,
    print_charts,
    print_gate,
    print_pages,
    print_tables,
)
from .results import result_folders
from .run import EXIT_REFUSED, run
from .show import show
from .stale import EXIT_STALE, stale_rows

EXIT_USAGE = 2
MEASURING = ("run", "show")
"""Commands whose results are a user's own; the others redraw those of the project."""
PASSED_ON = "Any other --option is passed to the stages whose EngineConfig has it."


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options, extra = parser.parse_known_args(argv)
    try:
        if options.command == "run":
            return run(options, extra)
        if options.command == "show":
            return show(options, extra)
        if extra:
            parser.error(f"unknown arguments: {' '.join(extra)}")
        return list_stale(options) if options.command == "stale" else redraw(options)
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return EXIT_USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m compare", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run_arguments(
        commands.add_parser(
            "run",
            help="run the stages in turns, gate, publish table, charts and report",
            epilog=PASSED_ON,
            allow_abbrev=False,
        )
    )
    _add_show_arguments(
        commands.add_parser(
            "show",
            help="run a stage and the one before it on the workload that shows its idea",
            epilog=PASSED_ON,
            allow_abbrev=False,
        )
    )
    for name, text in (
        ("table", "print the stored tables and write them into the documents"),
        ("charts", "the same, and draw charts and report again"),
        ("stale", "list stored rows whose code has changed since they were measured"),
    ):
        redraw_parser = commands.add_parser(name, help=text)
        redraw_parser.add_argument(
            "only", nargs="*", metavar="DEVICE/WORKLOAD", help="default: all that are stored"
        )
    for name, command in commands.choices.items():
        command.add_argument(
            "--results",
            type=Path,
            default=USER_FOLDER if name in MEASURING else RESULTS_FOLDER,
            help="where results lie (default: %(default)s); documents are only updated from "
            f"{RESULTS_FOLDER}",
        )
        command.add_argument(
            "--root", type=Path, default=Path(), help="folder of stages and documents"
        )
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--stages", help="comma-separated; default: every stage there is, and hf")
    add(
        "--stage-workload",
        nargs="+",
        action="extend",
        default=[],
        metavar="STAGE=SPEC",
        help="the beginning of the workload that a slow stage runs: m1_baseline=nano:8",
    )
    add("--name", help="folder of the results under the device; default: from the workload")
    add(
        "--publish",
        dest="results",
        action="store_const",
        const=RESULTS_FOLDER,
        default=argparse.SUPPRESS,
        help=f"put the results into {RESULTS_FOLDER}, and the table into the documents",
    )
    add(
        "--commit",
        help="what was measured, where the files are a copy without their own git history",
    )
    _add_common_arguments(parser, profile="auto")


def _add_show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", required=True, help="m3 or m3_paged; what it shows is declared")
    parser.set_defaults(stage_workload=[])
    # What stages declare is made for two CPU cores, whatever the device.
    _add_common_arguments(parser, profile="cpu")


def _add_common_arguments(parser: argparse.ArgumentParser, profile: str) -> None:
    """What is run, how often and with what."""
    add = parser.add_argument
    add("--workload", help="such as nano, nano:8, fixed:batch=8,input=512,output=128")
    add("--repeats", type=int, help="processes of each stage, in turns; default: the profile's")
    add(
        "--runs-per-process",
        type=int,
        default=1,
        help="measured runs of each process, where loading takes longer than a run (default: 1)",
    )
    add(
        "--profile",
        default=profile,
        help="defaults for what is not given: auto, cpu or gpu (default: %(default)s)",
    )
    add("--model", help="directory, Hub id or preset; default: the profile's")
    add("--load-format", help="auto, safetensors or dummy")
    add("--dtype", help="auto, float32, bfloat16 or float16")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--seed", type=int, default=0)
    add(
        "--stage-option",
        nargs="+",
        action="extend",
        default=[],
        metavar="STAGE.OPTION=VALUE",
        help="an engine option of one stage alone: m4_flash.max_num_batched_tokens=17408",
    )
    add("--timeout", type=float, default=3600.0, help="seconds that one run may take")


def list_stale(options: argparse.Namespace) -> int:
    """`compare stale`."""
    rows = stale_rows(_stored_folders(options), options.root)
    for row in rows:
        print(row)
    print(f"{len(rows)} stale rows")
    return EXIT_STALE if rows else 0


def _stored_folders(options: argparse.Namespace) -> list[Path]:
    folders = result_folders(options.results, options.only or None)
    if not folders:
        raise ValueError(f"no results under {options.results}; run `python -m compare run` first")
    return folders


def redraw(options: argparse.Namespace) -> int:
    """`compare table` and `compare charts`."""
    folders = _stored_folders(options)
    accepted = []
    for folder in folders:
        gate = gate_folder(folder)
        if gate.passed:
            accepted.append(folder)
        else:
            print(folder)
            print_gate(gate)
    print_tables(accepted, options.root)
    if options.command == "charts":
        print_charts(accepted)
    print_pages(accepted, options.root)
    return 0 if len(accepted) == len(folders) else EXIT_REFUSED
