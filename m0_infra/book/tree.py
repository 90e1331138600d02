"""Writes the source tree of the site: docs/, what it links to, and the pages that are made."""

import re
from collections.abc import Mapping
from pathlib import Path

from ..stages import Stage, load_stages, stage_files
from . import links
from .pages import (
    code_note,
    code_page,
    diff_page,
    first_with_these_bytes,
    folder_listing,
    stage_listing,
)
from .reference import reference_pages

_LANGUAGE_LINK = re.compile(r"^\[(?:中文|English)\]\([^)]*\)\n\n?", re.M)
"""The site has a switch for it in its head."""
_NEVER = {"__pycache__", "build", ".venv", "tests"}


class BookTree:
    """Finds every page of the site, beginning at docs/ and following links."""

    def __init__(
        self, root: Path, made: Mapping[str, str], folder_places: Mapping[str, str]
    ) -> None:
        self.root = root
        self.made = made
        """Further pages: Markdown by path below docs/, as if it were a file there."""
        self.folder_places = folder_places
        """Folders that such a page shows: path in the repository to path in the site."""
        self.stages = load_stages(root)
        self.files: dict[str, str | Path] = {}
        """Path in the site to its text, or to the file that is copied there."""
        self._queue: list[str] = []

    def collect(self) -> dict[str, str | Path]:
        """All files of the site. A page that nothing links to is there only if it is in docs/,
        a file of a stage or of folovllm."""
        self.files.update(reference_pages(self.root, self.stages))
        for place, text in self.made.items():
            self.files[place] = self._rewritten(text, f"docs/{place}")
        for pattern in ("README*.md", "docs/**/*.md", "docs/**/*.css"):
            self._queue += [self._relative(path) for path in sorted(self.root.glob(pattern))]
        self._queue += [*self.stages, "m0_infra", "compare", "shared/folovllm"]
        seen = set()
        while self._queue:
            path = self._queue.pop()
            if path not in seen:
                seen.add(path)
                self._add(path)
        return self.files

    def _add(self, path: str) -> None:
        file = self.root / path
        if file.is_dir():
            self._add_folder(path)
        elif path.endswith(".md"):
            text = file.read_text(encoding="utf-8")
            if path.endswith(".zh.md"):
                original = self.root / path.replace(".zh.md", ".md")
                text = links.with_ids_of(original.read_text(encoding="utf-8"), text)
            self.files[links.site_path(path)] = self._rewritten(text, path)
        elif links.is_copied(path):
            self.files[links.site_path(path)] = file
        else:
            note = self._rewritten(code_note(path, self.stages), path)
            self.files[links.site_path(path)] = code_page(self.root, path, note)

    def _add_folder(self, path: str) -> None:
        """The page of a folder: its README, what a stage has, or a list of its files."""
        stage = self.stages.get(path)
        if stage is not None:
            self._add_stage(stage)
        elif (self.root / path / "README.md").is_file():
            self._queue.append(f"{path}/README.md")
        else:
            files = [name for name in self._names(path) if "." in name]
            text = folder_listing(path, files)
            place = links.site_path(f"{path}/README.md")
            self.files[place] = self._rewritten(text, f"{path}/README.md")
        if not path.startswith("docs") and stage is None:
            self._queue += [f"{path}/{n}" for n in self._names(path) if n.endswith(".py")]

    def _add_stage(self, stage: Stage) -> None:
        path = f"{stage.name}/README.md"
        text = (self.root / path).read_text(encoding="utf-8")
        text += stage_listing(stage, list(stage_files(self.root / stage.name)))
        self.files[links.site_path(path)] = self._rewritten(text, path)
        if stage.previous is not None:
            self.files[f"source/{stage.name}/diff.md"] = diff_page(self.root, stage)

    def _names(self, path: str) -> list[str]:
        """Files below a folder, relative to it; tests and what is built are left out."""
        folder = self.root / path
        found = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file())
        return [file.as_posix() for file in found if _NEVER.isdisjoint(file.parts)]

    def _rewritten(self, text: str, path: str) -> str:
        text = links.with_lists_apart(_LANGUAGE_LINK.sub("", text))
        return links.rewrite_links(text, path, self._resolve)

    def _resolve(self, path: str) -> str | None:
        """The site's path of a file or folder of the repository, which gets a page by this."""
        if (self.root / path).is_file():
            path = first_with_these_bytes(path, self.stages)
        file = self.root / path
        if path in ("docs", "."):
            return "index.md"
        if path in self.folder_places:
            return self.folder_places[path]
        if file.is_dir():
            self._queue.append(path)
            return links.site_path(f"{path}/README.md")
        if file.is_file():
            # The README of a stage is written with the stage, which has more to say.
            self._queue.append(path.removesuffix("/README.md") if self._is_stage(path) else path)
            return links.site_path(path)
        place = links.site_path(path)
        is_made = place in self.files or place in self.made or path.endswith("/diff.md")
        return place if is_made else None

    def _is_stage(self, path: str) -> bool:
        return path.removesuffix("/README.md") in self.stages

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def write_book(files: Mapping[str, str | Path], target: Path) -> int:
    """Bring `target` to what the site is made from; the number of files that changed.

    `files` is what `BookTree.collect` found. A file that is as it should be is not written again:
    `mkdocs serve` watches the folder.
    """
    num_changed = 0
    for place, content in files.items():
        path = target / place
        new = content.read_bytes() if isinstance(content, Path) else content.encode("utf-8")
        if not path.is_file() or path.read_bytes() != new:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(new)
            num_changed += 1
    wanted = {target / place for place in files}
    for path in [path for path in target.rglob("*") if path.is_file() and path not in wanted]:
        path.unlink()
        num_changed += 1
    return num_changed
