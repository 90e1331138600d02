"""`compare show`: a stage and the one before it on the workload that the stage declares."""

import argparse
import sys
from collections.abc import Sequence

from .charts import draw_chart
from .gate import check_gate
from .publish import print_gate, store_runs
from .run import EXIT_INCOMPLETE, EXIT_REFUSED, finished_runs, measure
from .runner import FailedRun
from .shows import Show, read_show
from .verdict import find_metrics, verdict


def show(options: argparse.Namespace, extra: Sequence[str]) -> int:
    """Measure both, gate, and end with one sentence and one chart."""
    declared = read_show(options.root, options.stage)
    find_metrics(declared.metrics)  # fail now, not after the runs
    options.workload = options.workload or declared.workload
    options.stages = f"{declared.previous},{declared.stage}"
    options.stage_option = [*_stage_options(declared), *options.stage_option]
    outcomes, settings = measure(options, [*_words(declared), *extra])
    runs = finished_runs(outcomes, commit=None)
    gate = check_gate(runs)
    print_gate(gate)
    if not gate.passed:
        print(f"No verdict; the runs are in {settings.runs_folder}", file=sys.stderr)
        return EXIT_REFUSED
    failed = [outcome for outcome in outcomes if isinstance(outcome, FailedRun)]
    if not {declared.previous, declared.stage} <= runs.keys():
        print("No verdict: one of the two has no run that finished", file=sys.stderr)
        return EXIT_INCOMPLETE
    published = store_runs(runs, options.results / declared.stage)
    chart = draw_chart(declared.chart, published.results, published.folder)
    print(f"\n{verdict(declared.metrics, runs[declared.stage], runs[declared.previous])}")
    print(f"chart: {chart}")
    return EXIT_INCOMPLETE if failed else 0


def _words(declared: Show) -> list[str]:
    """The declared options as words of a command line; later words of a user replace them."""
    common = {name: value for name, value in declared.options.items() if "." not in name}
    return [f"--{name.replace('_', '-')}={value}" for name, value in common.items()]


def _stage_options(declared: Show) -> list[str]:
    """Those that are for one stage, as `--stage-option` takes them."""
    return [f"{name}={value}" for name, value in declared.options.items() if "." in name]
