"""Says what this machine has, how fast it is, and whether the stages can run on it."""

import importlib.util
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from .memories import cpu_memories, gpu_memories

REQUIRED: Mapping[str, str] = MappingProxyType(
    {
        "torch": "2.11",
        "transformers": "5.17",
        "safetensors": "0.5",
        "numpy": "2.0",
        "tqdm": "4.0",
    }
)
"""What every stage imports, and the oldest version that it is written for."""
OPTIONAL: Mapping[str, str] = MappingProxyType(
    {
        "triton": "fused kernels on a GPU",
        "flash_attn": "FlashAttention 2, for peers that compare runs",
        "flash_attn_interface": "FlashAttention 3, for peers that compare runs",
        "gguf": "fetching the embedded model (m0_infra fetch)",
        "matplotlib": "charts (compare)",
        "pynvml": "GPU utilisation in benchmark results",
        "vllm": "vLLM as a peer (compare)",
        "nanovllm": "nano-vllm as a peer (compare)",
    }
)
"""What else is looked for, and what it would enable."""
OLDEST_PYTHON = "3.11"


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    subject: str
    value: str
    problem: str | None = None
    """Why the stages cannot run and what to do; None if this does not stop them."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found, in sections."""

    sections: Mapping[str, tuple[Finding, ...]]

    @property
    def can_run(self) -> bool:
        return not self.problems

    @property
    def problems(self) -> list[str]:
        return [
            f"{finding.subject}: {finding.problem}"
            for findings in self.sections.values()
            for finding in findings
            if finding.problem is not None
        ]

    def __str__(self) -> str:
        width = max(len(f.subject) for findings in self.sections.values() for f in findings)
        lines: list[str] = []
        for title, findings in self.sections.items():
            lines.append(title)
            for finding in findings:
                mark = "  " if finding.problem is None else "! "
                lines.append(f"{mark}{finding.subject:<{width}}  {finding.value}")
            lines.append("")
        if self.can_run:
            lines.append("The stages can run here.")
        else:
            lines.append("The stages cannot run here:")
            lines += [f"  {problem}" for problem in self.problems]
        return "\n".join(lines)


def examine(model: Path, duration_s: float = 1.0) -> Diagnosis:
    """Look at this machine; measures each ceiling for `duration_s` seconds.

    model: the folder where the embedded model is expected.
    """
    required = (_python(), *(_required(name, oldest) for name, oldest in REQUIRED.items()))
    sections: dict[str, tuple[Finding, ...]] = {"Required": required}
    if importlib.util.find_spec("torch") is not None:
        sections["Device"] = _device(duration_s)
    sections["Model"] = (_model(model),)
    sections["Optional"] = tuple(_optional(name, use) for name, use in OPTIONAL.items())
    return Diagnosis(sections)


def _python() -> Finding:
    version = platform.python_version()
    problem = None
    if _numbers(version) < _numbers(OLDEST_PYTHON):
        problem = f"{version} is older than {OLDEST_PYTHON}; make the environment with a newer one"
    return Finding("python", version, problem)


def _required(name: str, oldest: str) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, "missing", f"not installed; run: pip install '{name}>={oldest}'")
    if _numbers(version) < _numbers(oldest):
        problem = f"{version} is older than {oldest}; run: pip install --upgrade '{name}>={oldest}'"
        return Finding(name, version, problem)
    return Finding(name, version)


def _optional(name: str, use: str) -> Finding:
    version = _version(name)
    return Finding(name, f"{version or 'missing':<14}{use}")


def _device(duration_s: float) -> tuple[Finding, ...]:
    import torch

    from folovllm.hardware import describe_environment, device_slug, measure_ceilings

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = describe_environment()
    ceilings = measure_ceilings(device, duration_s)
    findings = [
        Finding("device", f"{found['device']} ({device_slug(device)})"),
        Finding("cpu cores", str(found["num_cpu_cores"])),
        Finding("host memory", _gib(found["memory_bytes"])),
    ]
    if device.type == "cuda":
        memories = gpu_memories(torch.cuda.get_device_properties(device))
        findings += [
            *(Finding(name, value) for name, value in memories),
            Finding("GPU memory", _gib(found["gpu_memory_bytes"])),
            Finding("driver", f"{found['driver']}, CUDA {found['cuda']}"),
        ]
    else:
        findings += [Finding(name, value) for name, value in cpu_memories()]
    findings += [
        Finding("copy", f"{ceilings.copy_bytes_per_s / 1e9:,.0f} GB/s read + written"),
        Finding("matmul", f"{ceilings.matmul_flops_per_s / 1e12:,.2f} TFLOP/s {ceilings.dtype}"),
    ]
    return tuple(findings)


def _model(directory: Path) -> Finding:
    """Not having the model stops nobody: any other model directory will do."""
    from .fetch import is_complete

    if is_complete(directory):
        return Finding(str(directory), "present and complete")
    if directory.exists():
        return Finding(str(directory), "damaged; run: python -m m0_infra fetch")
    return Finding(str(directory), "missing; run: python -m m0_infra fetch")


def _version(name: str) -> str | None:
    """The version of an importable module, "present" if it has none, None if it is not there."""
    if importlib.util.find_spec(name) is None:
        return None
    from importlib import metadata

    for distribution in metadata.packages_distributions().get(name, ()):
        return metadata.version(distribution)
    return "present"


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparing: "2.13.0+cpu" -> (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")) if found else ()


def _gib(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 2**30:.1f} GiB"
