"""What a benchmark reads beside the engine's stats: host times, peak memory, GPU utilisation."""

import gc
import importlib
import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Protocol, Self

import torch

_NVML_INTERVAL_S = 0.1


class Clock(Protocol):
    """Time as the benchmark sees it; a test may pass one that it moves itself."""

    def now(self) -> float:
        """Seconds since some fixed moment; never runs backwards."""

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class HostTimers:
    """Times methods of live objects, step by step, while used as a context manager.

    Each method is hidden behind a timing function set on the instance, and uncovered again on
    exit: stages carry no measuring code. On CUDA this is the time until the call returns, with
    kernels queued and not awaited: the host's share.
    """

    def __init__(self, methods: Mapping[str, tuple[Any, str]], clock: Clock) -> None:
        """`methods`: label -> (object, method name)."""
        self.seconds: dict[str, list[float]] = {label: [] for label in methods}
        """Label -> seconds spent in that method, one entry per step."""
        self._methods = methods
        self._clock = clock

    def __enter__(self) -> Self:
        timed = {
            label: self._timed(getattr(owner, name), self.seconds[label])
            for label, (owner, name) in self._methods.items()
        }
        for label, (owner, name) in self._methods.items():
            setattr(owner, name, timed[label])
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for owner, name in self._methods.values():
            delattr(owner, name)

    def begin_step(self) -> None:
        for column in self.seconds.values():
            column.append(0.0)

    def _timed(self, method: Any, column: list[float]) -> Any:
        clock = self._clock

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = clock.now()
            result = method(*args, **kwargs)
            column[-1] += clock.now() - start
            return result

        return timed


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Hide from the garbage collector what is alive on entry, for the time of a run.

    A full collection walks every object of libraries, model and workload: tens of milliseconds
    in the middle of some step, which are nothing that the stage does.
    """
    gc.collect()  # garbage of loading and warm-up is not the run's
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far: of the CUDA allocator, or of this process where Linux allows it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # then the peak includes loading the model


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes held since `reset_peak_memory`: of tensors on CUDA, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PeakMemory(Protocol):
    """Where a benchmark asks for the most memory that a run took."""

    def reset(self) -> None:
        """Forget the peak so far."""

    def peak_bytes(self) -> int | None:
        """Most bytes held since then; None if nobody can tell."""


class ProcessMemory:
    """Peak memory of an engine that runs in this process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        reset_peak_memory(self._device)

    def peak_bytes(self) -> int:
        return peak_memory_bytes(self._device)


class GpuUtilisation:
    """Samples NVML's utilisation of one CUDA device in a thread while used as a context manager.

    NVML's number is the share of the last interval in which at least one kernel ran: it says
    that the device was busy, not that it was busy well.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml, self._handle = _nvml_handle(device)
        self._samples: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        if self._handle is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def mean(self) -> float | None:
        """Fraction of the time; None without CUDA, without pynvml, or after too short a run."""
        return fmean(self._samples) if self._samples else None

    def _sample(self) -> None:
        while not self._stop.wait(_NVML_INTERVAL_S):
            try:
                rates = self._nvml.nvmlDeviceGetUtilizationRates(self._handle)
            except self._nvml.NVMLError:
                return  # some virtual devices do not report it
            self._samples.append(rates.gpu / 100)


def _nvml_handle(device: torch.device) -> tuple[Any, Any]:
    """(pynvml, handle of the device), or (None, None) where there is no such thing."""
    if device.type != "cuda":
        return None, None
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        # By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices but not NVML's.
        uuid = torch.cuda.get_device_properties(device).uuid
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None, None
