"""Which package may import which, so that stages stand alone and bookkeeping needs no torch."""

import sys
from collections.abc import Mapping
from pathlib import Path

from .code_lines import count_code_lines
from .import_graph import (
    Module,
    import_circles,
    imported_modules,
    read_imports,
    read_package,
    way_to_torch,
)
from .stages import is_stage_name, stage_files

HOST_FILES = frozenset(
    {
        "config.py",
        "scheduler.py",
        "kv_cache_manager.py",
        "block_pool.py",
        "prefix_cache.py",
        "chunk_policy.py",
    }
)
"""Host bookkeeping: no torch, so that it is tested on any machine in milliseconds."""
ROOM_LEVELS = (
    frozenset({"kernels", "text", "workloads"}),
    frozenset({"model", "sampling"}),
    frozenset({"bench", "entrypoints", "profiling"}),
    frozenset({"cli", "testing"}),
)
"""The folders of shared/folovllm from the ground up: a room imports only rooms of lower levels, and
the files beside the rooms, which import none. `data` holds no code."""
_PACKAGES = ("folovllm", "torch", "numpy", "triton", "flash_attn", "flash_attn_interface")
_STAGE_MAY_IMPORT = frozenset(_PACKAGES) | sys.stdlib_module_names


def import_problems(root: Path, stages: list[str]) -> list[str]:
    """Every broken rule in the packages under `root`, one line each."""
    folder = root / "shared" / "folovllm"
    shared = read_package(folder, stage_files(folder)) if folder.is_dir() else {}
    problems = _room_problems(root, shared)
    for stage in stages:
        problems += _stage_problems(root / stage, shared)
    for package, kept_out in (("shared", {"m0_infra", "compare"}), ("compare", set[str]())):
        for path in sorted((root / package).rglob("*.py")):
            if not {"build", ".venv"}.isdisjoint(path.relative_to(root).parts):
                continue
            for found in read_imports(path):
                if found.level == 0 and (is_stage_name(found.package) or found.package in kept_out):
                    problems.append(
                        f"{path.relative_to(root)}:{found.line} imports {found.module}; {package}/ "
                        f"must run without it: move the code, or reach it through a command line"
                    )
    return problems


def _room_problems(root: Path, shared: Mapping[str, Module]) -> list[str]:
    problems = [f"circle of imports: {' -> '.join(circle)}" for circle in import_circles(shared)]
    levels = {room: level for level, rooms in enumerate(ROOM_LEVELS) for room in rooms}
    for module in shared.values():
        path = module.path.relative_to(root)
        if module.room is not None and module.room not in levels:
            problems.append(f"{path} is in a room without a level; add it to ROOM_LEVELS")
            continue
        if path.name == "__init__.py" and count_code_lines(module.path.read_text(encoding="utf-8")):
            problems.append(f"{path} holds code; importing one file of a room must load no other")
        own_level = -1 if module.room is None else levels[module.room]
        for target in imported_modules(module, shared):
            room = shared[target].room
            if room not in (None, module.room) and levels.get(room, 0) >= own_level:
                problems.append(
                    f"{path} imports {target}, which is not below it: the order of the rooms is "
                    f"{' < '.join('/'.join(sorted(rooms)) for rooms in ROOM_LEVELS)}"
                )
    return problems


def _stage_problems(folder: Path, shared: Mapping[str, Module]) -> list[str]:
    problems = []
    modules = read_package(folder, stage_files(folder))
    for module in modules.values():
        name = module.path.relative_to(folder).as_posix()
        for one in module.imports:
            where = f"{folder.name}/{name}:{one.line}"
            if one.level > name.count("/") + 1:
                problems.append(f"{where} imports from outside of its folder")
            elif one.level == 0 and one.package == folder.name:
                problems.append(
                    f"{where} imports {one.module} by its full name; write `from .` instead, so "
                    f"that the file can stay identical in the next stage"
                )
            elif one.level == 0 and one.package not in _STAGE_MAY_IMPORT:
                problems.append(
                    f"{where} imports {one.module}; a stage may import its own files (relatively), "
                    f"{', '.join(_PACKAGES)} and the standard library"
                )
        if name in HOST_FILES and (way := way_to_torch(module, {**shared, **modules})):
            problems.append(
                f"{folder.name}/{name} imports torch ({' -> '.join(way)}); host bookkeeping must "
                f"not: keep tensors in kv_cache.py, attention.py or model_runner.py"
            )
    circles = import_circles(modules)
    return problems + [f"circle of imports: {' -> '.join(circle)}" for circle in circles]
