"""Late requests: who is one, what is measured around them, and what a result keeps of it."""

import numpy as np
import pytest

from folovllm.bench.late_requests import late_indices, late_section, step_ranges, token_times
from folovllm.bench.metrics import RequestTimes
from folovllm.workloads.workload import make_workload


@pytest.mark.parametrize(
    ("spec", "late"),
    [
        ("long-arrival:decoders=4,prompt=32", [4]),
        ("long-arrival:4,decoders=4,prompt=32", []),
        ("fixed:batch=4", []),
        ("poisson:num=12,input=1-2", []),
    ],
)
def test_requests_are_late_only_where_most_others_came_together_before(spec, late):
    requests = make_workload(spec, vocab_size=100).requests
    assert late_indices([request.arrival_s for request in requests]) == late


def test_gaps_count_as_beside_the_late_prompt_from_its_first_step_to_its_first_token():
    decoders = [
        RequestTimes(0.0, (1.0, 2.0, 6.0, 7.0, 7.5)),
        RequestTimes(0.0, (1.0, 2.0)),  # done before
    ]
    late = RequestTimes(1.5, (6.0, 7.0))
    section = late_section([*decoders, late], [0.0, 1.0, 2.0, 6.0, 7.0])
    # It arrives in the step from 1 to 2 and is computed in the one from 2 to 6.
    assert section["decoder_itl_beside_late_s"] == {
        "p50": 4.0, "p90": 4.0, "p99": 4.0, "mean": 4.0, "max": 4.0,
    }  # fmt: skip
    whole = section["decoder_itl_s"]
    assert whole["p50"] == 1.0 and whole["max"] == 4.0
    assert whole["p99"] == pytest.approx(1 + 0.96 * 3)  # index 3.96 of 0.5 1 1 1 4
    assert section["late_ttft_s"]["p50"] == section["late_ttft_s"]["max"] == 4.5


def test_prompt_that_arrives_between_two_steps_is_beside_the_gap_that_began_before_it():
    decoders = [RequestTimes(0.0, (1.0, 2.0, 4.5)), RequestTimes(0.0, (1.0, 2.0, 4.5))]
    late = RequestTimes(2.001, (3.5,))
    section = late_section([*decoders, late], [0.0, 1.0, 2.002, 3.5])
    assert section["decoder_itl_beside_late_s"]["p50"] == 2.5


def test_late_prompt_beside_nobody_has_a_ttft_and_no_gaps():
    decoders = [RequestTimes(0.0, (1.0, 2.0)), RequestTimes(0.0, (1.0, 2.0))]
    section = late_section([*decoders, RequestTimes(5.0, (9.0,))], [0.0, 1.0, 5.0])
    assert section["late_ttft_s"]["max"] == 4.0
    assert section["decoder_itl_beside_late_s"] == dict.fromkeys(
        ("p50", "p90", "p99", "mean", "max")
    )


def test_workload_without_late_requests_has_none_of_these_numbers():
    together = [RequestTimes(0.0, (1.0, 2.0)), RequestTimes(0.0, (1.0, 3.0))]
    section = late_section(together, [0.0, 1.0, 2.0])
    assert section == {
        "late_ttft_s": None, "decoder_itl_s": None, "decoder_itl_beside_late_s": None,
    }  # fmt: skip


@pytest.mark.parametrize("steps", [[4, 5, 6, 9, 9], [0], [2, 2, 3], list(range(600))])
def test_steps_of_tokens_are_kept_as_runs_and_come_back_as_times(steps):
    ranges = step_ranges(steps)
    starts = [0.5 * step for step in range(700)]
    result = {"steps": {"start_s": starts, "duration_s": [0.25] * 700}}
    times = token_times(result, {"token_steps": ranges})
    assert times.tolist() == [0.5 * step + 0.25 for step in steps]
    assert times.dtype == np.float64


def test_one_run_of_steps_is_one_pair_however_long():
    assert step_ranges(range(3, 603)) == [[3, 602]]
    assert step_ranges([4, 5, 6, 9, 9]) == [[4, 6], [9, 9], [9, 9]]
    assert step_ranges([]) == []
