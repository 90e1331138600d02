import subprocess

import pytest

from compare.cli import main
from compare.results import write_json
from compare.stale import EXIT_STALE, code_of
from compare.tests.synthetic import make_run


def git(root, *words):
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    command = ["git", "-C", str(root), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with two stages; the commit of their first state; a second commit of one stage."""
    root = tmp_path_factory.mktemp("checkout")
    for file in ("m1_baseline/engine.py", "m2_batching/engine.py", "shared/folovllm/model/layer.py",
                 "m2_batching/tests/test_engine.py", "compare/peers/vllm_peer.py"):  # fmt: skip
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text('"""Does it."""\n\ndef step():\n    return 1\n')
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    first = git(root, "rev-parse", "HEAD")
    (root / "m2_batching/engine.py").write_text("def step():\n    return 2\n")
    (root / "m2_batching/tests/test_engine.py").write_text("assert True\n")
    (root / "m1_baseline/engine.py").write_text(
        '"""Does it well."""\n\n# one\ndef step():\n    return 1\n'
    )
    git(root, "commit", "-q", "-a", "-m", "second")
    return root, first


@pytest.fixture
def stale(checkout, tmp_path, capsys):
    root, first = checkout

    def call(stage, commit=first, dirty=False):
        run = make_run(stage)
        run["environment"] |= {"commit": commit, "dirty": dirty}
        write_json(tmp_path / "cpu/nano" / f"{stage}.json", run)
        status = main(["stale", "--results", str(tmp_path), "--root", str(root)])
        return status, capsys.readouterr().out

    return call


def test_a_row_is_stale_when_the_code_of_its_stage_has_changed(stale, checkout):
    status, told = stale("m2_batching")
    assert status == EXIT_STALE
    assert f"cpu/nano: m2_batching, of {checkout[1][:10]}: 1 own and 0 shared files" in told
    assert "m2_batching/engine.py" in told and "1 stale rows" in told


def test_comments_docstrings_and_later_commits_make_no_row_stale(stale, checkout):
    assert stale("m1_baseline") == (0, "0 stale rows\n")
    assert stale("m2_batching", commit=git(checkout[0], "rev-parse", "HEAD"))[0] == 0


def test_what_all_stages_share_makes_the_rows_of_stages_stale_and_not_those_of_peers(
    stale, checkout
):
    file = checkout[0] / "shared/folovllm/model/layer.py"
    before = file.read_text()
    file.write_text("def step():\n    return 3\n")
    try:
        assert "0 own and 1 shared" in stale("m1_baseline")[1]
        assert "nano: vllm" not in stale("vllm")[1]
    finally:
        file.write_text(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"commit": None}, "does not know its commit"),
        ({"commit": "0" * 40}, "not in this history"),
        ({"dirty": True}, "changes that are in no commit"),
    ],
)
def test_a_row_of_which_nobody_knows_what_it_ran_is_stale(stale, changes, message):
    status, told = stale("m1_baseline", **changes)
    assert status == EXIT_STALE and message in told


def test_without_git_history_nothing_can_be_said(tmp_path, capsys):
    write_json(tmp_path / "cpu/nano/m1_baseline.json", make_run())
    assert main(["stale", "--results", str(tmp_path), "--root", str(tmp_path)]) == 2
    assert "no git checkout" in capsys.readouterr().err


def test_code_is_what_is_computed():
    assert code_of("x = 1  # one\n") == code_of("x   =  1\n") != code_of("x = 2\n")
    assert code_of("class A:\n    x: int\n    'what'\n") == code_of("class A:\n    x: int\n")
