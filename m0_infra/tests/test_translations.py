"""A Chinese page has the headings, tables, code, numbers and links of its English original.

CONTRIBUTING.md says what no test sees, and how to bring a page up to date.
"""

import re

import pytest

from m0_infra.tests.notes import LEARN, dead_links, links, prose, read

FOLDERS = ("", "advanced/", "../guides/", "../../")
PAGES = [f"{folder}{path.name}" for folder in FOLDERS for path in LEARN.glob(f"{folder}*.zh.md")]
FENCE = re.compile(r"^```.*?^```", re.S | re.M)
COMMENT = re.compile(r"(^| {2,})# .*$", re.M)
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?!\w)", re.A)


def both(page: str) -> tuple[str, str]:
    return read(page.replace(".zh.md", ".md")), read(page)


def headings(text: str) -> list[tuple[str, str]]:
    """Level and number of each heading."""
    return re.findall(r"^(#+) ((?:\d+\.)*\d*)", prose(text), re.M)


def tables(text: str) -> list[int]:
    """How many cells each row of each table has."""
    rows = re.findall(r"^\|.*\|$", prose(text), re.M)
    return [row.replace(r"\|", "").count("|") for row in rows]


def numbers(text: str) -> set[str]:
    """Numbers of two digits and more, outside of code, links and what is generated."""
    text = re.sub(r"<!-- compare:.*?:end -->", "", prose(text), flags=re.S)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)
    return {number for number in NUMBER.findall(text) if len(number) > 1}


def targets(text: str) -> set[str]:
    return {target.replace(".zh.md", ".md").split("#")[0] for target in links(text)} - {""}


def terms(text: str) -> set[str]:
    """What the page links in the glossary."""
    pages = [target.replace(".zh.md", ".md").partition("#") for target in links(text)]
    return {anchor for page, _, anchor in pages if page.endswith("glossary.md")}


@pytest.mark.parametrize("page", PAGES)
def test_headings_and_tables_are_those_of_the_original(page):
    english, chinese = both(page)
    assert headings(chinese) == headings(english)
    assert tables(chinese) == tables(english)


@pytest.mark.parametrize("page", PAGES)
def test_code_is_that_of_the_original(page):
    english, chinese = both(page)
    # A comment may be in the reader's language.
    code = [COMMENT.sub("", "\n".join(FENCE.findall(text))) for text in (english, chinese)]
    assert code[0] == code[1]
    assert re.findall(r"^    \S.*$", chinese, re.M) == re.findall(r"^    \S.*$", english, re.M)


@pytest.mark.parametrize("page", PAGES)
def test_no_number_of_the_original_is_missing(page):
    english, chinese = both(page)
    assert numbers(english) - numbers(chinese) == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_what_those_of_the_original_lead_to(page):
    english, chinese = both(page)
    assert targets(chinese) == targets(english)
    assert dead_links(page) == []


@pytest.mark.parametrize("page", PAGES)
def test_reader_of_chinese_stays_in_chinese_and_finds_the_same_terms(page):
    english, chinese = both(page)
    folder = (LEARN / page).parent
    own_original = folder / page.rsplit("/", 1)[-1].replace(".zh.md", ".md")
    files = {folder / target.split("#")[0] for target in links(chinese)}
    has_twin = [file for file in files if file.with_suffix(".zh.md").exists()]
    assert [file for file in has_twin if file != own_original] == []
    assert terms(chinese) == terms(english)


@pytest.mark.parametrize("page", PAGES)
def test_no_star_beside_a_chinese_character_is_shown_as_it_is(page):
    """`字**[…` is no emphasis: there is no space that would show its edge."""
    text = re.sub(r"`[^`]*`", "", prose(read(page)))
    assert re.findall(r"[\u4e00-\u9fff]\*+\[.{9}|.{9}\)\*+[\u4e00-\u9fff]", text) == []
