"""Pages with all measurements of a device: tables made from result files, and their charts.

There is one beside the results, for those who read the repository, and one in the book.
"""

from collections.abc import Callable
from pathlib import Path

from .perplexities import load_table
from .results import write_text
from .table import markdown_table

RESULTS_FOLDER = Path("compare/results")
"""Named again: `publish` draws charts, and the book is built where matplotlib is not."""
PAGE = "README.md"
"""Of a device, in its folder of the results."""
CHARTS = ("throughput", "timeline", "latency", "memory", "token-gaps", "ttft-over-hit")
"""Those that a page shows; the report beside them has all."""


def measurement_pages(root: Path) -> dict[str, str]:
    """Markdown by path below docs/: a page for each device, and a list of them."""
    pages = {}
    for device in _devices(root):
        prefix = f"../../{device.relative_to(root).as_posix()}/"
        pages[f"results/{device.name}.md"] = _device_page(device, prefix, _pictures)
    lines = [f"- [{Path(page).stem}]({Path(page).name})" for page in pages]
    pages["results/README.md"] = "\n".join([_INTRODUCTION, *lines, ""])
    return pages


_INTRODUCTION = """# All measurements

Every table here is made from the JSON files in compare/results while the site is built;
`make compare PUBLISH=1` measures, `make charts` draws. [How to read a
table](../guides/benchmarking.md). What the numbers mean for a stage is in its note.
One page for each device:
"""


def pages_beside_results(root: Path) -> dict[Path, str]:
    """Markdown by file: the same pages in the folders of the results, charts as links."""
    return {device / PAGE: _device_page(device, "", _links_to_charts) for device in _devices(root)}


def write_pages(root: Path) -> list[Path]:
    """Bring the pages beside the results up to date; returns those that changed."""
    changed = []
    for file, text in pages_beside_results(root).items():
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            write_text(file, text)
            changed.append(file)
    return changed


def _devices(root: Path) -> list[Path]:
    paths = (path for path in (root / RESULTS_FOLDER).glob("*") if path.is_dir())
    return sorted(path for path in paths if _folders(path))


def _folders(device: Path) -> list[Path]:
    return [path for path in sorted(device.iterdir()) if any(path.glob("*.json"))]


ShowCharts = Callable[[Path, str], list[str]]
"""Lines that show the charts of a folder, which lies at a path."""


def _device_page(device: Path, prefix: str, show_charts: ShowCharts) -> str:
    """All tables of the folder of a device; `prefix` leads from the page to that folder."""
    sections = [
        _section(folder, f"{prefix}{folder.name}", show_charts) for folder in _folders(device)
    ]
    return "\n".join([f"# {device.name}", "", _LEAD, "", *sections])


_LEAD = """Written by `python -m compare table` and `charts`. Every section is a folder of
measurements: compare rows inside of one, not across."""


def _section(folder: Path, path: str, show_charts: ShowCharts) -> str:
    lines = [f"## {folder.name}", "", markdown_table(load_table(folder)), ""]
    lines += show_charts(folder, path)
    files = [file.name for file in sorted(folder.glob("*.json"))]
    if (folder / "report.html").is_file():
        files.insert(0, "report.html")
    lines += ["", "Files: " + ", ".join(f"[{name}]({path}/{name})" for name in files) + ".", ""]
    return "\n".join(lines)


def _pictures(folder: Path, path: str) -> list[str]:
    return [
        f"![{chart} of {folder.name}]({path}/charts/{chart}.png){{ loading=lazy }}"
        for chart in CHARTS
        if (folder / "charts" / f"{chart}.png").is_file()
    ]


def _links_to_charts(folder: Path, path: str) -> list[str]:
    charts = sorted((folder / "charts").glob("*.png"))
    links = ", ".join(f"[{chart.stem}]({path}/charts/{chart.name})" for chart in charts)
    return [f"Charts: {links}."] if links else []


def folder_places(root: Path) -> dict[str, str]:
    """Where those pages show a folder of results; both are paths, of repository and site."""
    folders = (path for path in (root / RESULTS_FOLDER).glob("*/*") if any(path.glob("*.json")))
    places = {RESULTS_FOLDER.as_posix(): "results/README.md"}
    for folder in folders:
        device = folder.parent.relative_to(root).as_posix()
        page = f"results/{folder.parent.name}.md"
        places[f"{device}/{folder.name}"] = f"{page}#{folder.name}"
        places[device] = places[f"{device}/{PAGE}"] = page
    return places
