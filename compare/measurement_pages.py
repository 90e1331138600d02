"""Pages of the book with all measurements: tables made from result files, and their charts."""

from pathlib import Path

from .results import load_folder
from .table import markdown_table

RESULTS_FOLDER = Path("compare/results")
"""Named again: `publish` draws charts, and the book is built where matplotlib is not."""
CHARTS = ("throughput", "timeline", "latency", "memory", "token-gaps", "ttft-over-hit")
"""Those that a page shows; the report beside them has all."""


def measurement_pages(root: Path) -> dict[str, str]:
    """Markdown by path below docs/: a page for each device, and a list of them."""
    pages = {}
    devices = sorted(path for path in (root / RESULTS_FOLDER).iterdir() if path.is_dir())
    for device in devices:
        folders = [path for path in sorted(device.iterdir()) if any(path.glob("*.json"))]
        if folders:
            sections = [_section(root, folder) for folder in folders]
            pages[f"results/{device.name}.md"] = "\n".join([f"# {device.name}", "", *sections])
    lines = [f"- [{Path(page).stem}]({Path(page).name})" for page in pages]
    pages["results/README.md"] = "\n".join([_INTRODUCTION, *lines, ""])
    return pages


_INTRODUCTION = """# All measurements

Every table here is made from the JSON files in compare/results while the site is built;
`make compare PUBLISH=1` measures, `make charts` draws. [How to read a
table](../guides/benchmarking.md). What the numbers mean for a stage is in its note.
One page for each device:
"""


def _section(root: Path, folder: Path) -> str:
    path = f"../../{folder.relative_to(root).as_posix()}"
    lines = [f"## {folder.name}", "", markdown_table(load_folder(folder)), ""]
    lines += [
        f"![{chart} of {folder.name}]({path}/charts/{chart}.png){{ loading=lazy }}"
        for chart in CHARTS
        if (folder / "charts" / f"{chart}.png").is_file()
    ]
    files = [file.name for file in sorted(folder.glob("*.json"))]
    if (folder / "report.html").is_file():
        files.insert(0, "report.html")
    lines += ["", "Files: " + ", ".join(f"[{name}]({path}/{name})" for name in files) + ".", ""]
    return "\n".join(lines)


def folder_places(root: Path) -> dict[str, str]:
    """Where those pages show a folder of results; both are paths, of repository and site."""
    folders = (path for path in (root / RESULTS_FOLDER).glob("*/*") if any(path.glob("*.json")))
    places = {RESULTS_FOLDER.as_posix(): "results/README.md"}
    for folder in folders:
        device, path = folder.parent, folder.relative_to(root).as_posix()
        places[path] = f"results/{device.name}.md#{folder.name}"
        places[device.relative_to(root).as_posix()] = f"results/{device.name}.md"
    return places
