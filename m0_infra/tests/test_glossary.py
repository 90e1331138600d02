"""The glossary is complete in both directions: notes lead to it, and it leads back."""

import re

import pytest

from m0_infra.tests.notes import LEARN, anchor, anchors, dead_links, links, read

NOTES = ["00_primer.md", "01_baseline.md", "02_batching.md", "03_paged.md"]
NOTES += ["05_chunked.md", "06_prefix.md", "07_gptq.md"]


def terms(name: str = "glossary.md") -> dict[str, str]:
    """What stands under each heading."""
    parts = re.split(r"^### (.+)$", read(name), flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def linked_terms(note: str) -> list[str]:
    prefix = "glossary.md#"
    return [target[len(prefix) :] for target in links(read(note)) if target.startswith(prefix)]


GLOSSARIES = ["glossary.md", "glossary.zh.md"]


@pytest.mark.parametrize("glossary", GLOSSARIES)
def test_terms_are_in_alphabetical_order(glossary):
    names = [name.lower() for name in terms(glossary)]
    assert names == sorted(names)


@pytest.mark.parametrize("glossary", GLOSSARIES)
def test_every_term_says_where_it_is_introduced(glossary):
    definitions = terms(glossary).items()
    assert [name for name, text in definitions if not re.search(r"→ \[[^\]]+\]\(", text)] == []
    assert dead_links(glossary) == []


def test_both_languages_have_the_same_terms():
    assert list(terms("glossary.zh.md")) == list(terms())


def test_every_term_is_linked_from_a_note():
    linked = {term for path in LEARN.glob("0*.md") for term in linked_terms(path.name)}
    assert {anchor(name) for name in terms()} - linked == set()


@pytest.mark.parametrize("note", NOTES)
def test_note_links_each_term_once_and_to_what_there_is(note):
    linked = linked_terms(note)
    assert set(linked) <= anchors(read("glossary.md"))
    assert len(linked) == len(set(linked))
    assert len(linked) >= 15
