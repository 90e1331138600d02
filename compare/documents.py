"""Write generated tables into Markdown documents, between markers and nowhere else."""

import re
from collections.abc import Mapping
from pathlib import Path

MARKER = re.compile(
    r"^<!-- compare:(?P<key>[^:>\s]+/[^:>\s]+):(?P<edge>begin|end) -->(?=\r?$)", re.MULTILINE
)
"""A marker stands alone on its line, so that a sentence may mention one."""


def replace_marked(text: str, tables: Mapping[str, str], source: str = "the text") -> str:
    """`text` with what stands between `<!-- compare:KEY:begin -->` and its end replaced.

    `tables` maps KEY (`device/workload`) to Markdown; a marked place whose key is not in it stays
    as it is. Everything outside the markers is kept byte for byte, so replacing twice is
    replacing once. ValueError, naming `source` and the line, if markers do not pair up.
    """
    pieces = []
    position = 0
    opened: re.Match[str] | None = None
    for match in MARKER.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if (match["edge"] == "end") == (opened is None) or (
            opened is not None and opened["key"] != match["key"]
        ):
            raise ValueError(
                f"{source}, line {line}: {match.group()} has no partner; every begin marker needs "
                f"the end marker of the same device/workload after it"
            )
        if opened is None:
            opened = match
            continue
        if match["key"] in tables:
            pieces += [text[position : opened.end()], f"\n{tables[match['key']]}\n"]
            position = match.start()
        opened = None
    if opened is not None:
        raise ValueError(f"{source}: {opened.group()} has no end marker; add one below it")
    return "".join(pieces) + text[position:]


def marked_documents(root: Path) -> list[Path]:
    """Markdown files that may hold markers: READMEs of the project and its packages, and docs/."""
    return sorted({*root.glob("*.md"), *root.glob("*/README.md"), *root.glob("docs/**/*.md")})


def update_documents(root: Path, tables: Mapping[str, str]) -> list[Path]:
    """Put the tables into every document under `root`; returns the files that changed."""
    changed = []
    for file in marked_documents(root):
        text = file.read_bytes().decode("utf-8")
        if MARKER.search(text) is None:
            continue
        new = replace_marked(text, tables, source=str(file))
        if new != text:
            file.write_bytes(new.encode("utf-8"))
            changed.append(file)
    return changed
