"""How tests read the notes: headings, links, words, and code that a page shows from a file."""

import ast
import re
from pathlib import Path

LEARN = Path(__file__).resolve().parents[2] / "docs/learn"
_SHOWN = re.compile(r"<!-- from (\S+): ([\w ]+) -->\n```python\n(.*?)```", re.S)
_FENCE = re.compile(r"^```.*?^```", re.S | re.M)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def read(name: str) -> str:
    return (LEARN / name).read_text(encoding="utf-8")


def num_words(text: str) -> int:
    """As `wc -w` counts them."""
    return len(text.split())


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return _FENCE.sub("", text)


def links(text: str) -> list[str]:
    """Targets of all links and pictures, those of other sites left out."""
    return [target for target in _LINK.findall(prose(text)) if "://" not in target]


def anchor(heading: str) -> str:
    """The id that GitHub gives a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", ""))
    return text.replace(" ", "-")


def anchors(text: str) -> set[str]:
    """What a link into this page may name: headings and explicit ids."""
    headings = {anchor(line.lstrip("#")) for line in prose(text).splitlines() if line[:1] == "#"}
    return headings | set(re.findall(r'<a id="([^"]+)">', text))


def shown_code(name: str) -> list[tuple[str, str, str]]:
    """(file, names, code) of every block of a page that says where it is from."""
    return _SHOWN.findall(read(name))


def code_of(file: str, names: str) -> str:
    """The top-level functions of a file, in the order of their names, two lines apart."""
    text = (LEARN / file).read_text(encoding="utf-8")
    lines, functions = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            functions[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return "\n\n\n".join(functions[name] for name in names.split()) + "\n"


def dead_links(name: str) -> list[str]:
    """Links of a page whose file is not there, or whose page has no such heading."""
    page, dead = LEARN / name, []
    for target in links(read(name)):
        file, _, fragment = target.partition("#")
        path = page.parent / file if file else page
        if not path.exists():
            dead.append(target)
        elif path.suffix == ".md":
            known = anchors(path.read_text(encoding="utf-8")) if fragment else {""}
            if fragment not in known:
                dead.append(target)
    return dead
