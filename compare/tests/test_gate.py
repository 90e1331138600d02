import pytest

from compare.gate import check_gate, gap_tolerance
from compare.tests.synthetic import make_run


def pair(**options):
    return {
        "m1_baseline": [make_run(**options)],
        "m2_batching": [make_run("m2_batching", **options)],
    }


def only_failure(runs):
    (failure,) = check_gate(runs).failures
    return failure


def test_equal_tokens_pass_and_are_counted():
    report = check_gate(pair())
    assert report.passed
    assert report.num_tokens_compared == 8


def test_float32_difference_fails_and_names_stages_request_position_and_tokens():
    runs = pair()
    runs["m2_batching"][0]["gate"]["tokens"][1][2] = 99
    failure = only_failure(runs)
    for part in ("m2_batching", "m1_baseline", "request 1", "position 2", "99", "11"):
        assert part in failure


def test_bfloat16_difference_at_a_near_tie_passes_and_what_follows_is_not_compared():
    runs = pair(dtype="bfloat16")
    for run in (runs["m1_baseline"][0], runs["m2_batching"][0]):
        run["gate"]["top2_gaps"][0][2] = 0.1
    runs["m2_batching"][0]["gate"]["tokens"][0][2:] = [99, 98]
    report = check_gate(runs)
    assert report.passed
    assert any("near tie" in note for note in report.notes)
    assert report.num_tokens_compared == 2 + 4


@pytest.mark.parametrize("stage", ["m1_baseline", "m2_batching"])
def test_bfloat16_difference_fails_if_either_engine_was_sure(stage):
    runs = pair(dtype="bfloat16")
    for run in (runs["m1_baseline"][0], runs["m2_batching"][0]):
        run["gate"]["top2_gaps"][0][2] = 0.1
    runs[stage][0]["gate"]["top2_gaps"][0][2] = 0.3
    runs["m2_batching"][0]["gate"]["tokens"][0][2] = 99
    assert "0.3" in only_failure(runs)


def test_bfloat16_difference_without_a_known_gap_fails():
    runs = pair(dtype="bfloat16")
    runs["m2_batching"][0]["gate"]["tokens"][0][2] = 99
    runs["m2_batching"][0]["gate"]["top2_gaps"] = []
    assert not check_gate(runs).passed


def test_tolerance_shrinks_with_the_gaps_of_a_random_model():
    assert gap_tolerance("bfloat16", [[0.02, 0.04, 0.06]]) == 0.04
    assert gap_tolerance("bfloat16", [[2.0, 3.0]]) == 0.25
    assert gap_tolerance("float32", [[2.0, 3.0]]) == 0.0


def test_output_that_ends_early_is_a_difference():
    runs = pair()
    runs["m2_batching"][0]["gate"]["tokens"][0].pop()
    assert "(ended)" in only_failure(runs)


def test_nothing_in_common_is_a_failure():
    runs = pair()
    runs["m2_batching"][0]["gate"] = {"tokens": [], "top2_gaps": []}
    assert "nothing was checked" in only_failure(runs)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "name"), "other"),
        (("model", "dtype"), "bfloat16"),
        (("model", "load_format"), "dummy"),
        (("seed",), 1),
        (("device",), "elsewhere"),
        (("engine_config", "max_model_len"), 512),
    ],
)
def test_runs_with_different_settings_fail(path, value):
    runs = pair()
    target = runs["m2_batching"][0]
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    assert ".".join(path) in only_failure(runs)


def test_engine_option_that_one_engine_derives_itself_may_differ():
    runs = pair()
    runs["m2_batching"][0]["engine_config"]["kv_cache_bytes"] = 2**30
    assert check_gate(runs).passed


def test_other_workload_fails():
    runs = pair()
    runs["m2_batching"][0]["workload"]["sha256"] = "f" * 64
    assert "beginning" in only_failure(runs)


def prefix_runs():
    return {
        "m1_baseline": [make_run(num_requests=4, num_requests_before_cut=8)],
        "m2_batching": [make_run("m2_batching", num_requests=8)],
    }


def test_stated_beginning_of_the_workload_passes():
    runs = prefix_runs()
    runs["m2_batching"][0]["workload"]["sha256"] = "a" * 64
    assert check_gate(runs).passed


def test_two_beginnings_of_one_workload_pass():
    runs = prefix_runs()
    runs["hf"] = [make_run("hf", num_requests=2, num_requests_before_cut=8)]
    assert check_gate(runs).passed


def test_beginning_that_is_not_stated_fails():
    runs = prefix_runs()
    runs["m1_baseline"][0]["workload"]["num_requests_before_cut"] = None
    assert not check_gate(runs).passed


def test_beginning_with_other_requests_fails_and_names_the_request():
    runs = prefix_runs()
    runs["m1_baseline"][0]["requests"][2]["num_prompt_tokens"] += 1
    assert "request 2" in only_failure(runs)


def test_beginning_of_conversations_passes_whenever_their_turns_came():
    runs = prefix_runs()
    for result, arrival_s in ((runs["m1_baseline"][0], 3.0), (runs["m2_batching"][0], 1.5)):
        result["requests"][1] |= {"follows": "0", "arrival_s": arrival_s}
    assert check_gate(runs).passed
    runs["m1_baseline"][0]["requests"][1]["follows"] = None
    assert "request 1" in only_failure(runs)


def test_repeat_with_other_outputs_fails_in_float32_only():
    runs = {"m1_baseline": [make_run(), make_run()]}
    runs["m1_baseline"][1]["requests"][3]["output_sha256"] = "other"
    assert "repeat 2" in only_failure(runs)
    for run in runs["m1_baseline"]:
        run["model"]["dtype"] = "bfloat16"
    assert check_gate(runs).passed


def test_every_repeat_is_compared_with_the_reference():
    runs = {"m1_baseline": [make_run()], "m2_batching": [make_run("m2_batching") for _ in range(3)]}
    runs["m2_batching"][2]["gate"]["tokens"][0][0] = 99
    assert "repeat 3" in only_failure(runs)


def test_whole_outputs_that_differ_are_told():
    runs = pair()
    runs["m2_batching"][0]["requests"][0]["output_sha256"] = "other"
    assert any("7 of 8 requests" in note for note in check_gate(runs).notes)


def test_peer_may_say_that_it_cannot_be_compared_but_a_stage_may_not():
    reason = {"tokens": [], "top2_gaps": [], "not_comparable": "no log-probabilities"}
    peer, stage = make_run("nano_vllm"), make_run("m2_batching")
    peer["gate"], stage["gate"] = reason, reason
    report = check_gate({"m1_baseline": [make_run()], "nano_vllm": [peer]})
    assert report.passed and "no log-probabilities" in " ".join(report.notes)
    assert not check_gate({"m1_baseline": [make_run()], "m2_batching": [stage]}).passed


def test_no_runs_fail():
    assert not check_gate({"m1_baseline": []}).passed
