"""What the code runs on: names and versions for reports, and the ceilings that speed is held to."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The most that this device was seen to do; a roofline is drawn from these two numbers."""

    copy_bytes_per_s: float
    """Bytes read plus bytes written per second, in a copy much larger than any cache."""
    matmul_flops_per_s: float
    """Two operations per multiply-add, in a square matmul of random numbers."""
    dtype: str
    """Of the matmul: "bfloat16" on CUDA, "float32" on a CPU."""


def describe_environment() -> dict[str, Any]:
    """Everything a reader needs to judge a measurement; None for what is not there.

    `commit` and `dirty` are those of the git checkout this file lies in, if it lies in one.
    """
    cuda = torch.cuda.is_available()
    commit, dirty = _git_state(Path(__file__).resolve().parent)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": package_version("triton"),
        "transformers": package_version("transformers"),
        "numpy": package_version("numpy"),
        "device": torch.cuda.get_device_name() if cuda else cpu_model(),
        "num_devices": torch.cuda.device_count(),
        "driver": _driver_version() if cuda else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties().total_memory if cuda else None,
        "cpu": cpu_model(),
        "num_cpu_cores": num_cpu_cores(),
        "num_torch_threads": torch.get_num_threads(),
        "memory_bytes": host_memory_bytes(),
        "commit": commit,
        "dirty": dirty,
    }


def measure_ceilings(device: torch.device | str, duration_s: float | None = None) -> Ceilings:
    """Measure both ceilings, each for about `duration_s` seconds; the fastest run counts.

    The fastest, because a ceiling is what the device can do and everything else on the machine
    only takes away. None takes 1 s on CUDA, whose clocks have to rise first, and 0.3 s on a CPU.
    ValueError for a device that is neither.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"ceilings can be measured on cpu and cuda, not on {device}")
    if duration_s is None:
        duration_s = 1.0 if device.type == "cuda" else 0.3
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Ceilings(
        copy_bytes_per_s=_copy_bytes_per_s(device, duration_s),
        matmul_flops_per_s=_matmul_flops_per_s(device, dtype, duration_s),
        dtype=str(dtype).removeprefix("torch."),
    )


def device_slug(device: torch.device | str) -> str:
    """A short name for result folders: "nvidia-h200", "cpu-2-cores"."""
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        num_cores = num_cpu_cores()
        name = f"{device.type} {num_cores} core{'s' if num_cores != 1 else ''}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def num_cpu_cores() -> int:
    """CPU cores that this process may use, which a container may have fewer of than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The CPU's name, as exactly as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def host_memory_bytes() -> int | None:
    """Main memory of the machine, or None where the system does not tell."""
    if sys.platform == "win32":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def _copy_bytes_per_s(device: torch.device, duration_s: float) -> float:
    num_bytes = (1024 if device.type == "cuda" else 128) * MIB
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _fastest_run_s(lambda: target.copy_(source), device, duration_s)


def _matmul_flops_per_s(device: torch.device, dtype: torch.dtype, duration_s: float) -> float:
    size = 8192 if device.type == "cuda" else 1024
    # Random numbers: on zeros a GPU draws less power and clocks higher than in real use.
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    product = torch.empty(size, size, device=device, dtype=dtype)
    run_s = _fastest_run_s(lambda: torch.matmul(left, right, out=product), device, duration_s)
    return 2 * size**3 / run_s


def _fastest_run_s(run: Callable[[], object], device: torch.device, duration_s: float) -> float:
    """Seconds that the fastest of many runs took on the device, after one that is not counted."""
    run()
    clock = _time_on_cuda_s if device.type == "cuda" else _time_on_host_s
    fastest, end = clock(run), time.perf_counter() + duration_s
    while time.perf_counter() < end:
        fastest = min(fastest, clock(run))
    return fastest


def _time_on_host_s(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _time_on_cuda_s(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _driver_version() -> str | None:
    found = _output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], None)
    return found.splitlines()[0].strip() if found else None


def _git_state(directory: Path) -> tuple[str | None, bool | None]:
    """The commit checked out around `directory` and whether tracked files were changed since."""
    commit = _output_of(["git", "rev-parse", "HEAD"], directory)
    if commit is None:
        return None, None
    changes = _output_of(["git", "status", "--porcelain", "--untracked-files=no"], directory)
    return commit.strip(), bool(changes and changes.strip())


def _output_of(command: list[str], directory: Path | None) -> str | None:
    """What a command prints, or None if it is not installed or fails."""
    try:
        result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
