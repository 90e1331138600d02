import re
from pathlib import Path

import pytest

from compare.columns import SHORT_COLUMNS, table_cells
from compare.documents import marked_documents, replace_marked
from compare.measurement_pages import (
    folder_places,
    measurement_pages,
    pages_beside_results,
    write_pages,
)
from compare.publish import document_tables, write_tables
from compare.results import result_folders, write_json
from compare.table import short_table
from compare.tests.synthetic import make_run

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)#]+)\)")


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "compare/results/cpu-2-cores/nano"
    write_json(folder / "m1_baseline.json", make_run())
    (folder / "charts").mkdir()
    (folder / "charts/throughput.png").write_bytes(b"png")
    return tmp_path


def test_pages_beside_the_results_are_those_of_what_is_stored():
    """`python -m compare table` writes them."""
    for file, text in pages_beside_results(ROOT).items():
        assert file.read_text(encoding="utf-8") == text


def test_tables_in_documents_are_those_of_what_is_stored():
    """`python -m compare table` writes them too."""
    tables = document_tables(result_folders(ROOT / "compare/results"), ROOT)
    for document in marked_documents(ROOT):
        text = document.read_text(encoding="utf-8")
        assert replace_marked(text, tables, str(document)) == text


def test_every_link_of_a_page_leads_to_a_file(root):
    assert write_pages(root) == [root / "compare/results/cpu-2-cores/README.md"]
    assert write_pages(root) == []
    (page,) = pages_beside_results(root)
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).is_file()
    book = measurement_pages(root)["results/cpu-2-cores.md"]
    assert "![throughput of nano](../../compare/results/cpu-2-cores/nano/charts/" in book
    for target in LINK.findall(book):
        assert (root / "docs/results" / target).resolve().is_file()


def test_the_book_shows_the_folders_and_the_page_of_a_device_on_one_page(root):
    device, page = "compare/results/cpu-2-cores", "results/cpu-2-cores.md"
    places = folder_places(root)
    assert places[device] == places[f"{device}/README.md"] == page
    assert places[f"{device}/nano"] == f"{page}#nano"


def test_a_first_look_has_four_columns_and_the_memory_that_was_needed(root):
    run = make_run("m2_batching", on_cuda=True)
    run["steps"]["num_kv_tokens_reserved"] = [2048] * len(run["steps"]["num_running"])
    needed = run["peak_memory_bytes"]["weights"] + 2048 * 46080 + 0.05e9
    heading, row = table_cells([run], SHORT_COLUMNS)
    assert heading == ["stage", "output tok/s", "TTFT p50", "memory"]
    assert row[3] == f"{needed / 2**20:.0f} MiB"
    (root / "README.md").write_text(
        "<!-- compare:cpu-2-cores/nano/short:begin -->\n<!-- compare:cpu-2-cores/nano/short:end -->"
    )
    folders = result_folders(root / "compare/results")
    assert write_tables(folders, root) == [root / "README.md"]
    assert short_table([make_run()]) in (root / "README.md").read_text()
