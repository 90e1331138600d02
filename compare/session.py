"""Many workloads on one engine that is started once, where GPU time is short.

    python -m compare.session measure m5_chunked --to build/session --runs 3 \\
        --run nano=nano --run batch-8=fixed:batch=8,input=512,output=128 \\
        --model qwen3-0.6b --load-format dummy --dtype bfloat16 --max-model-len 2048
    python -m compare.session publish build/session

`measure` takes the options of the engine's own `bench`, writes one file per run under
TO/NAME/, and goes on with the next workload if one fails. `publish` checks what all engines
measured against each other and puts it into compare/results/DEVICE/NAME, with tables and charts.
Runs of one engine share a process; the table says so. Exit status as of `python -m compare run`.
"""

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from .gate import check_gate
from .peers.peer import EXIT_USAGE, bench_peer, peer_parser
from .publish import RESULTS_FOLDER, print_charts, print_gate, print_tables, store_runs
from .results import Result, read_json, write_json
from .run import EXIT_INCOMPLETE, EXIT_REFUSED, with_commit
from .stages import Stage, discover_stages, select_stages

RunFn = Callable[[str, Path], None]
"""Measures a workload, by its spec, and writes the runs to FILE.json, FILE.run2.json, …"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compare.session", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    measure_parser = commands.add_parser("measure", allow_abbrev=False)
    measure_parser.add_argument("engine", help="a stage's folder, or a peer: vllm, hf")
    measure_parser.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    measure_parser.add_argument("--runs", type=int, default=3)
    measure_parser.add_argument("--run", action="append", required=True, metavar="NAME=SPEC")
    publish_parser = commands.add_parser("publish", allow_abbrev=False)
    publish_parser.add_argument("folder", type=Path, help="what `measure` wrote to")
    publish_parser.add_argument("--results", type=Path, default=RESULTS_FOLDER)
    publish_parser.add_argument("--commit", help="what was measured, if it ran from a copy")
    options, rest = parser.parse_known_args(argv)
    try:
        if options.command == "measure":
            return measure(options, rest)
        if rest:
            parser.error(f"unknown arguments: {' '.join(rest)}")
        return publish(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"compare.session: {error}", file=sys.stderr)
        return EXIT_USAGE


def measure(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Every workload of `options.run` in turn, on one engine."""
    workloads = dict(text.partition("=")[::2] for text in options.run)
    if not all(workloads) or not all(workloads.values()):
        raise ValueError(f"--run takes NAME=SPEC, such as nano=nano; got {options.run}")
    if len(workloads) < len(options.run):
        raise ValueError(f"--run: give every workload a name of its own; got {options.run}")
    (stage,) = select_stages(discover_stages(Path()), [options.engine])
    words = ["bench", "--workload", "of each run", *rest]
    return (_on_peer if stage.is_peer else _on_stage)(stage, words, workloads, options)


def _on_stage(
    stage: Stage, words: list[str], workloads: dict[str, str], options: argparse.Namespace
) -> int:
    from folovllm.cli.bench import run_bench
    from folovllm.cli.main import build_parser, make_llm

    llm_class = importlib.import_module(stage.module).LLM
    arguments = build_parser(llm_class).parse_args(words)
    arguments.runs = options.runs
    llm = make_llm(llm_class, arguments)

    def run(spec: str, file: Path) -> None:
        arguments.workload, arguments.output = spec, file
        run_bench(llm, stage.name, arguments)

    return _run_all(stage.name, workloads, options.to, run)


def _on_peer(
    stage: Stage, words: list[str], workloads: dict[str, str], options: argparse.Namespace
) -> int:
    from folovllm.cli.options import given_fields

    module = importlib.import_module(stage.module)
    not_comparable = getattr(module, "NOT_COMPARABLE", None)
    arguments = peer_parser(stage.name, module.EngineConfig).parse_args(words)
    config = module.EngineConfig(**given_fields(arguments, module.EngineConfig))
    model_options = {
        name: getattr(arguments, name) for name in ("load_format", "dtype", "device", "seed")
    }
    with module.start(arguments.model, **model_options, config=config) as llm:

        def run(spec: str, file: Path) -> None:
            arguments.workload = spec
            for number in range(1, options.runs + 1):
                result = bench_peer(stage.name, llm, arguments, not_comparable)
                target = file if number == 1 else file.with_suffix(f".run{number}.json")
                write_json(target, {**result, "runs_in_process": options.runs})

        return _run_all(stage.name, workloads, options.to, run)


def _run_all(engine: str, workloads: dict[str, str], to: Path, run: RunFn) -> int:
    num_failed = 0
    for name, spec in workloads.items():
        print(f"{engine}: {name} = {spec}", flush=True)
        try:
            run(spec, to / name / f"{engine}.json")
        except Exception:  # the workloads behind it are worth having
            num_failed += 1
            traceback.print_exc()
    return EXIT_INCOMPLETE if num_failed else 0


def publish(options: argparse.Namespace) -> int:
    """Gate every folder of runs and store those that pass."""
    folders = sorted(folder for folder in options.folder.iterdir() if folder.is_dir())
    if not folders:
        raise ValueError(f"no folder of runs under {options.folder}; run `measure` first")
    status, stored = 0, []
    for folder in folders:
        runs: dict[str, list[Result]] = {}
        for file in sorted(folder.glob("*.json")):
            result = with_commit(read_json(file), options.commit)
            runs.setdefault(result["stage"], []).append(result)
        if not runs:
            print(f"{folder}: no run finished")
            continue
        gate = check_gate(runs)
        print(folder)
        print_gate(gate)
        if not gate.passed:
            status = EXIT_REFUSED
            continue
        device = next(iter(runs.values()))[0]["device"]
        published = store_runs(runs, options.results / device / folder.name)
        for aside in published.set_aside:
            print(f"moved away, not comparable with these runs: {aside}")
        stored.append(published.folder)
    print_tables(stored, Path())
    print_charts(stored)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
