"""Every block of Python in README and docs/ runs, and prints what its page says."""

import functools
from pathlib import Path

import pytest

import folovllm.entrypoints.llm as llm_module
from m0_infra.tests.snippets import missing_numbers, run_page

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    # Chinese pages have the same code: test_translations compares it.
    if not path.name.endswith(".zh.md") and "```python\n" in path.read_text(encoding="utf-8")
]


@pytest.fixture(scope="module")
def load_model_once():
    """The pages use one model: loading it takes longer than what they do with it."""
    loaded = functools.cache(llm_module.load_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm_module, "load_model", loaded)
        yield


@pytest.mark.no_cover
@pytest.mark.parametrize("page", PAGES)
def test_snippets_of_the_page_print_what_it_says(page, load_model_once, monkeypatch):
    monkeypatch.chdir(ROOT)
    differences, num_run = run_page(ROOT / page)
    assert differences == []
    assert num_run > 0 or "skip: next" in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("printed", "shown", "missing"),
    [
        ("276537 tokens", "276,537", []),
        ("0.576000034", "prints 0.576 and 0.136", []),
        ("7.555", "7.55", []),
        ("12 13", "12, 14", ["13"]),
        ("0.58", "0.576", ["0.58"]),
        ("2.31", "2", ["2.31"]),
    ],
)
def test_number_counts_as_shown_if_the_page_has_it_or_rounds_it(printed, shown, missing):
    assert missing_numbers(printed, shown) == missing
