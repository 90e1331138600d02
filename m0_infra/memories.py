"""The memories of this machine from the smallest to the largest, as its systems name them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def gpu_memories(properties: Any) -> Iterator[tuple[str, str]]:
    """(name, what there is of it) of a CUDA device.

    properties: of `torch.cuda.get_device_properties`. What a build of torch does not tell is left
    out.
    """
    num_sms = properties.multi_processor_count
    yield "multiprocessors", f"{num_sms}, warps of {properties.warp_size} threads"
    registers = getattr(properties, "regs_per_multiprocessor", None)
    if registers is not None:
        yield "registers", f"{_size(4 * registers)} each, {_size(4 * registers * num_sms)} in all"
    shared = properties.shared_memory_per_multiprocessor
    yield "shared memory", f"{_size(shared)} each, {_size(shared * num_sms)} in all"
    yield "L2 cache", _size(properties.L2_cache_size)


def cpu_memories(caches: Path = CPU_CACHES) -> Iterator[tuple[str, str]]:
    """(name, size) of the caches that the first core sees; nothing where the system is silent."""
    for cache in sorted(caches.glob("index*")):
        try:
            level, kind, size = (
                (cache / name).read_text(encoding="utf-8").strip()
                for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            yield f"L{level} cache", size.replace("K", " KiB").replace("M", " MiB")


def _size(num_bytes: int) -> str:
    """In KiB up to a MiB, then in MiB."""
    kib = num_bytes / 1024
    return f"{kib:.0f} KiB" if kib < 1024 else f"{kib / 1024:.0f} MiB"
