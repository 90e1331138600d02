"""What `compare run` does when nothing is said: one profile for CPUs, one for CUDA devices."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Defaults of a comparison; every one can be overridden on the command line."""

    name: str
    workload: str
    model: str | None
    """None is the embedded model."""
    load_format: str = "auto"
    dtype: str = "auto"
    repeats: int = 3
    stage_workloads: Mapping[str, str] = field(default_factory=dict)
    """Stages too slow for the whole workload, and the beginning of it that they run."""
    engine_options: Mapping[str, str] = field(default_factory=dict)
    """EngineConfig values that suit the workload, for the stages that know them."""
    bench_options: Mapping[str, str] = field(default_factory=dict)
    """Further options of `bench`."""


CPU_PROFILE = Profile(
    name="cpu",
    workload="chat:num=12,min_output=8,max_output=32",
    model=None,
    dtype="float32",
    repeats=2,
    stage_workloads={"hf": "chat:4,num=12,min_output=8,max_output=32"},
    engine_options={"max_model_len": "1024", "kv_cache_bytes": "1GiB"},
    bench_options={"gate_requests": "4", "gate_tokens": "8"},
)
"""Eight engines, two repeats, within minutes on two slow cores; float32 for the exact gate.

The ladder runs the whole workload; Transformers, which takes longest, its beginning. The gate asks
for little because in float32 the timed outputs are compared too, whole.
"""

GPU_PROFILE = Profile(
    name="gpu",
    workload="nano",
    model="qwen3-0.6b",
    load_format="dummy",
    dtype="bfloat16",
    stage_workloads={"m1_baseline": "nano:2", "hf": "nano:1"},
    engine_options={
        "max_model_len": "2048",
        "kv_cache_bytes": "64GiB",
        "max_num_batched_tokens": "16384",
    },
)
"""The workload of nano-vllm's benchmark; random weights, so that no download is needed."""


def cuda_is_available() -> bool:
    import torch  # only here: the table and the charts need no torch

    return torch.cuda.is_available()


def choose_profile(name: str, device: str) -> Profile:
    """The profile called `name`; `auto` follows the device, and the machine if that is `auto`."""
    profiles = {profile.name: profile for profile in (CPU_PROFILE, GPU_PROFILE)}
    if name in profiles:
        return profiles[name]
    if name != "auto":
        raise ValueError(f"no profile called {name!r}; there are: auto, {', '.join(profiles)}")
    if device.startswith("cpu"):
        return CPU_PROFILE
    if device.startswith("cuda"):
        return GPU_PROFILE
    return GPU_PROFILE if cuda_is_available() else CPU_PROFILE
