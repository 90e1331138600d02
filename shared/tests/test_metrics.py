"""The definitions of every reported number, on values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.bench.metrics import (
    ModelCost,
    RequestTimes,
    StepWork,
    device_memory_parts,
    host_memory_parts,
    kv_utilisation,
    latency_summary,
    percentile,
    roofline_fraction,
    summarise,
    throughput,
)

COST = ModelCost(
    num_layer_parameters=100,
    num_logits_parameters=20,
    weight_bytes_read=1000,
    kv_bytes_per_token=10,
    attention_flops_per_pair=8,
)
DECODE = StepWork(
    num_tokens=2, num_logits_rows=2, num_cached_tokens_read=30, num_attention_pairs=32
)


def test_percentile_interpolates_between_order_statistics():
    assert percentile([3.0, 1.0, 2.0], 90) == pytest.approx(2.8)
    assert percentile([5.0], 99) == 5.0
    assert percentile([1.0, 2.0], 0) == 1.0
    assert percentile([1.0, 2.0], 100) == 2.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 100))
def test_percentile_is_numpys_default_method(values, percent):
    expected = np.percentile(values, percent)
    assert percentile(values, percent) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_percentile_refuses_no_values_and_impossible_percents():
    with pytest.raises(ValueError, match="at least one value"):
        percentile([], 50)
    with pytest.raises(ValueError, match="101"):
        percentile([1.0], 101)


def test_summary_of_nothing_is_none_and_not_zero():
    assert summarise([]) == {"p50": None, "p90": None, "p99": None, "mean": None}
    assert summarise(iter([1.0, 3.0])) == {
        "p50": 2.0,
        "p90": pytest.approx(2.8),
        "p99": pytest.approx(2.98),
        "mean": 2.0,
    }


def test_ttft_counts_waiting_and_tpot_leaves_out_the_first_token():
    request = RequestTimes(arrival_s=1.0, token_times_s=(3.0, 3.5, 5.0))
    assert request.ttft_s == 2.0
    assert request.tpot_s == 1.0
    assert request.itl_s == (0.5, 1.5)
    assert request.e2e_s == 4.0


def test_single_token_has_no_tpot_and_no_gaps():
    request = RequestTimes(arrival_s=0.0, token_times_s=(2.0,))
    assert request.tpot_s is None
    assert request.itl_s == ()
    assert latency_summary([request])["tpot_s"]["mean"] is None


def test_request_without_tokens_is_refused():
    with pytest.raises(ValueError, match="without output tokens"):
        RequestTimes(arrival_s=0.0, token_times_s=())


def test_tpot_averages_requests_and_itl_averages_gaps():
    short = RequestTimes(0.0, (1.0, 5.0))  # one gap of 4
    long = RequestTimes(0.0, (1.0, 2.0, 3.0, 4.0))  # three gaps of 1
    summary = latency_summary([short, long])
    assert summary["tpot_s"]["mean"] == 2.5
    assert summary["itl_s"]["mean"] == pytest.approx(7 / 4)


def test_throughput_tells_output_from_total_tokens():
    rates = throughput(num_requests=2, num_input_tokens=30, num_output_tokens=10, duration_s=4.0)
    assert rates == {
        "output_tokens_per_s": 2.5,
        "total_tokens_per_s": 10.0,
        "requests_per_s": 0.5,
    }
    with pytest.raises(ValueError, match="above 0"):
        throughput(num_requests=1, num_input_tokens=1, num_output_tokens=1, duration_s=0.0)


def test_step_moves_weights_and_cached_and_new_keys_once():
    assert COST.step_bytes(DECODE) == 1000 + 10 * (30 + 2)
    assert COST.step_flops(DECODE) == 2 * (100 * 2 + 20 * 2) + 8 * 32


def test_roofline_takes_the_slower_of_memory_and_arithmetic_per_step():
    prompt = StepWork(
        num_tokens=100, num_logits_rows=1, num_cached_tokens_read=0, num_attention_pairs=5050
    )
    decode_s = 1320 / 100  # bytes / bandwidth; its FLOPs take less
    prompt_s = (2 * (100 * 100 + 20) + 8 * 5050) / 1000  # FLOPs / peak; its bytes take less
    fraction = roofline_fraction(
        COST, [DECODE, prompt], duration_s=200.0, copy_bytes_per_s=100.0, matmul_flops_per_s=1000.0
    )
    assert fraction == pytest.approx((decode_s + prompt_s) / 200)


def test_roofline_refuses_ceilings_of_zero():
    with pytest.raises(ValueError, match="ceilings above 0"):
        roofline_fraction(
            COST, [DECODE], duration_s=1.0, copy_bytes_per_s=0.0, matmul_flops_per_s=1.0
        )


def test_kv_utilisation_is_a_mean_over_steps_that_reserve_something():
    assert kv_utilisation([1, 3, 0], [2, 4, 0]) == pytest.approx((0.5 + 0.75) / 2)
    assert kv_utilisation([0], [0]) is None


def test_activations_are_what_is_left_on_a_device_and_unknown_on_a_host():
    sizes = {"total": 100, "weights": 60, "kv_reserved": 30, "kv_live": 5}
    assert device_memory_parts(**sizes) == {**sizes, "activations": 10}
    assert host_memory_parts(**sizes) == {**sizes, "activations": None}
