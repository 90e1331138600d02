"""Many workloads on one engine that is started once, where GPU time is short.

    python -m compare.session measure m5_chunked --to build/session --runs 3 \\
        --run nano=nano --run batch-8=fixed:batch=8,input=512,output=128 \\
        --model qwen3-0.6b --load-format dummy --dtype bfloat16 --max-model-len 2048
    python -m compare.session publish build/session

`measure` takes the options of the engine's own `bench`, writes one file per run under
TO/NAME/ and a line per workload into TO/measured.json, and goes on with the next workload if one
fails. `--kv-cache-bytes fit` gives a stage what it needed for the largest of these workloads when
it had plenty, which earlier runs under TO show. `publish` checks what all engines measured against
each other and puts it into compare/results/DEVICE/NAME, with tables and charts.
Runs of one engine share a process; the table says so. Exit status as of `python -m compare run`.
"""

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .agreement import FITTED
from .fit import fit_bytes, without_fit
from .gate import check_gate
from .ledger import measured, record
from .peers.peer import EXIT_USAGE, bench_peer, peer_parser
from .publish import (
    RESULTS_FOLDER,
    MayStay,
    may_stay_beside,
    print_charts,
    print_gate,
    print_pages,
    print_tables,
    store_runs,
)
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
    measure_parser.add_argument("--commit", help="what is measured, if this is a copy")
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
    session = Session(
        engine=stage.name,
        workloads=workloads,
        to=options.to,
        num_runs=options.runs,
        commit=options.commit,
    )
    return (_on_peer if stage.is_peer else _on_stage)(stage, words, session)


@dataclass(frozen=True, kw_only=True)
class Session:
    """What one engine measures, and where the runs go."""

    engine: str
    workloads: Mapping[str, str]
    """Folder -> spec."""
    to: Path
    num_runs: int
    commit: str | None
    """What the user states that is measured."""

    def measure(self, run: RunFn, facts: Mapping[str, object]) -> int:
        """Every workload in turn; `facts` go into every result. Returns the exit status."""
        num_failed = 0
        for name, spec in self.workloads.items():
            print(f"{self.engine}: {name} = {spec}", flush=True)
            file = self.to / name / f"{self.engine}.json"
            try:
                run(spec, file)
                self._record(name, run_files(file, self.num_runs), facts)
            except Exception:  # the workloads behind it are worth having
                num_failed += 1
                traceback.print_exc()
        return EXIT_INCOMPLETE if num_failed else 0

    def _record(self, name: str, files: Sequence[Path], facts: Mapping[str, object]) -> None:
        runs = []
        for file in files:
            result = {**with_commit(read_json(file), self.commit), **facts}
            write_json(file, result)
            runs.append(result)
        record(self.to, measured(name, runs))


def run_files(file: Path, num_runs: int) -> list[Path]:
    """FILE.json, FILE.run2.json, …"""
    return [file, *(file.with_suffix(f".run{run}.json") for run in range(2, num_runs + 1))]


def _on_stage(stage: Stage, words: list[str], session: Session) -> int:
    from folovllm.cli.bench import run_bench
    from folovllm.cli.main import build_parser, make_llm

    llm_class = importlib.import_module(stage.module).LLM
    unfitted, is_fitted = without_fit(words)
    arguments = build_parser(llm_class).parse_args(unfitted)
    arguments.runs = session.num_runs
    if is_fitted:
        specs = list(session.workloads.values())
        arguments.kv_cache_bytes = fit_bytes(
            arguments, llm_class.config_class, session.to, stage.name, specs
        )
    llm = make_llm(llm_class, arguments)

    def run(spec: str, file: Path) -> None:
        arguments.workload, arguments.output = spec, file
        run_bench(llm, stage.name, arguments)

    return session.measure(run, {FITTED: True} if is_fitted else {})


def _on_peer(stage: Stage, words: list[str], session: Session) -> int:
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
            for target in run_files(file, session.num_runs):
                result = bench_peer(stage.name, llm, arguments, not_comparable)
                write_json(target, {**result, "runs_in_process": session.num_runs})

        return session.measure(run, {})


def publish(options: argparse.Namespace) -> int:
    """Gate every folder of runs and store those that pass."""
    runs = read_runs(options.folder, options.commit)
    return publish_runs(runs, options.results, may_stay_beside)


def read_runs(to: Path, commit: str | None) -> dict[str, dict[str, list[Result]]]:
    """What was measured into `to`, by folder and engine; `commit` as in `with_commit`."""
    folders = sorted(folder for folder in to.iterdir() if folder.is_dir())
    if not folders:
        raise ValueError(f"no folder of runs under {to}; run `measure` first")
    found: dict[str, dict[str, list[Result]]] = {}
    for folder in folders:
        for file in sorted(folder.glob("*.json")):
            result = with_commit(read_json(file), commit)
            by_engine = found.setdefault(folder.name, {})
            by_engine.setdefault(result["stage"], []).append(result)
        if folder.name not in found:
            print(f"{folder}: no run finished")
    return found


def publish_runs(
    runs_by_folder: Mapping[str, Mapping[str, Sequence[Result]]], results: Path, may_stay: MayStay
) -> int:
    """Store what passes the gate, a folder at a time, and draw it; returns the exit status."""
    status, stored = 0, []
    for name, runs in runs_by_folder.items():
        gate = check_gate(runs)
        print(name)
        print_gate(gate)
        if not gate.passed:
            status = EXIT_REFUSED
            continue
        device = next(iter(runs.values()))[0]["device"]
        published = store_runs(runs, results / device / name, may_stay)
        for aside in published.set_aside:
            print(f"moved away, not comparable with these runs: {aside}")
        stored.append(published.folder)
    print_tables(stored, Path())
    print_charts(stored)
    print_pages(stored, Path())
    return status


if __name__ == "__main__":
    raise SystemExit(main())
