"""From an engine's tokens to outputs: what is made when, and that looking changes nothing."""

import random

import pytest

from folovllm.entrypoints.output_processor import OutputProcessor
from folovllm.entrypoints.output_state import CompletionState, PromptState
from folovllm.entrypoints.prompts import Prompt
from folovllm.interfaces import StepOutput, StepStats, TokenLogprobs, TokenOutput
from folovllm.request import FinishReason, Request, SamplingParams
from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer, save_metaspace_tokenizer
from folovllm.text.detokenizer import IncrementalDetokenizer
from folovllm.text.tokenizer import Tokenizer

STATS = StepStats(
    num_scheduled_tokens=1,
    num_scheduled_requests=1,
    num_running=1,
    num_waiting=0,
    num_preemptions=0,
    num_kv_tokens_live=1,
    num_kv_tokens_reserved=1,
    num_kv_tokens_capacity=1,
)


@pytest.fixture(scope="module", params=[save_byte_level_tokenizer, save_metaspace_tokenizer])
def tokenizer(request, tmp_path_factory):
    return Tokenizer(request.param(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def decoded(monkeypatch, tokenizer):
    """Every token that is turned into bytes."""
    seen, token_bytes = [], tokenizer.token_bytes
    monkeypatch.setattr(tokenizer, "token_bytes", lambda i: seen.append(i) or token_bytes(i))
    return seen


def make_state(tokenizer, prompt_token_ids=(5,), name="r", **params):
    request = Request(
        request_id=name,
        prompt_token_ids=list(prompt_token_ids),
        sampling_params=SamplingParams(max_tokens=10_000, **params),
    )
    return CompletionState(request, 0, tokenizer)


def token(token_id, reason=None, logprobs=None, name="r"):
    return TokenOutput(name, token_id, reason, logprobs)


def step_by_step(tokenizer, prompt_token_ids, token_ids, is_hidden, **params):
    """The text after every token, decoded as the tokens come."""
    settings = SamplingParams(max_tokens=10_000, **params)
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids, settings)
    texts, text = [], ""
    for index, token_id in enumerate(token_ids):
        is_last = index == len(token_ids) - 1
        text += "" if is_last and is_hidden else detokenizer.append(token_id)
        text += detokenizer.finish() if is_last else ""
        texts.append(text)
    return texts


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.STOP])
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_text_does_not_depend_on_when_somebody_looks(tokenizer, reason, skip_special_tokens):
    rng = random.Random(3)
    for _ in range(40):
        prompt, output = (
            [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, 12))]
            for _ in range(2)
        )
        params = {"skip_special_tokens": skip_special_tokens}
        is_hidden = reason is FinishReason.STOP
        expected = step_by_step(tokenizer, prompt, output, is_hidden, **params)
        state = make_state(tokenizer, prompt, **params)
        for index, token_id in enumerate(output):
            is_last = index == len(output) - 1
            state.append(token(token_id, reason if is_last else None))
            if is_last or rng.random() < 0.4:
                for _ in range(rng.randint(1, 2)):
                    assert state.output().text == expected[index]
        assert state.output().token_ids == output


def test_stop_token_is_text_where_it_is_asked_for(tokenizer):
    ids = tokenizer.encode("dog", add_special_tokens=False)
    state = make_state(tokenizer, include_stop_str_in_output=True, stop_token_ids=[ids[-1]])
    for token_id in ids[:-1]:
        state.append(token(token_id))
    state.append(token(ids[-1], FinishReason.STOP))
    assert state.output().text.strip() == "dog"
    assert state.output().stop_reason == ids[-1]


def test_no_text_is_made_before_somebody_looks(tokenizer, decoded):
    ids = tokenizer.encode("the dog naps", add_special_tokens=False)
    state = make_state(tokenizer)
    decoded.clear()  # the end of the prompt
    for token_id in ids:
        state.append(token(token_id))
    assert decoded == []
    for _ in range(2):
        assert state.output().text.strip() == "the dog naps"
        assert decoded == ids
    state.append(token(ids[0]))
    state.append(token(ids[1], FinishReason.LENGTH))
    state.output()
    assert decoded == [*ids, *ids[:2]]


def test_every_token_is_searched_as_it_comes_where_there_are_stop_strings(tokenizer):
    ids = tokenizer.encode("the dog naps", add_special_tokens=False)
    state = make_state(tokenizer, stop="dog")
    num_tokens = 0
    for token_id in ids:
        state.append(token(token_id))
        num_tokens += 1
        if state.finish_reason is not None:
            break
    assert state.finish_reason is FinishReason.STOP
    assert num_tokens < len(ids)
    output = state.output()
    assert (output.text.strip(), output.stop_reason) == ("the", "dog")
    assert output.token_ids == ids[:num_tokens]


def test_log_probabilities_are_described_once_each_and_only_when_somebody_looks(
    tokenizer, monkeypatch
):
    asked = []
    monkeypatch.setattr(tokenizer, "token_text", lambda i: asked.append(i) or str(i))
    state = make_state(tokenizer, logprobs=1)
    values = [-0.1, -0.2, -0.30000000000000004]
    for index, value in enumerate(values):
        state.append(token(7 + index, None, TokenLogprobs(value, 1, ((7 + index, value),))))
        if index == 1:
            assert asked == []
            assert state.output().cumulative_logprob == values[0] + values[1]
            assert asked == [7, 8]
    output = state.output()
    assert asked == [7, 8, 9]
    assert [list(position) for position in output.logprobs] == [[7], [8], [9]]
    assert output.cumulative_logprob == values[0] + values[1] + values[2]


def test_processor_hands_out_tokens_and_names_what_ended(tokenizer):
    processor = OutputProcessor()
    ids = tokenizer.encode("the dog naps", add_special_tokens=False)
    states = {"a": make_state(tokenizer, name="a"), "b": make_state(tokenizer, name="b", stop="d")}
    prompts = {
        name: PromptState(name, Prompt(None, [5]), [state], 0.0) for name, state in states.items()
    }
    for name, state in states.items():
        processor.add(prompts[name], state)
    ended = []
    for now, token_id in enumerate(ids, start=1):
        reason = FinishReason.LENGTH if now == len(ids) else None
        tokens = (token(token_id, reason, name="a"), token(token_id, name="b"))
        ended.append(processor.process(StepOutput((*tokens, token(1, name="?")), STATS), now))
    assert sum((step.stopped_request_ids for step in ended), []) == ["b"]
    finished = sum((step.finished_prompts for step in ended), [])
    assert set(finished) == set(prompts.values()) and finished[-1] is prompts["a"]
    assert prompts["a"].output().metrics.first_token_time == 1
    assert prompts["a"].output().metrics.last_token_time == len(ids)
    assert prompts["a"].output().outputs[0].token_ids == ids
