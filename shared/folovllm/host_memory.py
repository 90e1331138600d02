"""How much memory of the host a program may still take: of the machine, and of its own limit."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class _CgroupFiles:
    """Names of one version of Linux's control groups."""

    controller: str
    """Second field of the line in /proc/self/cgroup."""
    mounts: tuple[str, ...]
    limit: str
    usage: str
    reclaimable: str
    """Entry of memory.stat: pages of files that nobody used lately, given back when needed."""


_VERSIONS = (
    _CgroupFiles(
        "",
        ("sys/fs/cgroup", "sys/fs/cgroup/unified"),
        "memory.max",
        "memory.current",
        "inactive_file",
    ),
    _CgroupFiles(
        "memory",
        ("sys/fs/cgroup/memory",),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def available_host_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be had without swapping or being killed.

    On Linux the least of what the kernel calls available (free memory and what it would take back
    from its file cache) and what the limits of this process's control groups leave, which is what
    a container or a job scheduler sets. Elsewhere free memory, or half of all memory where a
    system does not even tell that. root: where proc and sys are looked for.
    """
    return max(0, min([_machine_bytes(root), *_cgroup_bytes(root)]))


def _machine_bytes(root: Path) -> int:
    available = _entry(root / "proc/meminfo", "MemAvailable:")
    if available is not None:
        return available * 1024
    page_size = os.sysconf("SC_PAGE_SIZE")
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return page_size * os.sysconf("SC_AVPHYS_PAGES")
    return page_size * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup_bytes(root: Path) -> Iterator[int]:
    """What each limit above this process leaves; nothing where there is none."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        for files in _VERSIONS:
            if files.controller in controllers.split(","):
                for folder in _folders(root, files, path):
                    left = _left_in(folder, files)
                    if left is not None:
                        yield left


def _folders(root: Path, files: _CgroupFiles, path: str) -> Iterator[Path]:
    """The group and all around it, up to the mount: a limit holds for everything inside.

    Inside a container the path may be that of the host, which is not there; the mount itself is
    then the container's group.
    """
    inside = PurePosixPath(path.lstrip("/"))
    for mount in files.mounts:
        for group in (inside, *inside.parents):
            yield root / mount / group


def _left_in(folder: Path, files: _CgroupFiles) -> int | None:
    """None where there is no group, or no limit."""
    limit, usage = _read(folder / files.limit).strip(), _read(folder / files.usage).strip()
    if not limit.isdigit() or not usage.isdigit():
        return None
    reclaimable = _entry(folder / "memory.stat", files.reclaimable) or 0
    return int(limit) - max(0, int(usage) - reclaimable)


def _entry(file: Path, name: str) -> int | None:
    """The number behind a name that begins a line."""
    for line in _read(file).splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
