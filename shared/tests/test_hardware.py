"""What hardware.py tells about a machine is there, plausible and stable."""

import json
import re

import pytest
import torch

from folovllm import hardware


def test_environment_is_json_and_names_versions_and_device():
    found = hardware.describe_environment()
    json.dumps(found)
    assert found["torch"] == torch.__version__
    assert re.match(r"3\.\d+", found["python"])
    assert found["device"] and found["num_cpu_cores"] >= 1
    assert found["memory_bytes"] > 1 << 28
    assert (found["gpu_memory_bytes"] is None) == (not torch.cuda.is_available())


def test_ceilings_are_positive_and_say_their_dtype():
    found = hardware.measure_ceilings("cpu", duration_s=0.01)
    assert found.copy_bytes_per_s > 1e8 and found.matmul_flops_per_s > 1e8
    assert found.dtype == "float32"


def test_fastest_run_counts_and_the_first_does_not(monkeypatch):
    times = iter([5.0, 0.2, 0.1, 0.3])
    clock = iter([0.0, 0.0, 0.0, 0.0, 9.0])
    monkeypatch.setattr(hardware, "_time_on_host_s", lambda run: next(times))
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(clock))
    runs = []
    fastest = hardware._fastest_run_s(lambda: runs.append(1), torch.device("cpu"), 1.0)
    assert fastest == 0.1 and runs == [1]


def test_device_without_ceilings_is_refused():
    with pytest.raises(ValueError, match="meta"):
        hardware.measure_ceilings("meta")


def test_slug_of_a_cpu_counts_its_cores(monkeypatch):
    monkeypatch.setattr(hardware, "num_cpu_cores", lambda: 2)
    assert hardware.device_slug("cpu") == "cpu-2-cores"
    monkeypatch.setattr(hardware, "num_cpu_cores", lambda: 1)
    assert hardware.device_slug(torch.device("cpu")) == "cpu-1-core"


def test_slug_of_a_gpu_is_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (SXM)")
    assert hardware.device_slug("cuda:0") == "nvidia-h200-sxm"


def test_commit_and_dirty_flag_are_those_of_the_checkout(tmp_path):
    import subprocess

    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert hardware._git_state(tmp_path) == (None, None)
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("-c", "user.name=t", "-c", "user.email=t@example.invalid", "commit", "-m", "one")
    commit, dirty = hardware._git_state(tmp_path)
    assert commit is not None and len(commit) == 40 and dirty is False
    (tmp_path / "file").write_text("two")
    assert hardware._git_state(tmp_path) == (commit, True)


def test_missing_package_has_no_version():
    assert hardware.package_version("no-such-package-anywhere") is None
    assert hardware.package_version("torch") is not None
