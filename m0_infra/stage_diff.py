"""Shows what a stage changes in the stage before it, and nothing else."""

import difflib
from collections.abc import Iterator
from pathlib import Path

from .stages import find_stage, load_stages, stage_files

BOLD, RED, GREEN, CYAN, RESET = "\033[1m", "\033[31m", "\033[32m", "\033[36m", "\033[0m"


def stage_diff(root: Path, stage_name: str) -> list[str]:
    """Lines of a unified diff to the previous stage, without line ends.

    Empty for the first stage. StageError if the name or stages.toml is wrong.
    """
    stage = find_stage(load_stages(root), stage_name)
    if stage.previous is None:
        return []
    before, after = stage_files(root / stage.previous), stage_files(root / stage.name)
    lines: list[str] = []
    for file in sorted(before.keys() | after.keys()):
        lines += difflib.unified_diff(
            _lines(before.get(file)),
            _lines(after.get(file)),
            fromfile=f"{stage.previous}/{file}" if file in before else "/dev/null",
            tofile=f"{stage.name}/{file}" if file in after else "/dev/null",
            lineterm="",
        )
    return lines


def coloured(lines: list[str]) -> Iterator[str]:
    """The same lines with terminal colours."""
    for line in lines:
        if line.startswith(("---", "+++")):
            yield f"{BOLD}{line}{RESET}"
        elif line.startswith("@@"):
            yield f"{CYAN}{line}{RESET}"
        elif line.startswith("+"):
            yield f"{GREEN}{line}{RESET}"
        elif line.startswith("-"):
            yield f"{RED}{line}{RESET}"
        else:
            yield line


def _lines(path: Path | None) -> list[str]:
    return [] if path is None else path.read_text(encoding="utf-8").splitlines()
