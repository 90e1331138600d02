"""Pages of the API reference: which modules they name; mkdocstrings writes what stands in them."""

from pathlib import Path

from ..stages import Stage, stage_files

_LEFT_OUT = ("__init__.py", "__main__.py")


def reference_pages(root: Path, stages: dict[str, Stage]) -> dict[str, str]:
    """Markdown by path in the site: a page for each room of folovllm and each stage, and a list."""
    shared = root / "shared" / "folovllm"
    rooms = sorted(path.parent for path in shared.glob("*/__init__.py"))
    pages = {"api/folovllm.md": _page("folovllm", _modules(shared, "folovllm", "*.py"))}
    for room in rooms:
        name = f"folovllm.{room.name}"
        pages[f"api/{name}.md"] = _page(name, _modules(room, name, "**/*.py"))
    for stage in stages.values():
        pages[f"api/{stage.name}.md"] = _stage_page(root, stage)
    pages["api/README.md"] = _overview(list(pages))
    return pages


def _modules(folder: Path, package: str, pattern: str) -> list[str]:
    found = (path.relative_to(folder) for path in sorted(folder.glob(pattern)))
    return [
        ".".join([package, *path.with_suffix("").parts])
        for path in found
        if path.name not in _LEFT_OUT
    ]


def _page(title: str, modules: list[str], introduction: str = "") -> str:
    blocks = "\n".join(f"::: {module}\n" for module in modules)
    return f"# {title}\n\n{introduction}{blocks}"


def _stage_page(root: Path, stage: Stage) -> str:
    """The modules that are new or other than in the stage before; the rest is described there."""
    files = [file for file in stage_files(root / stage.name) if file.endswith(".py")]
    own = [file for file in files if stage.previous is None or file in stage.changed | stage.added]
    modules = [
        ".".join([stage.name, *Path(file).with_suffix("").parts])
        for file in own
        if Path(file).name not in _LEFT_OUT
    ]
    code = f"../source/{stage.name}/README.md"
    introduction = f"[Code and files]({code})."
    if stage.previous is not None:
        introduction += (
            f" What is not here is byte for byte [{stage.previous}]({stage.previous}.md)'s;"
            f" [the difference](../source/{stage.name}/diff.md)."
        )
    return _page(stage.name, modules, f"{introduction}\n\n")


def _overview(pages: list[str]) -> str:
    lines = [
        "# API reference",
        "",
        "Made from the docstrings. Programs begin at `LLM` and `SamplingParams`"
        " ([Python API](../guides/python_api.md)): [folovllm.entrypoints](folovllm.entrypoints.md)"
        " and [folovllm](folovllm.md). A stage's page has what the stage adds or changes.",
        "",
    ]
    names = [Path(page).stem for page in pages]
    return "\n".join([*lines, *(f"- [{name}]({name}.md)" for name in names), ""])
