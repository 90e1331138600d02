import pytest

from compare.merge import merge_runs
from compare.results import read_json, workload_slug, write_json
from compare.tests.synthetic import make_run


def three_runs():
    return [make_run(rate=rate) for rate in (30.0, 10.0, 20.0)]


def test_merged_result_is_the_run_with_the_median_rate():
    runs = three_runs()
    merged = merge_runs(runs)
    assert merged["output_tokens_per_s"] == runs[2]["output_tokens_per_s"]
    assert merged["steps"] == runs[2]["steps"]
    assert merged["repeats"] == 3


def test_every_headline_number_is_its_own_median():
    runs = three_runs()
    for run, total in zip(runs, (1, 2, 9), strict=True):
        run["peak_memory_bytes"]["total"] = total
    runs[0]["ttft_s"]["p50"], runs[1]["ttft_s"]["p50"], runs[2]["ttft_s"]["p50"] = 5.0, 6.0, 99.0
    merged = merge_runs(runs)
    assert merged["peak_memory_bytes"]["total"] == 2
    assert merged["ttft_s"]["p50"] == 6.0


def test_spread_keeps_all_values_in_run_order():
    merged = merge_runs(three_runs())
    spread = merged["spread"]["output_tokens_per_s"]
    assert spread["min"] == min(spread["values"]) and spread["max"] == max(spread["values"])
    assert spread["values"] == [run["output_tokens_per_s"] for run in three_runs()]


def test_ttft_of_each_group_is_a_median_with_its_spread():
    runs = three_runs()
    for run, hit in zip(runs, (0.3, 0.1, 0.2), strict=True):
        run["ttft_by_group_s"] = {
            "cold": {"p50": 9.0, "p99": 9.0},
            "hit 99.5%": {"p50": hit, "p99": 1 - hit},
        }
    merged = merge_runs(runs)
    assert merged["ttft_by_group_s"]["cold"] == {"p50": 9.0, "p99": 9.0}
    assert merged["ttft_by_group_s"]["hit 99.5%"] == {"p50": 0.2, "p99": 0.8}
    assert merged["spread"]["ttft_by_group_s"]["hit 99.5%"] == {
        "min": 0.1, "max": 0.3, "values": [0.3, 0.1, 0.2],
    }  # fmt: skip


def test_runs_without_groups_of_requests_have_no_spread_of_them():
    assert "ttft_by_group_s" not in merge_runs(three_runs())["spread"]


def test_number_that_no_run_has_stays_missing():
    merged = merge_runs(three_runs())
    assert merged["gpu_utilisation"] is None
    assert merged["peak_memory_bytes"]["activations"] is None


def test_runs_are_not_changed_by_merging():
    runs = three_runs()
    merge_runs(runs)
    assert runs == three_runs()


def test_runs_of_two_stages_are_refused():
    with pytest.raises(ValueError, match="hf, m1_baseline"):
        merge_runs([make_run("m1_baseline"), make_run("hf")])


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="no runs"):
        merge_runs([])


def test_result_file_is_read_back_and_leaves_no_partial_file(tmp_path):
    write_json(tmp_path / "a" / "hf.json", make_run("hf"))
    assert read_json(tmp_path / "a" / "hf.json") == make_run("hf")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["hf.json"]


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_file_without_a_result_is_named_in_the_error(tmp_path, text):
    file = tmp_path / "broken.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json"):
        read_json(file)


@pytest.mark.parametrize(
    ("spec", "slug"),
    [
        ("nano", "nano"),
        ("nano:8", "nano-8"),
        ("fixed:batch=8,input=512", "fixed-batch-8-input-512"),
        ("azure:/some/where/trace.csv", "azure-trace.csv"),
        ("multi-turn:/some/where/a.jsonl,turns=2", "multi-turn-a.jsonl-turns-2"),
        ("prefix-hit:cached=0.5/0.9,num=2", "prefix-hit-cached-0.5-0.9-num-2"),
    ],
)
def test_workload_folder_name(spec, slug):
    assert workload_slug(spec) == slug
