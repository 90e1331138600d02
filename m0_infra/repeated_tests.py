"""Tests that would test the same bytes again: a stage copies what it does not change, tests too."""

from collections.abc import Iterable
from pathlib import Path

from .stages import Stage


def repeated_test_files(root: Path, stages: dict[str, Stage], files: Iterable[Path]) -> set[Path]:
    """Those of `files` that repeat another one of them, on a file that is the same.

    `m5_chunked/tests/test_block_pool.py` repeats `m4_flash/tests/test_block_pool.py` if the two
    differ in the stage's name only and both stages have the same block_pool.py, byte for byte.
    """
    given = set(files)
    return {file for file in given if _original(root, stages, file) in given}


def _original(root: Path, stages: dict[str, Stage], file: Path) -> Path | None:
    """The file in the previous stage that this one repeats."""
    if file.parent.name != "tests" or file.parent.parent.parent != root:
        return None
    stage = stages.get(file.parent.parent.name)
    if stage is None or stage.previous is None:
        return None
    module = file.name.removeprefix("test_")
    code, previous_code = root / stage.name / module, root / stage.previous / module
    previous = root / stage.previous / "tests" / file.name
    if not (code.is_file() and previous_code.is_file() and previous.is_file()):
        return None
    text = file.read_text(encoding="utf-8").replace(stage.name, stage.previous)
    is_same = text == previous.read_text(encoding="utf-8")
    return previous if is_same and code.read_bytes() == previous_code.read_bytes() else None
