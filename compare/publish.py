"""From result files to table, documents, charts and report; nothing is published ungated."""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .charts import draw_all
from .data_tables import data_tables
from .documents import update_documents
from .gate import GateReport, check_gate
from .measurement_pages import write_pages
from .merge import merge_runs
from .perplexities import load_table
from .report import write_report
from .results import Result, folder_key, load_folder, read_json, write_json
from .table import markdown_table, short_table, terminal_table

RESULTS_FOLDER = Path("compare/results")
"""Under the project's root: results that documents quote."""
SHORT = "short"
"""`<!-- compare:DEVICE/WORKLOAD/short:begin -->` marks the place of the table of four columns."""
USER_FOLDER = Path("build/compare")
"""Where a user's results go: ignored by git, and quoted by no document."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """Files that `store_runs` wrote."""

    folder: Path
    results: tuple[Result, ...]
    set_aside: tuple[Path, ...]
    """Earlier results of another model or setting, moved out of the table."""


MayStay = Callable[[Result, Sequence[Result]], bool]
"""Whether an earlier result may stand in one table with new ones."""


def may_stay_beside(earlier: Result, new: Sequence[Result]) -> bool:
    """Whether it passes the gate against the new ones: same model, dtype, seed and workload."""
    return check_gate({result["stage"]: [result] for result in (*new, earlier)}).passed


def store_runs(
    runs_by_stage: Mapping[str, Sequence[Result]],
    folder: Path,
    may_stay: MayStay = may_stay_beside,
) -> Published:
    """Merge the runs of every stage into `<folder>/<stage>.json`; the caller has gated them.

    Results of stages that did not run now stay if they may. Else they move to
    `<folder>/superseded/`: they would stand beside numbers that they cannot be compared with.
    """
    merged = [merge_runs(runs) for runs in runs_by_stage.values() if runs]
    if not merged:
        raise ValueError("no run finished, so there is nothing to publish")
    set_aside = []
    for file in sorted(folder.glob("*.json")):
        if file.stem not in runs_by_stage and not may_stay(read_json(file), merged):
            target = folder / "superseded" / file.name
            target.parent.mkdir(exist_ok=True)
            set_aside.append(file.replace(target))
    for result in merged:
        write_json(folder / f"{result['stage']}.json", result)
    return Published(folder=folder, results=tuple(load_folder(folder)), set_aside=tuple(set_aside))


def gate_folder(folder: Path) -> GateReport:
    """The gate over what is stored, for those who only redraw."""
    return check_gate({result["stage"]: [result] for result in load_folder(folder)})


def write_tables(folders: Sequence[Path], root: Path) -> list[Path]:
    """Put the tables of these folders into the documents under `root`; returns changed files.

    Only results under `<root>/compare/results` are the project's: those of a trial elsewhere
    would put numbers into documents whose files are not checked in beside them.
    """
    folders = _of_project(folders, root)
    if not folders:
        return []
    return update_documents(root, document_tables(folders, root))


def document_tables(folders: Sequence[Path], root: Path) -> dict[str, str]:
    """Markdown by key of its marker: of these folders, and of what lies in `docs/dev/data`."""
    tables = data_tables(root)
    for folder in folders:
        results = load_table(folder)
        tables[folder_key(folder)] = markdown_table(results)
        tables[f"{folder_key(folder)}/{SHORT}"] = short_table(results)
    return tables


def _of_project(folders: Sequence[Path], root: Path) -> list[Path]:
    own = (root / RESULTS_FOLDER).resolve()
    return [folder for folder in folders if own in folder.resolve().parents]


def draw_folder(folder: Path) -> tuple[list[Path], Path]:
    """Charts and report of one folder; returns the PNG files and the HTML file."""
    results = load_table(folder)
    charts = draw_all(results, folder / "charts")
    return charts, write_report(results, charts, folder / "report.html")


def print_tables(folders: Sequence[Path], root: Path) -> None:
    """Print the tables of these folders and put them into the documents."""
    width = shutil.get_terminal_size((100, 24)).columns
    for folder in folders:
        print(f"\n{folder}\n\n{terminal_table(load_table(folder), width)}\n")
    for file in write_tables(folders, root):
        print(f"table updated in {file}")


def print_charts(folders: Sequence[Path]) -> None:
    """Draw charts and reports of these folders and say where they are."""
    for folder in folders:
        charts, report = draw_folder(folder)
        print(f"charts: {', '.join(str(chart) for chart in charts)}\nreport: {report}")


def print_pages(folders: Sequence[Path], root: Path) -> None:
    """Bring the pages of all measurements up to date, if these folders are on them."""
    if _of_project(folders, root):
        for file in write_pages(root):
            print(f"all measurements: {file}")


def print_gate(gate: GateReport) -> None:
    for note in gate.notes:
        print(f"gate: {note}")
    for failure in gate.failures:
        print(f"gate FAILED: {failure}", file=sys.stderr)
    if gate.passed:
        print(f"gate passed: {gate.num_tokens_compared} tokens compared")
