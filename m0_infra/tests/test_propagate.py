"""propagate carries a change to later stages by copy or merge, and stops at a conflict."""

import pytest

from m0_infra.check_stages import check_stages
from m0_infra.propagate import propagate
from m0_infra.stages import StageError


def run(checkout, stage="m1", file="scheduler.py", base="HEAD"):
    return propagate(checkout.root, stage, file, base)


def test_identical_files_are_copied(checkout):
    checkout.write("m1_one/engine.py", "from .scheduler import limit, policy\n")
    assert run(checkout, file="engine.py") == [
        "m2_two/engine.py: copied",
        "m3_three/engine.py: copied",
    ]
    assert checkout.read("m3_three/engine.py") == checkout.read("m1_one/engine.py")
    assert check_stages(checkout.root).problems == ()


def test_changed_file_is_merged_and_the_merge_is_copied_on(checkout):
    checkout.replace("m1_one/scheduler.py", "limit = 1", "limit = 7")
    assert run(checkout) == ["m2_two/scheduler.py: merged", "m3_three/scheduler.py: copied"]
    merged = checkout.read("m3_three/scheduler.py")
    assert "limit = 7" in merged and "policy = 'two'" in merged
    assert check_stages(checkout.root).problems == ()


def test_second_run_changes_nothing(checkout):
    checkout.replace("m1_one/scheduler.py", "limit = 1", "limit = 7")
    run(checkout)
    before = checkout.read("m3_three/scheduler.py")
    assert run(checkout) == [
        "m2_two/scheduler.py: already has the change",
        "m3_three/scheduler.py: already up to date",
    ]
    assert checkout.read("m3_three/scheduler.py") == before


def test_conflict_leaves_the_target_untouched_and_shows_the_place(checkout):
    checkout.replace("m1_one/scheduler.py", "policy = 'one'", "policy = 'uno'")
    before = checkout.read("m2_two/scheduler.py")
    with pytest.raises(StageError) as failure:
        run(checkout)
    message = str(failure.value)
    assert "m2_two/scheduler.py was left untouched" in message and "nothing was written" in message
    assert "policy = 'uno'" in message and "policy = 'two'" in message
    assert "<<<<<<< m2_two/scheduler.py" in message
    assert checkout.read("m2_two/scheduler.py") == before


def test_later_conflict_keeps_what_was_done_before_it(checkout):
    checkout.replace(
        "m0_infra/stages.toml",
        'added = ["block_pool.py"]',
        'added = ["block_pool.py"]\nchanged = ["engine.py"]',
    )
    checkout.write("m3_three/engine.py", "from .scheduler import policy\n")
    checkout.commit()
    checkout.write("m1_one/engine.py", "from .scheduler import line_1\n")
    with pytest.raises(StageError, match=r"before that:\nm2_two/engine\.py: copied"):
        run(checkout, file="engine.py")
    assert checkout.read("m2_two/engine.py") == checkout.read("m1_one/engine.py")
    assert checkout.read("m3_three/engine.py") == "from .scheduler import policy\n"


def test_undeclared_difference_stops_it(checkout):
    checkout.write("m2_two/engine.py", "own = 1\n")
    checkout.write("m1_one/engine.py", "new = 1\n")
    with pytest.raises(StageError, match=r"m2_two/engine\.py differs.*does not declare it changed"):
        run(checkout, file="engine.py")
    assert checkout.read("m2_two/engine.py") == "own = 1\n"


def test_new_file_is_copied_to_later_stages(checkout):
    checkout.write("m1_one/config.py", "size = 1\n")
    assert run(checkout, file="config.py") == [
        "m2_two/config.py: copied",
        "m3_three/config.py: copied",
    ]


def test_change_already_committed_needs_base(checkout):
    checkout.replace("m1_one/scheduler.py", "limit = 1", "limit = 7")
    checkout.commit()
    with pytest.raises(StageError, match="--base"):
        run(checkout)
    assert run(checkout, base="HEAD~1")[0] == "m2_two/scheduler.py: merged"


def test_stage_that_has_its_own_file_ends_the_chain(checkout):
    checkout.write("m2_two/block_pool.py", "mine = 1\n")
    assert run(checkout, "m2", "block_pool.py") == [
        "m3_three/block_pool.py: has its own or none, ends here"
    ]
    assert checkout.read("m3_three/block_pool.py") == "free = []\n"


def test_last_stage_has_nothing_to_do(checkout):
    checkout.write("m3_three/engine.py", "new = 1\n")
    assert run(checkout, "m3", "engine.py") == ["m3_three is the last stage; nothing to do"]


@pytest.mark.parametrize(
    ("stage", "file", "base", "message"),
    [
        ("m9", "engine.py", "HEAD", "no stage is called 'm9'"),
        ("m1", "nothing.py", "HEAD", "m1_one/nothing.py is not there"),
        ("m1", "engine.py", "no-such-commit", "no such commit"),
    ],
)
def test_wrong_arguments_are_named(checkout, stage, file, base, message):
    with pytest.raises(StageError, match=message):
        run(checkout, stage, file, base)


def test_works_below_the_top_of_the_repository(checkout):
    (checkout.root / "deeper").mkdir()
    for name in ("m0_infra", "m1_one", "m2_two", "m3_three"):
        (checkout.root / name).rename(checkout.root / "deeper" / name)
    checkout.git("add", ".")
    checkout.commit()
    checkout.root = checkout.root / "deeper"
    checkout.replace("m1_one/scheduler.py", "limit = 1", "limit = 7")
    assert run(checkout)[0] == "m2_two/scheduler.py: merged"
