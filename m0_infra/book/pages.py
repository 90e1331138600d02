"""Pages that the site makes of files: code with colours, folders, what a stage changes."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..stage_diff import stage_diff
from ..stages import Stage

_LANGUAGES = {".py": "python", ".toml": "toml", ".txt": "text", ".sh": "bash", ".yml": "yaml"}


def code_page(root: Path, path: str, note: str) -> str:
    """A file of code as Markdown: its path, a line about it, its lines with numbers."""
    text = (root / path).read_text(encoding="utf-8").rstrip("\n")
    language = _LANGUAGES.get(Path(path).suffix, "makefile" if path == "Makefile" else "text")
    # One backtick more than the longest run of them in the code.
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    head = (
        f"---\ntitle: {path}\nsearch:\n  exclude: true\n---\n\n# `{Path(path).name}`\n\n{note}\n\n"
    )
    return f'{head}{fence}{{.{language} linenums="1"}}\n{text}\n{fence}\n'


def code_note(path: str, stages: dict[str, Stage]) -> str:
    """The line above a file's code, with links relative to the file: its folder, and in a stage
    where its text comes from."""
    folder, _, file = path.partition("/")
    if folder not in stages:
        return f"`{path}`"
    up = "../" * (path.count("/") - 1)
    return f"In [{folder}]({up}README.md), {_origin(stages[folder], file, up)}."


def folder_listing(folder: str, files: Sequence[str]) -> str:
    """Markdown with a link to every file, relative to the folder."""
    return "\n".join([f"# {folder}", "", *(f"- [{file}]({file})" for file in files), ""])


def stage_listing(stage: Stage, files: Sequence[str]) -> str:
    """A section for the end of a stage's README: its files, and which the stage is about."""
    lines = ["", "## Files on this site", ""]
    if stage.previous is not None:
        lines += [
            f"[What {stage.name} changes in {stage.previous}](diff.md), and nothing else.",
            "",
        ]
    lines += ["| file | |", "|---|---|"]
    for file in files:
        lines.append(f"| [{file}]({file}) | {_origin(stage, file)} |")
    return "\n".join([*lines, ""])


def _origin(stage: Stage, file: str, up: str = "") -> str:
    """Where a stage's file comes from; `up` leads from the page to the stage's folder."""
    if stage.previous is None:
        return "the first stage"
    if file in stage.added:
        return "**new here**"
    if file in stage.changed:
        return f"**changed here**, [before]({up}../{stage.previous}/{file})"
    return f"byte for byte as in {stage.previous}"


def first_with_these_bytes(path: str, stages: dict[str, Stage]) -> str:
    """A stage's file that is another stage's too is shown once, where the ladder has it first."""
    folder, _, file = path.partition("/")
    stage = stages.get(folder)
    while stage is not None and stage.previous is not None:
        compared = file and not file.startswith(("tests", "README", "pyproject"))
        if not compared or file in stage.changed | stage.added:
            break
        stage = stages[stage.previous]
    return path if stage is None else f"{stage.name}/{file}".rstrip("/")


def diff_page(root: Path, stage: Stage) -> str:
    """What `make diff-mN` prints, a section for each file."""
    sections = [f"# What {stage.name} changes in {stage.previous}", ""]
    sections += [f"The same as `make diff-{stage.name.partition('_')[0]}` prints.", ""]
    sections.insert(0, "---\nsearch:\n  exclude: true\n---\n")
    file_lines: list[str] = []
    for line in [*stage_diff(root, stage.name), "--- "]:
        if line.startswith("--- ") and file_lines:
            name = next(
                part.partition(" ")[2].partition("/")[2]
                for part in (file_lines[1], file_lines[0])
                if not part.endswith("/dev/null")
            )
            sections += [f"## {name}", "", "`````diff", *file_lines, "`````", ""]
            file_lines = []
        file_lines.append(line)
    return "\n".join(sections)
