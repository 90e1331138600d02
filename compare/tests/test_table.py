import pytest

from compare import formatting as fmt
from compare.columns import COLUMNS, make_rows, table_cells
from compare.documents import replace_marked, update_documents
from compare.merge import merge_runs
from compare.report import write_report
from compare.table import footnotes, markdown_table, terminal_table
from compare.tests.synthetic import make_run, with_late_request


def results():
    slow = make_run("m2_batching", rate=10.0, num_requests=8)
    fast = make_run("m3_paged", rate=40.0, num_requests=8)
    return [make_run(rate=20.0), slow, fast, make_run("hf", rate=5.0)]


def cell(rows, stage, heading):
    column = [c.heading for c in COLUMNS].index(heading)
    return next(row for row in rows if row[0].startswith(stage))[column]


def test_factors_follow_the_ladder_and_a_slower_stage_is_shown_as_slower():
    rows = table_cells(results())
    assert cell(rows, "m1_baseline", "× M1") == "1.00×"
    assert cell(rows, "m2_batching", "× M1") == "0.50×"
    assert cell(rows, "m3_paged", "× M1") == "2.00×"
    assert cell(rows, "m3_paged", "× previous") == "4.00×"
    assert cell(rows, "m1_baseline", "× previous") == fmt.MISSING
    assert cell(rows, "hf", "× previous") == fmt.MISSING
    assert cell(rows, "hf", "× M1") == "0.25×"


def test_without_m1_there_is_no_factor_over_it():
    rows = table_cells(results()[1:])
    assert cell(rows, "m3_paged", "× M1") == fmt.MISSING
    assert cell(rows, "m3_paged", "× previous") == "4.00×"


def test_missing_values_are_dashes():
    run = make_run()
    for name in ("gpu_utilisation", "roofline_fraction", "kv_utilisation", "ttft_s", "tpot_s"):
        run[name] = None
    row = table_cells([run])[1]
    assert row.count(fmt.MISSING) >= 7  # with × previous and the spread of a single run


def test_stage_that_ran_a_beginning_is_marked_and_explained():
    cut = make_run(num_requests=2, num_requests_before_cut=8)
    whole = make_run("m2_batching", num_requests=8)
    assert [row.ran_prefix for row in make_rows([cut, whole])] == [True, False]
    assert table_cells([cut, whole])[1][0] == "m1_baseline†"
    assert any("first 2 requests" in note for note in footnotes([cut, whole]))
    assert not any("†" in note for note in footnotes([whole]))


def test_processes_that_held_a_model_together_are_named():
    alone = make_run()
    two = make_run("m2_batching") | {"tensor_parallel_size": 2}
    (note,) = [note for note in footnotes([alone, two]) if "processes" in note]
    assert note.startswith("m2_batching: 2 processes held the model together")
    assert not any("processes" in note for note in footnotes([alone]))


def test_spread_shows_slowest_and_fastest_repeat():
    merged = merge_runs([make_run(rate=rate) for rate in (10.0, 20.0, 30.0)])
    spread = merged["spread"]["output_tokens_per_s"]
    expected = f"{fmt.number(spread['min'])}–{fmt.number(spread['max'])}"
    assert table_cells([merged])[1][-1] == expected


def test_runs_that_differ_too_much_carry_a_warning():
    steady = merge_runs([make_run(rate=rate) for rate in (20.0, 21.0, 39.0)])
    wild = merge_runs([make_run(rate=rate) for rate in (10.0, 20.0, 21.0)])
    assert not any("differ by" in note for note in footnotes([steady]))
    assert any("m1_baseline: its runs differ by 2.1 times" in note for note in footnotes([wild]))


def test_terminal_table_wraps_columns_and_keeps_every_value():
    narrow = terminal_table(results(), 80)
    assert all(len(line) <= 80 for line in narrow.split("some CPU")[0].splitlines())
    wide = terminal_table(results(), 1000)
    assert wide.count("m2_batching") < narrow.count("m2_batching")
    for row in table_cells(results()):
        assert all(text in narrow for text in row)


def late_results():
    return [
        with_late_request(make_run("m4_flash"), [1.5]),
        with_late_request(make_run("m5_chunked"), [0.08] * 6),
    ]


def test_workload_with_a_late_prompt_has_a_second_table_with_its_cost(tmp_path):
    tables = markdown_table(late_results()).split("\n\n")
    assert [table.splitlines()[0].startswith("| stage |") for table in tables[:2]] == [True] * 2
    stalled, chunked = tables[1].splitlines()[2:]
    assert stalled == "| m4_flash | 1.52 s | 1.50 / 1.50 / 1.50 s | 50.0 / 1,500 / 1,500 ms |"
    assert chunked == "| m5_chunked | 500 ms | 80.0 / 80.0 / 80.0 ms | 50.0 / 80.0 / 80.0 ms |"
    page = write_report(late_results(), [], tmp_path / "report.html").read_text()
    assert page.count("<table>") == 3 and page.count("<dt>stage</dt>") == 1
    assert "1.50 / 1.50 / 1.50 s" in page
    narrow = terminal_table(late_results(), 80)
    assert "late TTFT p50" in narrow and "50.0 / 80.0 / 80.0 ms" in narrow


def test_workload_without_a_late_prompt_has_one_table():
    assert "late" not in markdown_table(results()) and "late" not in terminal_table(results(), 80)


def test_workload_with_groups_of_requests_has_a_table_of_their_first_tokens():
    cut, whole = make_run("m5_chunked"), make_run("m6_prefix")
    cut["ttft_by_group_s"] = {"cold": {"p50": 0.5, "p99": 0.6}}
    whole["ttft_by_group_s"] = {
        "cold": {"p50": 0.51, "p99": 0.62}, "hit 99.5%": {"p50": 0.05, "p99": None},
    }  # fmt: skip
    heading, _, *rows = markdown_table([cut, whole]).split("\n\n")[1].splitlines()
    assert heading == "| stage | TTFT cold p50 / p99 | TTFT hit 99.5% p50 / p99 |"
    assert rows == [
        "| m5_chunked | 500 / 600 ms | – |",
        "| m6_prefix | 510 / 620 ms | 50.0 / – ms |",
    ]
    assert "cold" not in markdown_table(results())


def test_gaps_beside_a_late_prompt_are_medians_over_the_runs():
    runs = [with_late_request(make_run("m4_flash"), [stall]) for stall in (1.0, 3.0, 2.0)]
    merged = merge_runs(runs)
    assert merged["decoder_itl_beside_late_s"]["max"] == pytest.approx(2.0)
    spread = merged["spread"]["decoder_itl_beside_late_s.max"]
    assert [spread["min"], spread["max"]] == pytest.approx([1.0, 3.0])
    assert merge_runs([make_run()])["spread"]["late_ttft_s.p50"] is None


def test_markdown_rows_have_as_many_cells_as_the_heading():
    lines = [line for line in markdown_table(results()).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (fmt.seconds(0.0123, 0.0456), "12.3 / 45.6 ms"),
        (fmt.seconds(1.5), "1.50 s"),
        (fmt.seconds(None), fmt.MISSING),
        (fmt.seconds(2e-5), "20.0 µs"),
        (fmt.num_bytes(2.0**31, None), f"2.00 / {fmt.MISSING} GiB"),
        (fmt.number(12345.6), "12,346"),
        (fmt.percent(0.5), "50.0 %"),
        (fmt.factor(None), fmt.MISSING),
    ],
)
def test_numbers_have_three_digits_and_a_unit(text, expected):
    assert text == expected


KEY = "cpu/nano"
BEGIN, END = f"<!-- compare:{KEY}:begin -->", f"<!-- compare:{KEY}:end -->"


def test_only_text_between_markers_changes_and_twice_is_once():
    text = f"before `{BEGIN}` in a sentence\r\n{BEGIN}\r\nold\n{END}\nafter  \n\n"
    once = replace_marked(text, {KEY: "NEW"})
    assert "old" not in once and "NEW" in once
    assert once.startswith(f"before `{BEGIN}` in a sentence\r\n{BEGIN}")
    assert once.endswith(f"{END}\nafter  \n\n")
    assert replace_marked(once, {KEY: "NEW"}) == once


def test_markers_of_other_results_stay_as_they_are():
    text = f"{BEGIN}\nold\n{END}\n"
    assert replace_marked(text, {"gpu/nano": "NEW"}) == text


@pytest.mark.parametrize(
    "text", [BEGIN, END, f"{BEGIN}\n<!-- compare:gpu/nano:end -->", f"{BEGIN}\n{BEGIN}\n{END}"]
)
def test_unpaired_markers_are_refused(text):
    with pytest.raises(ValueError, match="marker"):
        replace_marked(text, {KEY: "NEW"})


def test_documents_with_markers_are_found_and_unchanged_ones_not_written(tmp_path):
    for name in ("README.md", "docs/learn/a.md", "m1_baseline/README.md", "other/deep/b.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{BEGIN}\n{END}\n")
    (tmp_path / "plain.md").write_text("no markers\n")
    changed = update_documents(tmp_path, {KEY: "NEW"})
    assert {file.relative_to(tmp_path).as_posix() for file in changed} == {
        "README.md", "docs/learn/a.md", "m1_baseline/README.md",
    }  # fmt: skip
    assert update_documents(tmp_path, {KEY: "NEW"}) == []
