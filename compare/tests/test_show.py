import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from compare.charts.draw import charts_of
from compare.cli import main
from compare.results import read_json
from compare.shows import read_show
from compare.stages import discover_stages
from compare.tests.fake_stage import make_stage
from compare.tests.synthetic import make_run, with_late_request
from compare.verdict import find_metrics, verdict
from folovllm.workloads.workload import make_workload

ROOT = Path(__file__).resolve().parents[2]
LATER_STAGES = [name for name, s in discover_stages(ROOT).items() if not s.is_peer][1:]
FOLDER = "build/compare/m2_batching"
DECLARED = """
[m1_baseline]
max_code_lines = 5
[m2_batching]
max_code_lines = 5
previous = "m1_baseline"
[m2_batching.show]
workload = "nano"
metrics = ["output_tokens_per_s", "ttft_s.p50"]
chart = "timeline"
options = { max_num_seqs = "7", max_model_len = "64" }
"""
SHOW = ["show", "--device", "cpu", "--stage", "m2"]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m0_infra").mkdir()
    (tmp_path / "m0_infra/stages.toml").write_text(DECLARED)
    return tmp_path


def two_stages(root, second=None, **options):
    make_stage(root, "m1_baseline", json.dumps(make_run()))
    second = second or make_run("m2_batching", rate=60.0, batch=4)
    make_stage(
        root, "m2_batching", json.dumps(second), **{"options": "max_num_seqs: int = 4", **options}
    )
    make_stage(root, "m3_paged", json.dumps(make_run("m3_paged")))


def calls(root):
    return [json.loads(line) for line in (root / "calls.txt").read_text().splitlines()]


def test_stage_is_shown_beside_the_one_before_it_with_a_sentence_and_a_chart(root, capsys):
    two_stages(root)
    marked = "<!-- compare:cpu-2-cores/nano:begin -->\n<!-- compare:cpu-2-cores/nano:end -->\n"
    (root / "README.md").write_text(marked)
    assert main([*SHOW, "--repeats", "2"]) == 0
    names = [name for name, _ in calls(root)]
    assert names == ["m1_baseline", "m2_batching", "m2_batching", "m1_baseline"]
    options = dict(calls(root))
    assert options["m2_batching"]["--max-num-seqs"] == "7"
    assert options["m2_batching"]["--workload"] == "nano"
    assert "--max-num-seqs" not in options["m1_baseline"]
    assert options["m1_baseline"]["--max-model-len"] == "64"
    assert "--kv-cache-bytes" not in options["m1_baseline"]
    printed = capsys.readouterr().out
    assert "m2_batching is better than m1_baseline here: output tokens per second" in printed
    assert f"chart: {FOLDER}/timeline.png" in printed
    assert (root / FOLDER / "timeline.png").is_file()
    assert read_json(root / FOLDER / "m2_batching.json")["repeats"] == 2
    assert (root / "README.md").read_text() == marked and not (root / "compare").exists()


def test_user_replaces_workload_and_options_of_a_show(root):
    two_stages(root)
    words = ["--repeats", "1", "--workload", "nano:2", "--max-num-seqs", "9", "--model", "toy"]
    assert main([*SHOW, *words]) == 0
    options = dict(calls(root))["m2_batching"]
    assert (options["--workload"], options["--max-num-seqs"]) == ("nano:2", "9")
    assert options["--model"] == "toy" and options["--max-model-len"] == "64"


def test_option_of_one_stage_is_declared_with_its_name_and_a_user_may_replace_it(root):
    text = DECLARED.replace("options = {", 'options = { "m1_baseline.max_model_len" = "32",')
    (root / "m0_infra/stages.toml").write_text(text)
    two_stages(root)
    assert main([*SHOW, "--repeats", "1"]) == 0
    options = dict(calls(root))
    assert options["m1_baseline"]["--max-model-len"] == "32"
    assert options["m2_batching"]["--max-model-len"] == "64"
    assert main([*SHOW, "--repeats", "1", "--stage-option", "m1_baseline.max-model-len=16"]) == 0
    assert dict(calls(root))["m1_baseline"]["--max-model-len"] == "16"


@pytest.mark.parametrize("text", ["m1_baseline.speed=1", "m9.max_model_len=1", "max_model_len=1"])
def test_option_of_one_stage_that_it_does_not_have_is_refused(root, capsys, text):
    two_stages(root)
    assert main([*SHOW, "--stage-option", text]) == 2
    assert "--stage-option takes STAGE.OPTION=VALUE" in capsys.readouterr().err


def test_stages_that_disagree_get_no_verdict(root, capsys):
    other = make_run("m2_batching", rate=60.0)
    other["gate"]["tokens"] = [[5, 6, 7, 8], [9, 10, 11, 13]]
    two_stages(root, other)
    assert main([*SHOW, "--repeats", "1"]) == 1
    captured = capsys.readouterr()
    assert "No verdict" in captured.err and "better" not in captured.out
    assert not (root / FOLDER).exists()


def test_stage_that_does_not_finish_gets_no_verdict(root, capsys):
    two_stages(root, body="raise SystemExit('out of patience')")
    assert main([*SHOW, "--repeats", "1"]) == 4
    captured = capsys.readouterr()
    assert "out of patience" in captured.out and "no run that finished" in captured.err


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (DECLARED.replace("m2_batching", "m3_paged"), "no stage called 'm2'"),
        (DECLARED.partition("[m2_batching.show]")[0], "m2_batching declares nothing to show"),
        (DECLARED.replace("ttft_s.p50", "speed"), "no metric called 'speed' can decide"),
        ("[m2", "cannot read"),
    ],
)
def test_what_is_not_declared_well_is_refused_before_anything_runs(root, capsys, declared, message):
    two_stages(root)
    (root / "m0_infra/stages.toml").write_text(declared)
    assert main(SHOW) == 2
    assert message in capsys.readouterr().err and not (root / "calls.txt").exists()


def test_first_stage_has_nothing_before_it_to_be_shown_beside(root, capsys):
    assert main(["show", "--stage", "m1"]) == 2
    assert "it is the first stage" in capsys.readouterr().err


class AnyTokenizer:
    def encode(self, text):
        return [1] * len(text)

    def apply_chat_template(self, messages):
        return [1]


@pytest.mark.parametrize("name", LATER_STAGES)
def test_every_stage_declares_what_can_be_run_read_and_drawn(name):
    shown = read_show(ROOT, name)
    stages = discover_stages(ROOT)
    assert find_metrics(shown.metrics)
    workload = make_workload(shown.workload, tokenizer=AnyTokenizer(), vocab_size=49152)
    longest = max(request.num_tokens for request in workload.requests)
    assert longest <= int(shown.options["max_model_len"])
    pair = {key: stages[key].options for key in (shown.stage, shown.previous)}
    known = {*chain(*pair.values()), *(f"{key}.{name}" for key in pair for name in pair[key])}
    assert shown.options.keys() <= known
    late: Any = with_late_request(make_run(name), [1.0])
    assert shown.chart in charts_of([late])


def runs(stage, *rates, batch=1):
    return [make_run(stage, rate=rate, batch=batch) for rate in rates]


def test_verdict_states_medians_and_factors_of_every_metric():
    mine, theirs = runs("m2_batching", 60.0, 50.0, 70.0, batch=4), runs("m1_baseline", *[20.0] * 3)
    for run in mine:
        run |= {"output_tokens_per_s": 50.0, "ttft_s": {"p50": 0.5}}
    for run in theirs:
        run |= {"output_tokens_per_s": 20.0, "ttft_s": {"p50": 2.0}}
    names = ["output_tokens_per_s", "requests_at_once", "ttft_s.p50", "late_ttft_s.p50"]
    assert verdict(names, mine, theirs) == (
        "m2_batching is better than m1_baseline here: output tokens per second 50.0 against 20.0, "
        "2.50× as many; requests at once 4 against 1, 4.00× as many; median time to first "
        "token 500 ms against 2.00 s, 4.00× shorter (medians of 3 runs each)."
    )


def test_slower_stage_is_called_worse():
    text = verdict(["output_tokens_per_s"], runs("m3_paged", 10.0), runs("m2_batching", 20.0))
    assert text.startswith("m3_paged is worse than m2_batching here: output tokens per second")
    assert "0.50× as many" in text
    slow, fast = make_run("m3_paged"), make_run("m2_batching")
    slow["ttft_s"], fast["ttft_s"] = {"p50": 0.3}, {"p50": 0.1}
    text = verdict(["ttft_s.p50"], [slow], [fast])
    assert "m3_paged is worse" in text and "300 ms against 100 ms, 3.00× longer" in text


@pytest.mark.parametrize(
    ("rates", "opening"),
    [
        ((10.0, 29.0, 40.0), "m3_paged and m2_batching cannot be told apart here"),
        ((29.0, 31.0, 40.0), "m3_paged is better than m2_batching here"),
        ((5.0, 9.0, 11.0), "m3_paged is worse than m2_batching here"),
        ((5.0, 9.0, 31.0), "m3_paged and m2_batching cannot be told apart here"),
    ],
)
def test_median_within_the_range_of_the_other_runs_is_no_difference(rates, opening):
    mine, theirs = runs("m3_paged", *rates), runs("m2_batching", 10.0, 20.0, 30.0)
    assert verdict(["output_tokens_per_s"], mine, theirs).startswith(f"{opening}")


def test_worst_gap_decides_where_a_late_prompt_arrives():
    stalled = [with_late_request(make_run("m4_flash"), [1.5])]
    chunked = [with_late_request(make_run("m5_chunked"), [0.1] * 5)]
    names = ["decoder_itl_beside_late_s.max", "late_ttft_s.p50"]
    assert verdict(names, chunked, stalled) == (
        "m5_chunked is better than m4_flash here: worst gap between tokens beside the late prompt "
        "100 ms against 1.50 s, 15.0× shorter; time to first token of the late prompt 520 ms "
        "against 1.52 s, 2.92× shorter (one run each)."
    )
    nobody = make_run("m4_flash")
    text = verdict(names, chunked, [nobody])
    assert (
        text == "No verdict: the runs of m4_flash have no worst gap between tokens beside the "
        "late prompt."
    )
