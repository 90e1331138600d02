"""Holds the copies honest: a stage differs from the one before exactly where stages.toml says."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from .code_lines import count_code_lines
from .import_rules import import_problems
from .stages import MANIFEST, Stage, load_stages, stage_files, stage_folders


@dataclass(frozen=True, kw_only=True)
class StageSize:
    """How big a stage is, and how big its step."""

    name: str
    num_code_lines: int
    max_code_lines: int
    num_lines_added: int
    """Against the previous stage, in the files that readers compare."""
    num_lines_removed: int


@dataclass(frozen=True)
class StageReport:
    """What a check found; the stages are honest if there are no problems."""

    problems: tuple[str, ...]
    sizes: tuple[StageSize, ...]

    def __str__(self) -> str:
        if self.problems:
            listed = "\n".join(f"  {problem}" for problem in self.problems)
            return f"check-stages found {len(self.problems)} problem(s):\n{listed}"
        lines = [f"{'stage':<16}{'code lines':>11}{'budget':>8}{'changed against previous':>26}"]
        for size in self.sizes:
            changed = f"+{size.num_lines_added} -{size.num_lines_removed}"
            lines.append(
                f"{size.name:<16}{size.num_code_lines:>11}{size.max_code_lines:>8}{changed:>26}"
            )
        return "\n".join(lines)


def check_stages(root: Path) -> StageReport:
    """Check every declared stage whose folder exists. StageError if stages.toml is wrong."""
    declared, existing = load_stages(root), stage_folders(root)
    problems = [
        f"{name}/ is not declared; add [{name}] to {MANIFEST}"
        for name in existing
        if name not in declared
    ]
    sizes = []
    for stage in declared.values():
        if stage.name not in existing:
            continue
        if stage.previous is not None and stage.previous not in existing:
            problems.append(f"{stage.name}/ is there, its previous stage {stage.previous}/ is not")
            continue
        if stage.previous is not None and not stage.has_show:
            problems.append(
                f"{stage.name}/ does not say what shows its idea; add [{stage.name}.show] with "
                f"workload, metrics and chart to {MANIFEST}"
            )
        try:
            size = _measure(root, stage)
        except SyntaxError as error:
            problems.append(f"{error.filename}:{error.lineno} is not Python: {error.msg}")
            continue
        sizes.append(size)
        problems += _difference_problems(root, stage)
        if size.num_code_lines > stage.max_code_lines:
            problems.append(
                f"{stage.name}/ has {size.num_code_lines} code lines, its budget is "
                f"{stage.max_code_lines}; make it shorter, or raise max_code_lines in {MANIFEST}"
            )
    try:
        problems += import_problems(root, existing)
    except SyntaxError as error:
        problems.append(f"{error.filename}:{error.lineno} is not Python: {error.msg}")
    return StageReport(tuple(dict.fromkeys(problems)), tuple(sizes))


def _difference_problems(root: Path, stage: Stage) -> list[str]:
    if stage.previous is None:
        return []
    before, after = stage_files(root / stage.previous), stage_files(root / stage.name)
    problems = []
    for file in sorted(before.keys() | after.keys()):
        here, there = f"{stage.name}/{file}", f"{stage.previous}/{file}"
        expected = _declaration(stage, file)
        if file not in before:
            found, advice = "added", f'add "{file}" to added, or delete the file'
        elif file not in after:
            found, advice = "removed", f"run propagate for {there}, or copy it"
        elif before[file].read_bytes() != after[file].read_bytes():
            found, advice = "changed", f'add "{file}" to changed, or copy {there}'
        else:
            found, advice = "identical", f'take "{file}" off the list'
        if found != expected:
            problems.append(
                f"{here} is {found}, {MANIFEST} declares it {expected} against {stage.previous}; "
                f"{advice}"
            )
    for file in sorted(
        (stage.changed | stage.added | stage.removed) - before.keys() - after.keys()
    ):
        problems.append(
            f"{stage.name}/{file} is missing, {MANIFEST} declares it {_declaration(stage, file)}; "
            f"write the file, or take it off the list"
        )
    return problems


def _declaration(stage: Stage, file: str) -> str:
    lists = {"changed": stage.changed, "added": stage.added, "removed": stage.removed}
    return next((name for name, files in lists.items() if file in files), "identical")


def _measure(root: Path, stage: Stage) -> StageSize:
    after = stage_files(root / stage.name)
    before = stage_files(root / stage.previous) if stage.previous else {}
    num_code_lines = 0
    for name, path in after.items():
        if name.endswith(".py"):
            try:
                num_code_lines += count_code_lines(path.read_text(encoding="utf-8"))
            except SyntaxError as error:
                error.filename = str(path.relative_to(root))
                raise
    changes = [
        line[0]
        for file in before.keys() | after.keys()
        if stage.previous
        for line in list(
            difflib.unified_diff(_lines(before.get(file)), _lines(after.get(file)), n=0)
        )[2:]
    ]
    return StageSize(
        name=stage.name,
        num_code_lines=num_code_lines,
        max_code_lines=stage.max_code_lines,
        num_lines_added=changes.count("+"),
        num_lines_removed=changes.count("-"),
    )


def _lines(path: Path | None) -> list[str]:
    """The lines of a text file; none where there is no file."""
    return [] if path is None else path.read_text(encoding="utf-8").splitlines(keepends=True)
