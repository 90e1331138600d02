"""Who imports whom among the files of a checkout, read from their source."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


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


@dataclass(frozen=True)
class Module:
    """One file of a package, and what it imports at run time, wherever the import stands."""

    name: str
    """Dotted; a package's own is "folovllm.text.__init__"."""
    path: Path
    imports: tuple[Import, ...]

    @property
    def room(self) -> str | None:
        """The folder under the package's top, "text" for folovllm.text.tokenizer; None at the top.

        A package's own file counts to its folder.
        """
        parts = self.name.split(".")
        return parts[1] if len(parts) > 2 else None


def read_package(folder: Path, files: Mapping[str, Path]) -> dict[str, Module]:
    """The modules of a package by name; `files` has their paths, relative ones as keys."""
    modules = {}
    for relative, path in files.items():
        if relative.endswith(".py"):
            name = f"{folder.name}.{relative.removesuffix('.py').replace('/', '.')}"
            modules[name] = Module(name, path, tuple(read_imports(path)))
    return modules


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


def imported_modules(module: Module, modules: Mapping[str, Module]) -> list[str]:
    """Names of those in `modules` that `module` imports by name at run time, in order."""
    targets = []
    for one in module.imports:
        if not one.at_run_time:
            continue
        base = module.name.split(".")[: -one.level] if one.level else []
        path = ".".join([*base, *filter(None, [one.module])])
        submodules = [f"{path}.{name}" for name in one.names if f"{path}.{name}" in modules]
        own = [name for name in (path, f"{path}.__init__") if name in modules]
        targets += submodules if len(submodules) == len(one.names) > 0 else submodules + own
    return list(dict.fromkeys(targets))


def way_to_torch(module: Module, modules: Mapping[str, Module]) -> tuple[str, ...]:
    """The modules through which `module` imports torch, ending in "torch"; empty if none do.

    What Python loads on the way counts too: the `__init__` of every package that is named.
    """
    came_from: dict[str, str | None] = {module.name: None}
    queue = [module.name]
    for name in queue:
        if any(one.at_run_time and one.package == "torch" for one in modules[name].imports):
            way = ["torch"]
            step: str | None = name
            while step is not None:
                way.append(step)
                step = came_from[step]
            return tuple(reversed(way))
        for target in (*_packages_of(name), *imported_modules(modules[name], modules)):
            if target in modules and target not in came_from:
                came_from[target] = name
                queue.append(target)
    return ()


def _packages_of(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join([*parts[:end], "__init__"]) for end in range(1, len(parts))]


def import_circles(modules: Mapping[str, Module]) -> list[tuple[str, ...]]:
    """Circles of imports, each once, from its alphabetically first module back to it."""
    graph = {name: imported_modules(module, modules) for name, module in modules.items()}
    circles = []
    for start in sorted(graph):
        came_from: dict[str, str] = {}
        queue = [start]
        for name in queue:
            for target in graph[name]:
                if target not in came_from and target >= start:
                    came_from[target] = name
                    queue.append(target)
        if start in came_from:
            way = [start]
            while len(way) == 1 or way[-1] != start:
                way.append(came_from[way[-1]])
            circles.append(tuple(reversed(way)))
    return circles
