"""Find the engines that can be compared, and learn their options without importing them."""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LADDER_PATTERN = "m[1-7]_*"
CONFIG_CLASS = "EngineConfig"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One engine that has a `bench` command of its own."""

    name: str
    """What results are filed under: `m2_batching`, `hf`."""
    module: str
    """What `python -m` gets."""
    options: frozenset[str]
    """Names of the fields of its EngineConfig; nothing else is passed to it."""
    switches: frozenset[str] = frozenset()
    """Those of the options that are on or off and take no value."""
    is_peer: bool
    """A peer is measured for comparison and stands below the ladder."""


def ladder_order(name: str) -> tuple[int, str]:
    """Sort key: m1, m2, … m7, then the peers by name."""
    match = re.match(r"m(\d)_", name)
    return (int(match.group(1)), name) if match else (10, name)


def is_ladder_stage(name: str) -> bool:
    return re.match(r"m[1-7]_", name) is not None


def stage_label(name: str) -> str:
    """The name in words, for charts: `m2_batching` -> `M2 batching`."""
    if is_ladder_stage(name):
        return name[0].upper() + name[1:].replace("_", " ")
    return {"hf": "Transformers", "vllm": "vLLM", "nano_vllm": "nano-vllm"}.get(name, name)


def config_fields(source_file: Path) -> dict[str, str] | None:
    """Annotated fields of the class EngineConfig in a Python file, and their annotations.

    Read from the syntax tree, so that comparing engines never loads one into this process. None
    when the file does not exist or holds no such class.
    """
    if not source_file.is_file():
        return None
    tree = ast.parse(source_file.read_text(encoding="utf-8"), filename=str(source_file))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == CONFIG_CLASS:
            return {
                item.target.id: ast.unparse(item.annotation)
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
    return None


def _switches(options: dict[str, str]) -> frozenset[str]:
    return frozenset(name for name, annotation in options.items() if annotation == "bool")


def discover_stages(root: Path) -> dict[str, Stage]:
    """Every stage folder under `root` that can be run, in ladder order, then every peer.

    A stage registers by existing: a folder `m<digit>_<idea>` with a `__main__.py`. A peer is a
    file in compare/peers with a class EngineConfig; `vllm_peer.py` is called `vllm`, because a
    module named `vllm` would hide the package.
    """
    found = {}
    for folder in sorted(root.glob(LADDER_PATTERN)):
        if (folder / "__main__.py").is_file():
            options = config_fields(folder / "config.py") or {}
            found[folder.name] = Stage(
                name=folder.name,
                module=folder.name,
                options=frozenset(options),
                switches=_switches(options),
                is_peer=False,
            )
    for file in sorted((Path(__file__).parent / "peers").glob("*.py")):
        peer_options = config_fields(file)
        if peer_options is not None:
            name = file.stem.removesuffix("_peer")
            module = f"compare.peers.{file.stem}"
            found[name] = Stage(
                name=name,
                module=module,
                options=frozenset(peer_options),
                switches=_switches(peer_options),
                is_peer=True,
            )
    return found


def select_stages(found: dict[str, Stage], names: Iterable[str] | None) -> list[Stage]:
    """The named stages in ladder order; None means every stage of the ladder and `hf`."""
    if names is None:
        return [stage for stage in found.values() if not stage.is_peer or stage.name == "hf"]
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(
            f"no stage called {', '.join(unknown)}; there are: {', '.join(found)} "
            f"(a stage is a folder m1_… to m7_… with a __main__.py under the current folder)"
        )
    return [found[name] for name in sorted(names, key=ladder_order)]
