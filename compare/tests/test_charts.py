import re
from typing import Any

import pytest

from compare.charts import draw_all, style
from compare.charts.bars import memory_parts
from compare.charts.block_map import MAX_ROWS, OWNER_COLOURS, block_map
from compare.charts.gaps import has_gaps, token_gaps
from compare.charts.hits import has_hits, ttft_over_hit
from compare.charts.style import PEER_COLOURS, STAGE_COLOURS, needs_log
from compare.report import write_report
from compare.tests.synthetic import make_run, with_blocks, with_late_request

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("factor", [3, 50])
def test_every_chart_is_drawn_and_the_report_needs_nothing_else(tmp_path, factor):
    cut = {"num_requests": 2, "num_requests_before_cut": 8} if factor == 50 else {}
    results = [
        make_run(rate=20.0, **cut),
        make_run("m2_batching", rate=20.0 * factor, batch=4),
        make_run("hf", rate=15.0),
    ]
    charts = draw_all(results, tmp_path / "charts")
    assert {chart.stem for chart in charts} == {
        "throughput", "latency", "memory", "latency-cdf", "timeline",
    }  # fmt: skip
    for chart in charts:
        assert chart.read_bytes().startswith(PNG_SIGNATURE) and chart.stat().st_size > 10_000
    page = write_report(results, charts, tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(charts)
    assert "http:" not in page and "https:" not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "m2_batching" in page and "2.13.0" in page


def test_turns_of_a_conversation_are_no_late_requests():
    run = with_late_request(make_run("m5_chunked"), [1.0])
    assert has_gaps(run)
    run["requests"][-1]["follows"] = "0"
    assert not has_gaps(run)


def test_results_with_missing_numbers_are_drawn_all_the_same(tmp_path):
    run = make_run()
    empty = dict.fromkeys(("p50", "p90", "p99", "mean"))
    run |= {"tpot_s": empty, "ttft_s": empty, "peak_memory_bytes": None, "steps": {}}
    assert "timeline" not in {chart.stem for chart in draw_all([run], tmp_path)}


def test_stage_with_blocks_gets_a_map_of_them(tmp_path):
    runs = [make_run(batch=2), with_blocks(make_run("m3_paged", batch=2), num_blocks=6)]
    charts = {chart.stem for chart in draw_all(runs, tmp_path)}
    assert {name for name in charts if "block" in name} == {"block-map-m3_paged"}


def test_block_map_shows_owners_shared_blocks_and_who_came_back():
    run = with_blocks(make_run("m3_paged", batch=2), num_blocks=6)
    run["steps"]["num_preemptions"][3] = 1
    upper, lower = block_map(run).axes
    mesh: Any = lower.collections[0]
    cells = mesh.get_array()
    assert cells.shape == (6, 4)
    shared = len(OWNER_COLOURS)
    assert cells[:, 1].tolist() == [0, shared, shared + 1, 1, None, None]
    assert [text.get_text() for text in lower.texts] == ["0", "0 again", "1"]
    assert upper.get_ylabel() == "blocks in use"
    edges = mesh.get_coordinates()[0, :, 0]
    steps = run["steps"]
    assert edges[:-1].tolist() == [steps["start_s"][step] for step in (0, 2, 4, 6)]
    assert edges[-1] == pytest.approx(run["duration_s"])


def test_large_block_map_is_thinned_out_and_says_so():
    run = with_blocks(make_run("m3_paged", batch=2), num_blocks=4 * MAX_ROWS)
    figure = block_map(run)
    cells = figure.axes[1].collections[0].get_array()
    assert cells is not None and cells.shape == (MAX_ROWS, 4)
    assert any("one block in 4 is shown" in text.get_text() for text in figure.texts)


def test_token_gaps_stand_over_time_with_the_late_prompt_marked():
    stalled = with_late_request(make_run("m4_flash"), [1.5])
    chunked = with_late_request(make_run("m5_chunked"), [0.08] * 6)
    figure = token_gaps([make_run("m3_paged"), stalled, chunked])
    upper, lower = figure.axes
    points: Any = upper.lines[0]
    assert len(points.get_xdata()) == 4 * 29
    assert max(points.get_ydata()) == pytest.approx(1.5)
    worst = points.get_xdata()[points.get_ydata().argmax()]
    assert worst == pytest.approx(0.5 + 1.5)  # when the gap ended
    lines: Any = upper.lines[1:]
    marks = [line.get_xdata()[0] for line in lines]
    assert marks == pytest.approx([0.48, 2.0])
    assert "worst gap 1.50 s" in upper.get_title(loc="left")
    assert "worst gap 80.0 ms, late prompt's TTFT 500 ms" in lower.get_title(loc="left")
    assert upper.get_yscale() == "log" == lower.get_yscale()
    assert upper.get_xlim() == lower.get_xlim() == (0, 1.01 * stalled["duration_s"])


def test_token_gaps_are_drawn_only_for_late_requests_whose_times_are_stored(tmp_path):
    late = with_late_request(make_run("m4_flash"), [1.5])
    assert "token-gaps" in {chart.stem for chart in draw_all([late], tmp_path)}
    del late["requests"][0]["token_steps"]
    assert not has_gaps(late) and not has_gaps(make_run())


def test_no_results_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        draw_all([], tmp_path)


def test_text_from_results_is_escaped_in_the_report(tmp_path):
    run = make_run()
    run["environment"]["cpu"] = "<script>alert(1)</script>"
    page = write_report([run], [], tmp_path / "report.html").read_text()
    assert "<script>" not in page


def test_memory_parts_add_up_to_the_peak():
    for run in (make_run(), make_run(on_cuda=True)):
        assert sum(memory_parts(run).values()) == pytest.approx(run["peak_memory_bytes"]["total"])


def test_memory_that_no_request_reserved_is_told_apart_on_a_device_and_not_on_a_cpu():
    name = style.NOT_NEEDED
    run = make_run("m3_paged", on_cuda=True)
    run["steps"]["num_kv_tokens_reserved"] = [64] * len(run["steps"]["num_running"])
    reserved = run["peak_memory_bytes"]["kv_reserved"]
    run["peak_memory_bytes"]["kv_live"] = 40 * 46080
    parts = memory_parts(run)
    assert parts[name] == reserved - 64 * 46080
    assert parts["KV cache, reserved and empty"] == 24 * 46080
    run["peak_memory_bytes"]["activations"] = None
    assert memory_parts(run)[name] == 0


def test_every_stage_and_peer_has_a_colour_of_its_own():
    colours = [*STAGE_COLOURS.values(), *PEER_COLOURS.values()]
    assert len(set(colours)) == len(colours) == 10


def test_scale_is_logarithmic_only_where_a_bar_would_vanish():
    assert needs_log([1.0, 50.0]) and not needs_log([1.0, 3.0]) and not needs_log([0.0, 3.0])


def test_ttft_stands_over_the_cached_part_of_the_prompt():
    run = make_run("m6_prefix")
    groups = ["hit 90%", "cold", "hit 50%", None]
    for number, request in enumerate(run["requests"]):
        request["group"] = groups[number % 4]
    run["requests"][0] |= {"arrival_s": 1.0, "first_token_s": 1.25}
    assert not has_hits(make_run())
    (axes,) = ttft_over_hit([make_run(), run]).axes
    lines = [line for line in axes.lines if line.get_linestyle() != "None"]
    assert [list(line.get_xdata()) for line in lines] == [[0.0, 0.5, 0.9]]
    dots = {(x, y) for line in axes.lines for x, y in zip(*line.get_data(), strict=True)}
    assert (0.9, 0.25) in dots
