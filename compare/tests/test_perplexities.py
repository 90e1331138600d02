"""Perplexity in a column of its own: stored apart from the runs, shown beside quantised models."""

import json
from typing import Any

import pytest

from compare.perplexities import load_table, with_perplexities
from compare.publish import draw_folder
from compare.table import markdown_table, short_table, terminal_table
from compare.tests.synthetic import make_run

SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 128}
STORED: dict[str, Any] = {
    "text": "wiki.txt", "text_sha256": "0", "window": 512, "num_windows": 8, "dtype": "float32",
    "models": [
        {"name": "SmolLM2-135M-Instruct", "quantization": None, "perplexity": 30.359},
        {"name": "SmolLM2-135M-Instruct-GPTQ", "quantization": SETTINGS, "perplexity": 38.012},
        {"name": "SmolLM2-135M-Instruct-GPTQ", "quantization": {"bits": 3}, "perplexity": 99.0},
    ],
}  # fmt: skip


def quantized(**options):
    run = make_run("m7_gptq")
    run["model"] |= {"name": "models/SmolLM2-135M-Instruct-GPTQ", "quantization": SETTINGS}
    run["model"] |= options
    return run


def last_cells(table):
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    return [line.rstrip(" |").rpartition("| ")[2] for line in rows]


@pytest.mark.parametrize("table", [markdown_table, short_table])
def test_model_of_each_row_has_its_perplexity_and_a_dash_where_none_is_stored(table):
    unknown = make_run("hf")
    unknown["model"]["name"] = "somebody/else"
    results = with_perplexities([make_run(), quantized(), unknown], {"wiki": STORED})
    assert last_cells(table(results)) == ["perplexity wiki", "30.4", "38.0", "–"]
    line = "perplexity wiki: of the first 8 windows of 512 tokens of wiki.txt, float32"
    assert line in table(results) and line in terminal_table(results, 80)


def test_texts_have_columns_of_their_own():
    other = {**STORED, "text": "c4.txt", "models": STORED["models"][:2]}
    other["models"][1] = {**other["models"][1], "perplexity": 25.0}
    table = markdown_table(with_perplexities([quantized()], {"c4": other, "wiki": STORED}))
    assert "| perplexity c4 | perplexity wiki |" in table and "| 25.0 | 38.0 |" in table


@pytest.mark.parametrize(
    "results",
    [
        [make_run(), make_run("m2_batching")],
        [make_run(), quantized(load_format="dummy")],
        [make_run(), quantized(quantization={"bits": 2})],
        [make_run(), quantized(name="another")],
    ],
    ids=["nobody is quantised", "random weights", "other settings", "another model"],
)
def test_no_column_without_a_quantised_model_of_known_quality(results):
    assert "perplexity" not in markdown_table(with_perplexities(results, {"wiki": STORED}))


def write(folder, results, stored):
    folder.mkdir(parents=True)
    for result in results:
        (folder / f"{result['stage']}.json").write_text(json.dumps(result), encoding="utf-8")
    file = folder.parents[1] / "perplexity" / "wiki.json"
    file.parent.mkdir()
    file.write_text(json.dumps(stored), encoding="utf-8")


def test_files_beside_the_results_are_read_for_tables_and_reports(tmp_path):
    folder = tmp_path / "cpu-2-cores" / "nano"
    write(folder, [make_run(), quantized()], STORED)
    assert last_cells(markdown_table(load_table(folder)))[1:] == ["30.4", "38.0"]
    page = draw_folder(folder)[1].read_text(encoding="utf-8")
    assert "<td>38.0</td>" in page and "<dt>perplexity wiki</dt>" in page


def test_files_of_another_kind_are_refused_by_name(tmp_path):
    folder = tmp_path / "cpu-2-cores" / "nano"
    write(folder, [make_run()], {"stage": "m7_gptq"})
    with pytest.raises(ValueError, match=r"wiki.json holds no perplexities .* move it elsewhere"):
        load_table(folder)
