"""diff shows what a stage changes, and only that."""

import pytest

from m0_infra.cli import main
from m0_infra.stage_diff import coloured, stage_diff
from m0_infra.stages import StageError


def test_diff_holds_the_changed_lines_of_changed_files_only(checkout):
    lines = stage_diff(checkout.root, "m2")
    assert lines[:2] == ["--- m1_one/scheduler.py", "+++ m2_two/scheduler.py"]
    changed = [line for line in lines[2:] if line[0] in "+-"]
    assert changed == ["-policy = 'one'", "+policy = 'two'"]


def test_added_file_is_shown_whole(checkout):
    assert stage_diff(checkout.root, "m3_three") == [
        "--- /dev/null",
        "+++ m3_three/block_pool.py",
        "@@ -0,0 +1 @@",
        "+free = []",
    ]


def test_colours_only_wrap_the_lines(checkout):
    lines = stage_diff(checkout.root, "m2")
    painted = list(coloured(lines))
    assert all(line in paint for line, paint in zip(lines, painted, strict=True))
    assert "\033[32m+policy = 'two'\033[0m" in painted


def test_unknown_stage_is_refused(checkout):
    with pytest.raises(StageError, match="m9"):
        stage_diff(checkout.root, "m9")


def test_command_line_prints_without_colours_into_a_pipe(checkout, capsys):
    assert main(["diff", "--stage", "m2", "--root", str(checkout.root)]) == 0
    out = capsys.readouterr().out
    assert "+policy = 'two'" in out and "\033" not in out


def test_command_line_says_so_for_the_first_stage(checkout, capsys):
    assert main(["diff", "--stage", "m1", "--root", str(checkout.root)]) == 0
    assert "first stage" in capsys.readouterr().out
