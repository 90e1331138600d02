"""The book's source tree: links that lead to pages, pages of code."""

import importlib.util
import posixpath
from pathlib import Path
from types import SimpleNamespace

import pytest

from m0_infra.book.links import rewrite_links, site_path, with_ids_of, with_lists_apart
from m0_infra.book.tree import BookTree, write_book
from m0_infra.stages import load_stages
from m0_infra.tests.notes import LEARN, anchors, links, num_words, read

ROOT = Path(__file__).resolve().parents[2]
MADE_ELSEWHERE = {f"results/{path.name}.md" for path in (ROOT / "compare/results").iterdir()}


@pytest.fixture(scope="module")
def tree() -> dict[str, str | Path]:
    made = {"results/README.md": "[files](../../m1_baseline/config.py)"}
    return BookTree(ROOT, made, {"compare/results": "results/README.md"}).collect()


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("README.md", "index.md"),
        ("README.zh.md", "index.zh.md"),
        ("docs/learn/02_batching.md", "learn/02_batching.md"),
        ("docs/dev/data/a.json", "dev/data/a.json"),
        ("docs/dev/trials/a.py", "source/docs/dev/trials/a_py.md"),
        ("m1_baseline/README.md", "source/m1_baseline/README.md"),
        ("m1_baseline/engine.py", "source/m1_baseline/engine_py.md"),
        ("compare/results/a/b/charts/c.png", "source/compare/results/a/b/charts/c.png"),
    ],
)
def test_every_file_of_the_repository_has_one_place(path, place):
    assert site_path(path) == place


@pytest.mark.parametrize(
    ("path", "text", "rewritten"),
    [
        ("docs/learn/a.md", "[x](../../m1/e.py)", "[x](../source/m1/e_py.md)"),
        ("docs/learn/a.md", "[x](b.md#part-2)", "[x](b.md#part-2)"),
        ("README.md", '![x](docs/p.svg "t")', '![x](p.svg "t")'),
        ("m1/README.md", "[x](e.py), [y](../README.md)", "[x](e_py.md), [y](../../index.md)"),
        ("docs/a.zh.md", "[x](b.zh.md)", "[x](b.md)"),
        ("docs/a.md", "[x](https://h/e.py) [y](#here)", "[x](https://h/e.py) [y](#here)"),
        ("docs/a.md", "` ```text ` [x](../e.py) `y`", "` ```text ` [x](source/e_py.md) `y`"),
        ("docs/a.md", "`[x](../e.py)`\n```\n[x](../e.py)\n```\n", None),
        ("docs/a.md", "[x](../gone.py)", None),
    ],
)
def test_links_to_files_become_links_to_pages(path, text, rewritten):
    def resolve(linked: str) -> str | None:
        return None if "gone" in linked else site_path(linked)

    assert rewrite_links(text, path, resolve) == (rewritten or text)


@pytest.mark.parametrize(
    ("text", "apart"),
    [
        ("Two:\n- a\n  b\n- c\n1. d", "Two:\n\n- a\n  b\n- c\n1. d"),
        ("Steps:\n1. a\n2. b\n\n- c", "Steps:\n\n1. a\n2. b\n\n- c"),
        ("of\n186. Then", "of\n186. Then"),
        ("2. a\n\n   b\n3. c\n4. d", "2. a\n\n   b\n\n3. c\n4. d"),
        (
            "- first\n\n````\n```\nx:\n- y\n````\nz:\n- z",
            "- first\n\n````\n```\nx:\n- y\n````\nz:\n\n- z",
        ),
    ],
)
def test_list_behind_a_paragraph_is_a_list_in_the_site_too(text, apart):
    assert with_lists_apart(text) == apart


def test_every_changed_file_of_a_stage_has_a_page_and_a_copy_has_none(tree):
    for stage in load_stages(ROOT).values():
        for file in [file for file in stage.added | stage.changed if file.endswith(".py")]:
            assert site_path(f"{stage.name}/{file}") in tree
    assert "source/m1_baseline/engine_py.md" in tree
    assert "source/m2_batching/engine_py.md" not in tree
    assert "(../m1_baseline/engine_py.md)" in tree["source/m2_batching/README.md"]


def test_page_of_a_stage_leads_to_what_it_changes(tree):
    assert "(diff.md)" in tree["source/m2_batching/README.md"]
    assert "\n+++ m2_batching/scheduler.py\n" in tree["source/m2_batching/diff.md"]
    assert "source/m1_baseline/diff.md" not in tree


def test_pages_that_are_made_are_linked_like_files(tree):
    assert tree["results/README.md"] == "[files](../source/m1_baseline/config_py.md)"
    assert "(results/README.md)" in tree["index.md"]


def test_translated_page_has_the_ids_of_the_original_too():
    translation = with_ids_of("# A `b`\n\n```\n# no\n```\n\n## 2. C: d", "# 甲\n\n## 2. 乙")
    # The title comes first: it names the page in MkDocs' navigation.
    assert translation == '# 甲\n\n<a id="a-b"></a>\n\n<a id="2-c-d"></a>\n\n## 2. 乙'


def test_page_of_code_in_chinese_leads_to_the_first_one_at_the_same_heading():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    file = SimpleNamespace(content_string="# A\n\n## The B\n\ntext\n")
    page = SimpleNamespace(url="zh/source/m1/index.html", file=file)
    text = hooks.on_page_read_source(page, config=None)
    assert '"../../../source/m1/index.html" + location.hash' in text
    assert anchors(text) >= {"a", "the-b"}
    assert hooks.on_page_read_source(SimpleNamespace(url="source/m1/index.html"), None) is None


def test_every_link_between_pages_has_its_target_and_its_heading(tree):
    """What `make docs` finds too, without MkDocs: pages that mkdocstrings fills are left out."""
    pages = {place: text for place, text in tree.items() if place.endswith(".md")}
    dead = []
    for place, text in pages.items():
        if "/" in place and place.startswith("source/") and "README" not in place:
            continue
        for target in links(text):
            file, _, fragment = target.partition("#")
            linked = posixpath.normpath(posixpath.join(posixpath.dirname(place), file))
            linked = linked if file else place
            if place.endswith(".zh.md") and linked.replace(".md", ".zh.md") in tree:
                linked = linked.replace(".md", ".zh.md")
            if (linked not in tree and linked not in MADE_ELSEWHERE) or (
                fragment and fragment not in anchors(tree.get(linked, ""))
            ):
                dead.append((place, target))
    assert dead == []


NOTES = sorted(path.name for path in LEARN.glob("0*.md") if not path.name.endswith(".zh.md"))


@pytest.mark.parametrize("note", NOTES)
def test_note_is_read_in_an_hour(note):
    assert num_words(read(note)) <= 5000, "move what goes deeper to docs/learn/advanced"


def test_code_with_backticks_stays_in_its_block(tree):
    # It has a run of three, so that its block needs four.
    text = tree["source/m0_infra/book/links_py.md"]
    assert text.endswith("\n````\n") and text.count("\n````") == 2


def test_writing_twice_changes_nothing_and_old_files_go(tmp_path):
    (tmp_path / "source.png").write_bytes(b"png")
    files = {"a.md": "text", "b/c.png": tmp_path / "source.png"}
    target = tmp_path / "book"
    assert (write_book(files, target), write_book(files, target)) == (2, 0)
    assert (target / "b/c.png").read_bytes() == b"png"
    assert write_book({"a.md": "new"}, target) == 2
    assert [path.name for path in target.rglob("*") if path.is_file()] == ["a.md"]
