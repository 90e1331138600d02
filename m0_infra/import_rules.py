"""Which package may import which, so that stages stand alone and bookkeeping needs no torch."""

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .stages import is_stage_name, stage_files

HOST_FILES = frozenset(
    {"config.py", "scheduler.py", "kv_cache_manager.py", "block_pool.py", "prefix_cache.py"}
)
"""Host bookkeeping: no torch, so that it is tested on any machine in milliseconds."""
_PACKAGES = ("folovllm", "torch", "numpy", "triton", "flash_attn", "flash_attn_interface")
_STAGE_MAY_IMPORT = frozenset(_PACKAGES) | sys.stdlib_module_names


@dataclass(frozen=True)
class Import:
    """One imported module, as written in a file."""

    module: str
    """Absolute name, or "" and a level for `from . import x`."""
    level: int
    """Leading dots; 0 is absolute."""
    line: int
    names: tuple[str, ...]
    """What `from … import` takes; a submodule is such a name too."""
    at_run_time: bool
    """False under `if TYPE_CHECKING`."""

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def import_problems(root: Path, stages: list[str]) -> list[str]:
    """Every broken rule in the packages under `root`, one line each."""
    problems = []
    for stage in stages:
        problems += _stage_problems(root / stage)
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


def read_imports(path: Path) -> list[Import]:
    """All imports of a file, wherever they stand, and `import_module("a literal name")`."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    type_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    return [
        Import(module, level, node.lineno, names, id(node) not in type_only)
        for node in ast.walk(tree)
        for module, level, names in _modules_of(node)
        if isinstance(node, ast.stmt | ast.expr)
    ]


def _modules_of(node: ast.AST) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    match node:
        case ast.Import(names=aliases):
            for alias in aliases:
                yield alias.name, 0, ()
        case ast.ImportFrom(module=module, level=level, names=aliases):
            yield module or "", level, tuple(alias.name for alias in aliases)
        case ast.Call(
            func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            yield name.lstrip("."), len(name) - len(name.lstrip(".")), ()


def _stage_problems(folder: Path) -> list[str]:
    problems = []
    files = {name: path for name, path in stage_files(folder).items() if name.endswith(".py")}
    imports = {name: read_imports(path) for name, path in files.items()}
    for name, found in imports.items():
        for one in found:
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
        if name in HOST_FILES and (chain := _way_to_torch(name, imports, ())):
            problems.append(
                f"{folder.name}/{name} imports torch ({' -> '.join(chain)}); host bookkeeping must "
                f"not: keep tensors in kv_cache.py, attention.py or model_runner.py"
            )
    return problems


def _way_to_torch(
    name: str, imports: Mapping[str, list[Import]], seen: tuple[str, ...]
) -> tuple[str, ...]:
    """The files through which `name` imports torch, ending in "torch"; empty if it does not."""
    here = (*seen, name)
    for one in imports[name]:
        if not one.at_run_time:
            continue
        if one.level == 0:
            if one.package == "torch":
                return (*here, "torch")
            continue
        modules = [one.module] if one.module else list(one.names)
        for file in (f"{module.replace('.', '/')}.py" for module in modules):
            if file not in imports or file in here:
                continue
            if chain := _way_to_torch(file, imports, here):
                return chain
    return ()
