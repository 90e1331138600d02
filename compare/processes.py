"""A stage's command in a process of its own, whose output goes to a file."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TAIL_LINES = 25


@dataclass(frozen=True, kw_only=True)
class EndedProcess:
    status: int | None
    """None where it took too long."""
    failure: str | None
    """None where it did what it should."""


def run_process(
    command: Sequence[str], root: Path, timeout_s: float, log_file: Path
) -> EndedProcess:
    """Run a command in `root`, the folder of the stages; what it prints goes to the log."""
    with log_file.open("w", encoding="utf-8") as log:
        try:
            status = subprocess.run(
                command,
                cwd=root,
                env=_environment(root),
                stdin=subprocess.DEVNULL,
                stdout=log,  # for people; the numbers are in the JSON
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            late = f"no result after {timeout_s:g} s (--timeout)"
            return EndedProcess(status=None, failure=late)
    return EndedProcess(status=status, failure=f"exit status {status}" if status else None)


def _environment(root: Path) -> dict[str, str]:
    """This process's environment with the bare checkout on the Python path."""
    places = [str(path) for path in (root, root / "shared") if path.is_dir()]
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join(places + ([inherited] if inherited else []))
    return {**os.environ, "PYTHONPATH": path}


def log_tail(log_file: Path) -> str:
    """Its last lines, indented."""
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:])
