"""Links between files of the repository become links between pages of the site."""

import posixpath
import re
from collections.abc import Callable

_CODE = re.compile(
    r"(^ *(`{3,}|~{3,})[^\n]*\n.*?^ *\2[^\n]*$|(`+)[^`].*?(?<!`)\3(?!`))", re.M | re.S
)
"""A fenced block or a span: what looks like a link in it is code."""
_TARGET = re.compile(r"(?<=\]\()(?P<path>[^)\s#?:]+)(?P<anchor>#[^)\s]*)?(?=\)|\s+\")")
_FENCE = re.compile(r" *(`{3,}|~{3,})")
_ITEM = re.compile(r" *(?:[-*+]|\d+\.) ")
_LIST = re.compile(r"(?:[-*+]|1\.) ")
_COPIED = (".png", ".svg", ".html", ".json", ".jsonl", ".css", ".safetensors")


def site_path(path: str) -> str:
    """Where the site has a file of the repository: its source path, `….md` for every page.

    Files of docs/ keep their place, all others stand below `source/`, code as a page that shows it.

    >>> site_path("docs/learn/README.md"), site_path("m3_paged/scheduler.py")
    ('learn/README.md', 'source/m3_paged/scheduler_py.md')
    """
    if path in ("README.md", "README.zh.md"):
        return path.replace("README", "index")
    is_copied = path.endswith((".md", *_COPIED))
    if path.startswith("docs/") and (is_copied or "." not in posixpath.basename(path)):
        return path.removeprefix("docs/")
    if is_copied:
        return f"source/{path}"
    # `scheduler.py.md` would be a page in the language "py".
    folder, name = posixpath.split(path)
    return posixpath.join("source", folder, name.replace(".", "_") + ".md")


def is_copied(path: str) -> bool:
    """Whether the site has the file as it is: pictures, reports, data."""
    return path.endswith(_COPIED)


def rewrite_links(text: str, path: str, resolve: Callable[[str], str | None]) -> str:
    """Markdown of the file `path` with its links to other files as the site needs them.

    `resolve` gets the linked path, relative to the root of the repository, and returns the site's
    (None: the link stays as it is, for the strict build to complain about). Code is left alone.
    A Chinese page links to Chinese pages by their suffix, as GitHub needs; the site chooses the
    language by itself and must not see it.
    """
    own = posixpath.dirname(site_path(path))

    def target(match: re.Match[str]) -> str:
        linked = posixpath.normpath(posixpath.join(posixpath.dirname(path), match["path"]))
        place = None if linked.startswith("..") else resolve(linked)
        if place is None:
            return match.group()
        if path.endswith(".zh.md"):
            place = re.sub(r"\.zh\.md$", ".md", place)
        return posixpath.relpath(place, own or ".") + (match["anchor"] or "")

    pieces = []
    position = 0
    for code in _CODE.finditer(text):
        pieces += [_TARGET.sub(target, text[position : code.start()]), code.group()]
        position = code.end()
    return "".join(pieces) + _TARGET.sub(target, text[position:])


def with_lists_apart(text: str) -> str:
    """Markdown with a blank line before every list.

    A list may follow the last line of a paragraph on GitHub. For Python-Markdown, which makes the
    site, it would be the rest of that paragraph.

    >>> with_lists_apart("Two:\\n- a\\n- b")
    'Two:\\n\\n- a\\n- b'
    """
    lines, fence, paragraph = [], "", ""
    for line in text.split("\n"):
        if fence:
            fence = "" if line.strip() == fence else fence
        elif opening := _FENCE.match(line):
            fence, paragraph = opening[1], ""
        elif not line:
            paragraph = ""
        elif not paragraph:
            paragraph = line
        elif not _ITEM.match(paragraph) and _begins_item(line, paragraph):
            lines.append("")
            paragraph = line
        lines.append(line)
    return "\n".join(lines)


def _begins_item(line: str, paragraph: str) -> bool:
    """Whether a list, or its next item, begins here, behind a paragraph that begins like this.

    An indented paragraph belongs to the item before it. Elsewhere "186. " is the end of a sentence.
    """
    in_list = paragraph[0] == " "
    return line[0] != " " and bool((_ITEM if in_list else _LIST).match(line))


def with_ids_of(original: str, translation: str) -> str:
    """A translated page whose headings can also be linked by the ids of the original's headings.

    A page that is not translated links to those, and is shown in both languages. The title stays
    the first thing on its page, since MkDocs takes the page's name from it.
    """
    ids = iter(heading_id(title) for title in headings(original))
    lines, is_code = [], False
    for line in translation.split("\n"):
        is_code ^= line.startswith("```")
        if line.startswith("#") and not is_code and (own := next(ids, "")):
            anchor = f'<a id="{own}"></a>'
            lines += [line, "", anchor] if line.startswith("# ") else [anchor, "", line]
        else:
            lines.append(line)
    return "\n".join(lines)


def heading_id(title: str) -> str:
    """The id that GitHub gives a heading, and our site too."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower().replace("`", "")).replace(" ", "-")


def headings(text: str) -> list[str]:
    """The titles of a page's headings, in order; code has none."""
    return re.findall(r"^#+ +(.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
