"""Interview questions: how many, how long the answers, where links lead; and what was promised."""

import re

import pytest

from m0_infra.tests.notes import dead_links, read

PAGE = "interview.md"
LEVELS = ["Beginner", "Intermediate", "Advanced", "System design"]


def answers() -> dict[str, str]:
    """What stands under each question, links written out as their texts."""
    text = re.sub(r"^## .*$", "", read(PAGE), flags=re.M)
    parts = re.split(r"^### (.+)$", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_there_are_fifty_questions_in_four_levels():
    assert re.findall(r"^## (.+)$", read(PAGE), re.M) == LEVELS
    assert len(answers()) >= 50
    numbers = [int(question.split(".")[0]) for question in answers()]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("question", answers())
def test_answer_takes_a_minute_or_two_and_names_its_place(question):
    answer = answers()[question]
    num_words = len(re.sub(r"\]\([^)]*\)", "]", answer).split())
    assert 100 <= num_words <= 250
    places = r"\]\((0\d[ab]?_|advanced/|README|\.\./dev/|code/)"
    assert re.search(places, answer), "no note or log behind it"


def test_links_lead_somewhere():
    assert dead_links(PAGE) == []


def test_every_topic_of_the_plan_has_its_answer():
    table = re.findall(r"^\| .*\[question (\d+)\]\(#(\d+)-", read(PAGE), re.M)
    assert len(table) == 10
    assert all(number == anchor for number, anchor in table)


def test_every_promise_names_a_folder_or_file_that_is_there():
    assert dead_links("../promised.md") == []
    rows = re.findall(r"^\| .* \|$", read("../promised.md"), re.M)
    assert len(rows) >= 20
