"""Sampling settings and requests: what is accepted, and what is refused with which words."""

from typing import Any

import numpy as np
import pytest

from folovllm.request import (
    FinishReason,
    Request,
    RequestStatus,
    SamplingParams,
    StructuredOutputsParams,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be a whole number of at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1, got 0"),
        ({"max_tokens": 2.0}, "max_tokens must be a whole number"),
        ({"min_tokens": -1}, "min_tokens must be a whole number of at least 0"),
        ({"min_tokens": 9, "max_tokens": 8}, r"min_tokens \(9\) is above max_tokens \(8\)"),
        ({"temperature": -0.1}, "temperature must be a number in"),
        ({"temperature": float("inf")}, "temperature must be a number in"),
        ({"temperature": True}, "temperature must be a number in"),
        ({"temperature": "1"}, "temperature must be a number in"),
        ({"top_k": -2}, "top_k must be a whole number of at least -1"),
        ({"top_k": True}, "top_k must be a whole number"),
        ({"top_p": 1.1}, "top_p must be a number in"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"min_p": 2}, "min_p must be a number in"),
        ({"presence_penalty": 2.1}, "presence_penalty must be a number in"),
        ({"frequency_penalty": -2.1}, "frequency_penalty must be a number in"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"logprobs": -1}, "logprobs must be a whole number of at least 0"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be a whole number of at least 0"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": "abc"}, "allowed_token_ids must be a list of token ids"),
        ({"bad_words": ["a", ""]}, "bad_words must be a string or a list, none of them empty"),
        ({"detokenize": None}, "detokenize must be True or False"),
        ({"detokenize": False, "stop": "a"}, "stop strings .* detokenize=False"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be .* or -1"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens must be"),
        ({"truncate_prompt_tokens": 2.5}, "truncate_prompt_tokens must be"),
        ({"structured_outputs": {"regex": "a"}}, "must be StructuredOutputsParams"),
        *(
            ({name: value, "structured_outputs": StructuredOutputsParams(regex="a")}, match)
            for name, value, match in (
                (
                    "allowed_token_ids",
                    [1],
                    r"allowed_token_ids=\(1,\) is against structured_outputs",
                ),
                ("bad_words", "a", "bad_words=.* is against"),
                ("stop", "a", "stop=.* is against"),
                ("min_tokens", 2, "min_tokens=2 is against"),
                ("ignore_eos", True, "ignore_eos=True is against"),
            )
        ),
        ({"stop": ""}, "stop must be a string or a list, none of them empty"),
        ({"stop": ["a", ""]}, "stop must be a string"),
        ({"stop": ["a", 5]}, "stop must be a string"),
        ({"stop": 5}, "stop must be a string"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids, got 5"),
        ({"stop_token_ids": "abc"}, "stop_token_ids must be a list of token ids"),
        ({"stop_token_ids": [2.5]}, "stop_token_ids must be a list of token ids"),
        ({"logit_bias": [1]}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": {3.7: 1.0}}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": {3: None}}, "logit_bias must hold finite numbers"),
        ({"logit_bias": {3: float("-inf")}}, "logit_bias must hold finite numbers"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False, got 'no'"),
        ({"skip_special_tokens": 1}, "skip_special_tokens must be True or False"),
        ({"include_stop_str_in_output": None}, "include_stop_str_in_output must be True or"),
    ],
)
def test_setting_that_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_unknown_setting_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_settings_are_kept_in_one_form() -> None:
    params = SamplingParams(
        stop="a", stop_token_ids={np.int64(5)}, logit_bias={np.int64(3): np.float32(0.5)}
    )
    assert params.stop_strings == ("a",)
    assert params.stop_token_ids == (5,)
    assert params.logit_bias == {3: 0.5}
    assert SamplingParams(stop=["b", "c"]).stop_strings == ("b", "c")
    assert SamplingParams().stop_strings == SamplingParams(stop=[]).stop_strings == ()


def test_request_needs_a_prompt_and_a_limit() -> None:
    with pytest.raises(ValueError, match="request a has an empty prompt"):
        Request(request_id="a", prompt_token_ids=[], sampling_params=SamplingParams())
    params = SamplingParams(max_tokens=None)
    with pytest.raises(ValueError, match="request a has max_tokens=None"):
        Request(request_id="a", prompt_token_ids=[1], sampling_params=params)


def test_request_that_could_not_keep_its_settings_is_refused() -> None:
    with pytest.raises(ValueError, match="bad_words, which are text"):
        make_request(sampling_params=SamplingParams(bad_words=["dog"]))
    with pytest.raises(ValueError, match="structured_outputs; an engine needs them compiled"):
        structure = StructuredOutputsParams(regex="a")
        make_request(sampling_params=SamplingParams(structured_outputs=structure))
    params = SamplingParams(prompt_logprobs=0)
    with pytest.raises(ValueError, match="shares the prompt of a"):
        make_request(sampling_params=params, fork_of=make_request(sampling_params=params))


def make_request(**fields: Any) -> Request:
    fields = {"sampling_params": SamplingParams(max_tokens=3), **fields}
    return Request(request_id="a", prompt_token_ids=[1, 2], **fields)


def test_every_end_of_sequence_id_ends_a_request() -> None:
    for token_id in (7, 8):
        request = make_request(eos_token_ids=frozenset({7, 8}))
        assert request.append_output_token(6) is None
        assert request.append_output_token(token_id) is FinishReason.STOP


def test_output_that_is_taken_back_takes_the_end_with_it() -> None:
    request = make_request()
    assert [request.append_output_token(n) for n in (5, 6, 7)] == [None, None, FinishReason.LENGTH]
    assert request.status is RequestStatus.FINISHED
    request.take_back_output(4)
    assert request.output_token_ids == [5, 6]
    assert (request.status, request.finish_reason) == (RequestStatus.WAITING, None)
    assert request.append_output_token(8) is FinishReason.LENGTH


@pytest.mark.parametrize("reason", FinishReason)
def test_finished_request_lets_go_of_the_one_it_forked_from(reason: FinishReason) -> None:
    request = make_request(fork_of=make_request())
    request.finish(reason)
    assert request.fork_of is None


@pytest.mark.parametrize("reason", FinishReason)
def test_finished_request_waits_for_no_token(reason: FinishReason) -> None:
    """One that was computed once too often has a token on its way that is not its own."""
    request = Request(
        request_id="a", prompt_token_ids=[1, 2], sampling_params=SamplingParams(max_tokens=9)
    )
    request.num_pending_tokens = 2
    assert (request.num_tokens, request.num_output_tokens) == (4, 2)
    assert request.append_output_token(5) is None
    assert (request.num_tokens, request.num_output_tokens) == (4, 2)
    request.finish(reason)
    assert (request.num_tokens, request.num_output_tokens) == (3, 1)
