"""Available host memory, read from made-up proc and sys files."""

import os
from pathlib import Path

import pytest

from folovllm.host_memory import available_host_bytes

MIB = 1 << 20
MEMINFO = "MemTotal: 8388608 kB\nMemFree: 102400 kB\nMemAvailable: 4194304 kB\nCached: 1 kB\n"


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(content), encoding="ascii")
    return root


def group_v2(limit: object, used: int, inactive: int) -> dict[str, object]:
    stat = f"anon 5\nfile 7\nkernel_stack 3\ninactive_anon 9\ninactive_file {inactive}\n"
    return {"memory.max": limit, "memory.current": used, "memory.stat": stat}


def group_v1(limit: object, used: int, inactive: int) -> dict[str, object]:
    stat = (
        f"cache 5\ninactive_file 1\nhierarchical_memory_limit 9\ntotal_inactive_file {inactive}\n"
    )
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


def under(folder: str, files: dict[str, object]) -> dict[str, object]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def test_file_cache_counts_as_available(tmp_path):
    assert available_host_bytes(write(tmp_path, {"proc/meminfo": MEMINFO})) == 4096 * MIB


@pytest.mark.parametrize(
    ("mount", "path", "line"),
    [
        ("sys/fs/cgroup", "a/b", "0::/a/b\n"),
        ("sys/fs/cgroup/unified", "a/b", "1:cpu:/x\n0::/a/b\n"),
        ("sys/fs/cgroup", "", "0::/\n"),
    ],
)
def test_limit_of_the_group_leaves_what_is_not_used_and_what_can_be_taken_back(
    tmp_path, mount, path, line
):
    group = group_v2(1000 * MIB, 700 * MIB, 300 * MIB)
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": line}
    write(tmp_path, files | under(f"{mount}/{path}", group))
    assert available_host_bytes(tmp_path) == 600 * MIB


def test_limit_of_the_first_version_of_groups(tmp_path):
    line = "9:name=systemd:/\n4:cpuacct,memory:/job\n0::/\n"
    group = group_v1(500 * MIB, 450 * MIB, 50 * MIB)
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": line}
    write(tmp_path, files | under("sys/fs/cgroup/memory/job", group))
    assert available_host_bytes(tmp_path) == 100 * MIB


def test_group_of_the_host_that_a_container_does_not_see_is_the_mount(tmp_path):
    line = "4:memory:/docker/0123\n"
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": line}
    write(tmp_path, files | under("sys/fs/cgroup/memory", group_v1(300 * MIB, 100 * MIB, 0)))
    assert available_host_bytes(tmp_path) == 200 * MIB


def test_tightest_group_around_decides(tmp_path):
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/outer/inner\n"}
    files |= under("sys/fs/cgroup/outer", group_v2(900 * MIB, 850 * MIB, 0))
    files |= under("sys/fs/cgroup/outer/inner", group_v2(800 * MIB, 100 * MIB, 0))
    assert available_host_bytes(write(tmp_path, files)) == 50 * MIB


@pytest.mark.parametrize("limit", ["max", 9223372036854771712])
def test_no_limit_leaves_what_the_machine_has(tmp_path, limit):
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a\n4:memory:/a\n"}
    group = group_v2 if limit == "max" else group_v1
    mount = "sys/fs/cgroup" if limit == "max" else "sys/fs/cgroup/memory"
    write(tmp_path, files | under(f"{mount}/a", group(limit, 10 * MIB, 0)))
    assert available_host_bytes(tmp_path) == 4096 * MIB


def test_group_that_uses_more_than_its_limit_leaves_nothing(tmp_path):
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n"}
    write(tmp_path, files | under("sys/fs/cgroup", group_v2(100 * MIB, 120 * MIB, 0)))
    assert available_host_bytes(tmp_path) == 0


def test_broken_lines_are_passed_over(tmp_path):
    files = {"proc/meminfo": "MemAvailable:\n" + MEMINFO, "proc/self/cgroup": "\nx\n0:\n"}
    assert available_host_bytes(write(tmp_path, files)) == 4096 * MIB


def test_system_without_these_files_tells_its_free_or_half_of_its_memory(tmp_path, monkeypatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_AVPHYS_PAGES": 10, "SC_PHYS_PAGES": 100}
    monkeypatch.setattr(os, "sysconf", lambda name: pages[name])
    monkeypatch.setattr(os, "sysconf_names", pages)
    assert available_host_bytes(tmp_path) == 10 * 4096
    del pages["SC_AVPHYS_PAGES"]
    assert available_host_bytes(tmp_path) == 50 * 4096


def test_this_machine_has_some():
    assert available_host_bytes() > 1 * MIB
