"""The doctor tells what is missing and says whether the stages can run."""

import importlib.util
from types import SimpleNamespace

import pytest

import m0_infra.doctor as doctor
from m0_infra.cli import main
from m0_infra.memories import cpu_memories, gpu_memories


@pytest.fixture
def forget(monkeypatch):
    """Make modules look as if they were not installed."""
    find_spec = importlib.util.find_spec

    def forget(*names):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name in names else find_spec(name)
        )

    return forget


def examine(tmp_path):
    return doctor.examine(tmp_path / "model", duration_s=0.01)


def test_this_machine_can_run_and_is_measured(tmp_path):
    diagnosis = examine(tmp_path)
    assert diagnosis.can_run
    found = {f.subject: f.value for section in diagnosis.sections.values() for f in section}
    assert {"python", "torch", "device", "host memory"} <= found.keys()
    assert "GB/s" in found["copy"] and "TFLOP/s" in found["matmul"]
    assert set(doctor.OPTIONAL) <= found.keys()


def test_memories_of_a_gpu_are_listed_per_multiprocessor_and_in_all():
    h200 = SimpleNamespace(
        multi_processor_count=132,
        warp_size=32,
        regs_per_multiprocessor=65_536,
        shared_memory_per_multiprocessor=228 * 1024,
        L2_cache_size=60 << 20,
    )
    assert list(gpu_memories(h200)) == [
        ("multiprocessors", "132, warps of 32 threads"),
        ("registers", "256 KiB each, 33 MiB in all"),
        ("shared memory", "228 KiB each, 29 MiB in all"),
        ("L2 cache", "60 MiB"),
    ]
    del h200.regs_per_multiprocessor  # not every build of torch tells
    assert "registers" not in dict(gpu_memories(h200))


def test_caches_of_a_cpu_are_listed_without_those_of_instructions(tmp_path):
    for index, (level, kind, size) in enumerate(
        (("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K"))
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n", encoding="utf-8")
    (tmp_path / "index3").mkdir()  # a cache of which the system tells nothing
    assert list(cpu_memories(tmp_path)) == [("L1 cache", "48 KiB"), ("L2 cache", "2048 KiB")]


def test_missing_model_is_told_with_the_command_and_stops_nobody(tmp_path):
    diagnosis = examine(tmp_path)
    assert diagnosis.can_run and "m0_infra fetch" in str(diagnosis)


def test_missing_requirement_stops_the_stages(tmp_path, forget):
    forget("safetensors")
    diagnosis = examine(tmp_path)
    assert not diagnosis.can_run
    assert "pip install 'safetensors>=" in str(diagnosis)


def test_works_without_torch(tmp_path, forget):
    forget("torch")
    diagnosis = examine(tmp_path)
    assert "Device" not in diagnosis.sections and not diagnosis.can_run


def test_too_old_version_stops_the_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "REQUIRED", {"numpy": "999.0"})
    (problem,) = examine(tmp_path).problems
    assert "older than 999.0" in problem


def test_missing_optional_package_stops_nobody(tmp_path, forget):
    forget("matplotlib", "gguf")
    diagnosis = examine(tmp_path)
    assert diagnosis.can_run
    found = {f.subject: f.value for f in diagnosis.sections["Optional"]}
    assert found["matplotlib"].startswith("missing") and "charts" in found["matplotlib"]


def test_exit_status_is_the_verdict(tmp_path, monkeypatch, capsys):
    original = doctor.examine
    monkeypatch.setattr(doctor, "examine", lambda model: original(model, duration_s=0.01))
    assert main(["doctor", "--model", str(tmp_path)]) == 0
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", "99.0")
    assert main(["doctor", "--model", str(tmp_path)]) == 1
    assert "cannot run here" in capsys.readouterr().out
