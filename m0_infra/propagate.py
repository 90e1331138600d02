"""Carries a fix in one stage's file forward to the stages built on it."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .stages import MANIFEST, Stage, StageError, find_stage, load_stages


@dataclass(frozen=True)
class Version:
    """A stage's file before the fix (None: not there) and after it."""

    old: str | None
    new: str


def propagate(root: Path, stage_name: str, file: str, base: str = "HEAD") -> list[str]:
    """Bring the change of `stage/file` since the commit `base` to all later stages that exist.

    Writes the later stages' files, in order: a copy while a file is as the previous stage's was,
    a three-way merge where stages.toml declares it changed. Stops at the first that cannot be
    done, leaving that file and those after it as they are. Returns what was done, one line each;
    StageError says what could not be done and lists what was done before.
    """
    stages = load_stages(root)
    stage = find_stage(stages, stage_name)
    source = root / stage.name / file
    if not source.is_file():
        raise StageError(f"{stage.name}/{file} is not there; nothing can be carried forward")
    version = Version(_content_at(root, base, f"{stage.name}/{file}"), _read(source))
    if version.old == version.new:
        raise StageError(
            f"{stage.name}/{file} is as in {base}; change it first, or name the commit before the "
            f"change with --base"
        )
    done: list[str] = []
    while later := _next_stage(root, stages, stage):
        if file in later.added | later.removed:
            done.append(f"{later.name}/{file}: has its own or none, ends here")
            break
        try:
            version, what = _carry(root, later, file, stage, version, base)
        except StageError as error:
            told = "\n".join(["before that:", *done]) if done else "nothing was written"
            raise StageError(f"{error}\n{told}") from None
        done.append(f"{later.name}/{file}: {what}")
        stage = later
    return done or [f"{stage.name} is the last stage; nothing to do"]


def _carry(
    root: Path, later: Stage, file: str, before: Stage, version: Version, base: str
) -> tuple[Version, str]:
    """Bring `version` of the stage `before` into `later`; return its version and what was done."""
    target = root / later.name / file
    old = _content_at(root, base, f"{later.name}/{file}")
    current = _read(target) if target.is_file() else None
    if current == version.new:
        return Version(old, version.new), "already up to date"
    if current == version.old:
        target.write_text(version.new, encoding="utf-8", newline="")
        return Version(old, version.new), "copied"
    if file not in later.changed:
        raise StageError(
            f"{later.name}/{file} differs from {before.name}/{file} as of {base}, but {MANIFEST} "
            f"does not declare it changed; copy it by hand or declare it"
        )
    if current is None or version.old is None:
        raise StageError(
            f"{later.name}/{file} cannot be merged: it is missing now, or "
            f"{before.name}/{file} is not in {base}; write it by hand"
        )
    merged = _merge(current, version.old, version.new, (later.name, base, before.name), file)
    if merged == current:
        return Version(old, merged), "already has the change"
    target.write_text(merged, encoding="utf-8", newline="")
    return Version(old, merged), "merged"


def _merge(current: str, old: str, new: str, labels: tuple[str, str, str], file: str) -> str:
    """Three-way merge by git; StageError showing the places if both sides changed the same."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("current", "old", "new")]
        for path, content in zip(paths, (current, old, new), strict=True):
            path.write_text(content, encoding="utf-8", newline="")
        command = ["git", "merge-file", "-p"]
        for label in labels:
            command += ["-L", f"{label}/{file}"]
        result = subprocess.run([*command, *map(str, paths)], capture_output=True)
    merged = result.stdout.decode("utf-8")
    if result.returncode == 0:
        return merged
    # merge-file exits with the number of conflicts, or 255 for an error.
    if result.returncode > 127:
        raise StageError(f"git merge-file failed: {result.stderr.decode(errors='replace')}")
    hunks = re.findall(r"^<{7} .*?^>{7} [^\n]*\n", merged, flags=re.MULTILINE | re.DOTALL)
    raise StageError(
        f"{labels[0]}/{file} was left untouched: it conflicts with the change of "
        f"{labels[2]}/{file} in {len(hunks)} place(s); edit it by hand, then run propagate for "
        f"--stage {labels[0]}\n{''.join(hunks)}"
    )


def _next_stage(root: Path, stages: dict[str, Stage], stage: Stage) -> Stage | None:
    """The stage built on `stage`, if its folder exists."""
    for later in stages.values():
        if later.previous == stage.name and (root / later.name).is_dir():
            return later
    return None


def _content_at(root: Path, commit: str, path: str) -> str | None:
    """A file as of a commit, or None if the commit has no such file."""
    _git(root, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    if not _git(root, "ls-tree", commit, "--", path):
        return None
    # ls-tree and `./` take the path from the current folder, which need not be git's top.
    return _git(root, "show", f"{commit}:./{path}")


def _git(root: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], cwd=root, capture_output=True)
    except OSError as error:
        raise StageError(f"propagate needs git: {error}") from error
    if result.returncode != 0:
        said = result.stderr.decode(errors="replace").strip() or "no such commit"
        raise StageError(f"git {' '.join(arguments)} failed in {root}: {said}")
    return result.stdout.decode("utf-8")


def _read(path: Path) -> str:
    with path.open(encoding="utf-8", newline="") as file:
        return file.read()
