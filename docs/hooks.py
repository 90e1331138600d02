"""What MkDocs calls while it builds the book; mkdocs.yml names this file.

`make docs` runs it with the root of the checkout on Python's path; m0_infra/book does the work.
"""

import logging
import re
from pathlib import Path
from typing import Any

from compare.measurement_pages import folder_places, measurement_pages
from m0_infra.book import links
from m0_infra.book.tree import BookTree, write_book

_LOG = logging.getLogger("mkdocs.hooks.book")
_LOADED = re.compile(
    r'<(?:(?:script|img|iframe)\b[^>]*\bsrc|link\b[^>]*\brel="(?:stylesheet|preconnect)"[^>]*\bhref)'
    r'="(?:https?:)?//[^"]*"'
)
_ONLY_ENGLISH = ("source/", "api/")
"""Code and what is made from docstrings: there is one of it, and other languages lead there."""
_LEAD = """---
search:
  exclude: true
---

# {title}

<script>location.replace("{url}" + location.hash)</script>
<meta http-equiv="refresh" content="0; url={url}">

<a href="{url}">{url}</a>

{anchors}
"""


def on_pre_build(config: Any) -> None:
    """The pages follow docs/ before every build, also those of `mkdocs serve`."""
    root = Path(config.config_file_path).parent
    tree = BookTree(root, measurement_pages(root), folder_places(root))
    num_changed = write_book(tree.collect(), Path(config.docs_dir))
    _LOG.info("%d files of the book changed", num_changed)


def on_page_read_source(page: Any, config: Any) -> str | None:
    """Instead of a second copy of the code, a page of another language leads to the first one."""
    language, _, url = page.url.partition("/")
    if language != "zh" or not url.startswith(_ONLY_ENGLISH):
        return None
    up = "../" * page.url.count("/")
    # Links into the page are checked in this language too.
    headings = links.headings(page.file.content_string)
    anchors = "\n".join(f'<a id="{links.heading_id(title)}"></a>' for title in headings)
    return _LEAD.format(title=Path(url).stem, url=f"{up}{url}", anchors=anchors)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """A page that loads something from another host is a mistake: the book is read offline."""
    for found in _LOADED.findall(output):
        _LOG.warning("%s loads from elsewhere: %s", page.file.src_uri, found)
    return output
