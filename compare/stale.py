"""`compare stale`: stored rows that were measured with other code than today's.

Code is what a stage runs in a step: its own Python files, and the model, kernels and sampling that
all stages share. Comments, docstrings and tests are none of it.
"""

import ast
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .results import Result, folder_key, load_folder, lookup
from .stages import discover_stages, is_ladder_stage

EXIT_STALE = 4
PEERS = "compare/peers"
SHARED = tuple(
    f"shared/folovllm/{name}"
    for name in ("model", "kernels", "sampling", "memory.py", "transfer.py")
)


@dataclass(frozen=True, kw_only=True)
class StaleRow:
    """A stored result, and the files that have other code than those that it ran."""

    place: str
    """`device/workload`."""
    stage: str
    commit: str | None
    own: tuple[str, ...]
    shared: tuple[str, ...]
    reason: str | None
    """Why nothing can be compared, where that is so."""

    def __str__(self) -> str:
        told = f"{self.place}: {self.stage}, of {str(self.commit)[:10]}"
        if self.reason is not None:
            return f"{told}: {self.reason}"
        files = (*self.own, *self.shared)
        examples = ", ".join(files[:3]) + (", …" if len(files) > 3 else "")
        return f"{told}: {len(self.own)} own and {len(self.shared)} shared files: {examples}"


def stale_rows(folders: Sequence[Path], root: Path) -> list[StaleRow]:
    """Those of the folders' results that run other code now, in their order.

    ValueError if `root` is no git checkout: then nobody knows what ran.
    """
    history = History(root)
    rows = []
    for folder in folders:
        for result in load_folder(folder):
            row = _row(folder_key(folder), result, history)
            if row.own or row.shared or row.reason:
                rows.append(row)
    return rows


def _row(place: str, result: Result, history: "History") -> StaleRow:
    stage, commit = str(result["stage"]), lookup(result, "environment.commit")
    reason = None
    if commit is None:
        reason = "it does not know its commit"
    elif lookup(result, "environment.dirty"):
        reason = "it ran with changes that are in no commit"
    elif not history.has(commit):
        reason = "that commit is not in this history"
    own: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    if reason is None:
        if is_ladder_stage(stage):
            own, shared = history.changed(commit, [stage]), history.changed(commit, SHARED)
        else:
            changed = history.changed(commit, [PEERS])
            own = tuple(file for file in changed if _may_be_of_peer(file, stage))
    return StaleRow(place=place, stage=stage, commit=commit, own=own, shared=shared, reason=reason)


def _may_be_of_peer(file: str, peer: str) -> bool:
    """Whether the peer runs it: a file whose name begins with no other peer's."""
    stem = PurePosixPath(file).stem
    others = [stage.name for stage in discover_stages(Path()).values() if stage.is_peer]
    return stem.startswith(peer) or not stem.startswith(tuple(others))


class History:
    """What a git checkout says about earlier commits."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._changed: dict[tuple[str, str], bool] = {}
        """(commit, file) -> whether the file's code is another now: many rows ask the same."""
        if self._git("rev-parse", "--git-dir") is None:
            raise ValueError(f"{root.absolute()} is no git checkout: nobody knows what rows ran")

    def has(self, commit: str) -> bool:
        return self._git("cat-file", "-e", f"{commit}^{{commit}}") is not None

    def changed(self, commit: str, paths: Sequence[str]) -> tuple[str, ...]:
        """Python files under `paths` whose code differs between `commit` and the working tree."""
        told = self._git("diff", "--name-only", commit, "--", *paths) or ""
        files = [name for name in told.splitlines() if _is_code(PurePosixPath(name))]
        return tuple(file for file in files if self._is_changed(commit, file))

    def _is_changed(self, commit: str, file: str) -> bool:
        key = (commit, file)
        if key not in self._changed:
            now = self.root / file
            text = now.read_text(encoding="utf-8") if now.is_file() else None
            self._changed[key] = code_of(self._git("show", f"{commit}:./{file}")) != code_of(text)
        return self._changed[key]

    def _git(self, *words: str) -> str | None:
        """What git prints; None where it fails."""
        command = ["git", "-C", str(self.root), *words]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        return ended.stdout if ended.returncode == 0 else None


def _is_code(file: PurePosixPath) -> bool:
    return file.suffix == ".py" and "tests" not in file.parts


def code_of(source: str | None) -> str | None:
    """What a file computes, as text to compare: no comments, no docstrings, no layout."""
    if source is None:
        return None
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list):
                setattr(node, name, [s for s in statements if not _is_docstring(s)])
    return ast.dump(tree)


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
