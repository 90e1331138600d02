"""An engine in a process of its own answers as the one in this process does."""

import pytest

import m6_prefix
from folovllm.testing.async_contract import (
    check_async_outputs_equal_offline_ones,
    write_model_with_tokenizer,
)

pytest.importorskip("zmq")


def test_tokens_texts_and_logprobs_are_those_of_generate(tmp_path):
    check_async_outputs_equal_offline_ones(m6_prefix, write_model_with_tokenizer(tmp_path))
