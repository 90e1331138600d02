"""LLM over a scripted engine: prompts, settings, outputs, stops, aborts, refusals."""

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch

from folovllm.entrypoints.beam_search import BeamSearchParams
from folovllm.entrypoints.llm import LLM
from folovllm.entrypoints.outputs import CompletionOutput
from folovllm.entrypoints.turns import Turns
from folovllm.interfaces import TokenLogprobs
from folovllm.request import SamplingParams, StructuredOutputsParams
from folovllm.testing.scripted_engine import (
    ScriptedLLM,
    ScriptedModel,
    ScriptedModelConfig,
    ScriptedPolicy,
)
from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer
from folovllm.text.tokenizer import Tokenizer

ANSWER = "The dog naps. 世界! STOP here"
EOS = 1


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return save_byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return Tokenizer(tokenizer_path)


@pytest.fixture
def make_llm(monkeypatch, tokenizer, tokenizer_path):
    """Makes an LLM whose engine answers every request with the same tokens, then EOS."""

    def make(answer=None, *, with_tokenizer=True, eos=(EOS,), max_positions=512, **options):
        answer = [*tokenizer.encode(ANSWER), EOS] if answer is None else answer
        answer_of = answer if callable(answer) else lambda request: answer
        config = ScriptedModelConfig(tokenizer.vocab_size, max_positions, frozenset(eos))
        model = ScriptedModel(config, answer_of)
        monkeypatch.setattr("folovllm.entrypoints.llm.load_model", lambda *args, **kwargs: model)
        named = {"tokenizer": tokenizer_path} if with_tokenizer else {}
        return ScriptedLLM("toy", load_format="dummy", **named, **options)

    return make


def generate(llm, prompts, params=None, **kwargs):
    return llm.generate(prompts, params, use_tqdm=False, **kwargs)


def interrupt_at(number, llm):
    """For before_step: Ctrl-C in that step."""

    def before_step(num_steps):
        if num_steps == number:
            llm.engine.before_step = lambda num_steps: None
            raise KeyboardInterrupt

    return before_step


def break_off_behind_the_engine(llm):
    """Ctrl-C behind the engine's next step, which nobody has heard of then."""
    right = llm.engine.step

    def break_off():
        right()
        llm.engine.step = right
        raise KeyboardInterrupt

    llm.engine.step = break_off
    with pytest.raises(KeyboardInterrupt):
        generate(llm, "dog", FULL)


FULL = SamplingParams(max_tokens=None)


# Prompts and outputs ------------------------------------------------------------------------------


def test_every_form_of_a_prompt_gives_the_same_request(make_llm, tokenizer):
    llm = make_llm()
    ids = tokenizer.encode("Hello dog")
    forms = ["Hello dog", ids, tuple(ids), {"prompt": "Hello dog"}, {"prompt_token_ids": ids}]
    forms += [np.array(ids).tolist(), [np.int64(token_id) for token_id in ids]]
    for form in forms:
        (output,) = generate(llm, form, FULL)
        assert output.prompt_token_ids == ids
        assert output.prompt == (
            "Hello dog" if form in ("Hello dog", {"prompt": "Hello dog"}) else None
        )
        assert all(type(token_id) is int for token_id in llm.engine.added[-1].prompt_token_ids)
    assert len(generate(llm, forms[:5])) == 5
    assert generate(llm, []) == []


def test_outputs_are_in_prompt_order_although_they_finish_in_another(make_llm):
    llm = make_llm(lambda request: [request.prompt_token_ids[0]])
    params = [SamplingParams(max_tokens=n) for n in (9, 1, 5)]
    outputs = generate(llm, [[70], [71], [72]], params)
    assert [output.outputs[0].token_ids for output in outputs] == [[70] * 9, [71], [72] * 5]
    assert all(output.finished for output in outputs)
    assert len({output.request_id for output in outputs}) == 3


def test_end_of_sequence_ends_the_output_and_is_no_text(make_llm, tokenizer):
    for skip_special_tokens in (True, False):
        params = SamplingParams(max_tokens=None, skip_special_tokens=skip_special_tokens)
        (output,) = generate(make_llm(), "Hello", params)
        completion = output.outputs[0]
        assert completion.text == ANSWER
        assert completion.token_ids == [*tokenizer.encode(ANSWER), EOS]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
        assert completion.finished


def test_length_ends_the_output_in_the_middle_of_a_character(make_llm, tokenizer):
    ids = tokenizer.encode("🦊")
    assert len(ids) > 1
    (output,) = generate(make_llm(ids), "Hello", SamplingParams(max_tokens=1))
    assert output.outputs[0].text == "\ufffd"
    assert (output.outputs[0].finish_reason, output.outputs[0].token_ids) == ("length", ids[:1])


def test_max_tokens_none_is_what_max_model_len_leaves(make_llm):
    llm = make_llm([70], eos=(), max_model_len=20)
    (output,) = generate(llm, [70] * 13, FULL)
    assert len(output.outputs[0].token_ids) == 7
    with pytest.raises(ValueError, match="prompt 1 has 20 tokens and leaves no room"):
        generate(llm, [[70], [70] * 20], FULL)


def test_stop_token_id_ends_the_output_and_is_its_reason(make_llm, tokenizer):
    ids = tokenizer.encode("ab.")
    llm = make_llm(ids)
    (output,) = generate(llm, "Hello", SamplingParams(stop_token_ids=[ids[-1]]))
    completion = output.outputs[0]
    assert (completion.text, completion.stop_reason) == ("ab", ids[-1])
    assert completion.token_ids == ids
    params = SamplingParams(stop_token_ids=[ids[-1]], include_stop_str_in_output=True)
    assert generate(llm, "Hello", params)[0].outputs[0].text == "ab."


def test_ignore_eos_goes_on_behind_end_of_sequence(make_llm):
    params = SamplingParams(ignore_eos=True, max_tokens=40)
    (output,) = generate(make_llm(), "Hello", params)
    assert len(output.outputs[0].token_ids) == 40
    assert output.outputs[0].text.startswith(ANSWER + ANSWER[:5])


def test_tokenizers_end_of_sequence_serves_a_model_that_names_none(make_llm):
    (output,) = generate(make_llm(eos=()), "Hello", FULL)
    assert output.outputs[0].finish_reason == "stop"


def test_tokenizers_end_of_sequence_ends_an_output_beside_the_models(make_llm, tokenizer):
    """As in vLLM: a chat model whose files name another id must not go on with invented turns."""
    (other,) = tokenizer.encode("a")
    ends = make_llm(eos=(other,))._requests.eos_token_ids
    assert ends == {other, EOS}
    (output,) = generate(make_llm(eos=(other,)), "Hello", FULL)
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("The dog n", "stop")
    (output,) = generate(make_llm(eos=(10**5,)), "Hello", FULL)
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == (ANSWER, "stop")


def test_without_a_tokenizer_token_ids_still_work(make_llm):
    llm = make_llm([70, 71], with_tokenizer=False)
    assert llm.tokenizer is None
    (output,) = generate(llm, [5, 6], SamplingParams(max_tokens=3, logprobs=1))
    assert output.outputs[0].token_ids == [70, 71, 70]
    assert output.outputs[0].text == ""
    assert output.outputs[0].logprobs[0][70].decoded_token is None


def test_metrics_give_time_to_first_token(make_llm):
    (output,) = generate(make_llm(), "Hello")
    metrics = output.metrics
    assert 0 < metrics.ttft_s < metrics.last_token_time - metrics.arrival_time


# Stop strings -------------------------------------------------------------------------------------


def test_stop_string_aborts_the_engine_request(make_llm, tokenizer):
    llm = make_llm()
    (output,) = generate(llm, "Hello", SamplingParams(max_tokens=None, stop=["nope", "STOP"]))
    completion = output.outputs[0]
    assert completion.text == "The dog naps. 世界! "
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "STOP")
    text = tokenizer.decode(completion.token_ids)
    assert "STOP" in text and "STOP" not in tokenizer.decode(completion.token_ids[:-1])
    assert llm.engine.aborted == [output.request_id]
    assert not llm.engine.has_unfinished_requests()


def test_stop_string_may_stay_in_the_output(make_llm):
    params = SamplingParams(max_tokens=None, stop="STOP", include_stop_str_in_output=True)
    assert generate(make_llm(), "Hello", params)[0].outputs[0].text.endswith("! STOP")


def test_stop_string_in_the_last_allowed_token_is_a_stop(make_llm, tokenizer):
    ids = tokenizer.encode("ab")
    llm = make_llm(ids)
    (output,) = generate(llm, "Hello", SamplingParams(max_tokens=len(ids), stop="b"))
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "b")
    assert llm.engine.aborted == []


def test_min_tokens_holds_for_stop_strings(make_llm, tokenizer):
    llm = make_llm(tokenizer.encode("a")[:1])
    params = SamplingParams(stop="a", min_tokens=3, max_tokens=9)
    assert len(generate(llm, "Hello", params)[0].outputs[0].token_ids) == 4


# n, seeds, logprobs, priorities -------------------------------------------------------------------


def test_n_gives_that_many_completions_with_seeds_of_their_own(make_llm):
    llm = make_llm()
    outputs = generate(llm, ["Hello", "dog"], SamplingParams(n=3, seed=11))
    assert [[c.index for c in output.outputs] for output in outputs] == [[0, 1, 2]] * 2
    assert [request.seed for request in llm.engine.added] == [11, 12, 13] * 2
    assert all(request.sampling_params.n == 1 for request in llm.engine.added)
    assert len({request.request_id for request in llm.engine.added}) == 6


def test_seeds_follow_from_the_llms_seed_and_the_order_of_requests(make_llm):
    def seeds(seed):
        llm = make_llm(seed=seed)
        generate(llm, ["Hello", "dog"], SamplingParams(n=2))
        generate(llm, "Hello")
        return [request.seed for request in llm.engine.added]

    first = seeds(0)
    assert seeds(0) == first and len(set(first)) == 5
    assert not set(seeds(1)) & set(first)
    assert all(0 <= seed < 2**63 for seed in first)


def test_refused_call_does_not_change_later_seeds(make_llm):
    llm, other = make_llm(), make_llm()
    with pytest.raises(ValueError):
        generate(llm, ["Hello", [10**6]])
    generate(llm, "Hello")
    generate(other, "Hello")
    assert llm.engine.added[0].seed == other.engine.added[0].seed


def test_logprobs_are_by_token_id_with_the_chosen_token_first(make_llm, tokenizer):
    token_id = tokenizer.encode("a")[0]
    (output,) = generate(make_llm([token_id]), "Hello", SamplingParams(max_tokens=2, logprobs=2))
    completion = output.outputs[0]
    assert completion.cumulative_logprob == -0.5
    assert [list(position) for position in completion.logprobs] == [[token_id, 0, 1]] * 2
    chosen, top = completion.logprobs[0][token_id], completion.logprobs[0][0]
    assert (chosen.logprob, chosen.rank, chosen.decoded_token) == (-0.25, 3, "a")
    assert (top.logprob, top.rank, top.decoded_token) == (-0.5, 1, "<bos>")


def test_chosen_token_among_the_likeliest_is_listed_once(make_llm):
    (output,) = generate(make_llm([0]), "Hello", SamplingParams(max_tokens=1, logprobs=2))
    assert list(output.outputs[0].logprobs[0]) == [0, 1]


def test_logprobs_are_none_unless_asked_for(make_llm):
    completion = generate(make_llm(), "Hello")[0].outputs[0]
    assert completion.logprobs is None and completion.cumulative_logprob is None


def test_priorities_reach_the_engine(make_llm):
    llm = make_llm(scheduling_policy="priority")
    generate(llm, ["Hello", "dog"], priority=[4, -1])
    assert [request.priority for request in llm.engine.added] == [4, -1]


def test_priorities_without_the_policy_or_in_the_wrong_number_are_refused(make_llm):
    with pytest.raises(ValueError, match=r"no effect: the scheduling policy .* 'fcfs'"):
        generate(make_llm(), ["Hello"], priority=[1])
    llm = make_llm(scheduling_policy="priority")
    with pytest.raises(ValueError, match="got 1 priorities for 2 prompts"):
        generate(llm, ["Hello", "dog"], priority=[1])
    for wrong in (1, [1, "x"], [1, 0.5]):
        with pytest.raises(ValueError, match="priority must be a list of whole numbers"):
            generate(llm, ["Hello", "dog"], priority=wrong)


# What is reported of a prompt, and rules in words -------------------------------------------------


@pytest.fixture
def make_reporting_llm(make_llm):
    """An LLM whose engine reports something about prompts as well."""

    def make(**options):
        llm = make_llm(**options)
        add_request = llm.engine.add_request

        def add(request):
            if request.sampling_params.prompt_logprobs is not None:
                num_top = request.sampling_params.prompt_logprobs
                top = tuple((rank, -0.5 * (rank + 1)) for rank in range(num_top))
                position = TokenLogprobs(-2.0, num_top + 1, top)
                request.prompt_logprobs += [position] * (request.num_prompt_tokens - 1)
            add_request(request)

        llm.engine.add_request = add
        return llm

    return make


def test_prompt_logprobs_are_by_token_id_with_the_token_itself_first(make_reporting_llm, tokenizer):
    llm = make_reporting_llm()
    (output,) = generate(llm, "Hello", SamplingParams(n=2, max_tokens=2, prompt_logprobs=2))
    ids = tokenizer.encode("Hello")
    first, *others = output.prompt_logprobs
    assert first is None
    assert len(others) == len(ids) - 1
    for position, token_id in zip(others, ids[1:], strict=True):
        assert next(iter(position)) == token_id
        assert position[token_id].logprob == -2.0
        assert position[token_id].rank == 3
        assert position[token_id].decoded_token == tokenizer.token_text(token_id)
        assert [position[i].rank for i in (0, 1)] == [1, 2]
    asked = [request.sampling_params.prompt_logprobs for request in llm.engine.added]
    assert asked == [2, None], "a fork does not compute the prompt"


def test_prompt_logprobs_of_zero_are_the_token_alone_and_none_of_one_token(make_reporting_llm):
    llm = make_reporting_llm()
    params = SamplingParams(max_tokens=2, prompt_logprobs=0)
    assert generate(llm, [[5]], params)[0].prompt_logprobs == [None]
    (output,) = generate(llm, [[5, 6]], params)
    assert [list(position) for position in output.prompt_logprobs[1:]] == [[6]]
    assert generate(llm, [[5, 6]])[0].prompt_logprobs is None
    for output in llm.stream([5, 6], params):
        assert list(output.prompt_logprobs[1]) == [6]


def test_without_detokenizing_there_is_no_text(make_reporting_llm, tokenizer):
    params = SamplingParams(max_tokens=3, detokenize=False, logprobs=1, prompt_logprobs=0)
    (output,) = generate(make_reporting_llm(), "Hello", params)
    assert output.outputs[0].text == ""
    assert output.outputs[0].token_ids == tokenizer.encode(ANSWER)[:3]
    positions = [*output.outputs[0].logprobs, *output.prompt_logprobs[1:]]
    assert {logprob.decoded_token for p in positions for logprob in p.values()} == {None}


def test_prompt_is_truncated_from_the_left(make_llm, tokenizer):
    llm = make_llm(max_model_len=20)
    long = tokenizer.encode("The dog " * 20)
    for truncate, max_tokens, expected in ((7, 3, 7), (-1, 4, 16), (-1, None, 19), (7, None, 7)):
        params = SamplingParams(truncate_prompt_tokens=truncate, max_tokens=max_tokens)
        (output,) = generate(llm, "The dog " * 20, params)
        assert output.prompt_token_ids == long[-expected:]
        assert output.prompt == "The dog " * 20
    short = SamplingParams(truncate_prompt_tokens=9, max_tokens=2)
    assert generate(llm, [[5, 6]], short)[0].prompt_token_ids == [5, 6]
    with pytest.raises(ValueError, match="truncate_prompt_tokens=21 of prompt 0 is above"):
        generate(llm, "x", SamplingParams(truncate_prompt_tokens=21))


def test_bad_words_reach_the_engine_as_tokens_with_and_without_a_space(make_llm, tokenizer):
    llm = make_llm()
    generate(llm, "Hello", SamplingParams(bad_words=["dog", "do not"], n=2))
    for request in llm.engine.added:
        words = request.bad_words_token_ids
        assert tuple(tokenizer.encode("dog")) in words
        assert tuple(tokenizer.encode(" dog")) in words
        assert tuple(tokenizer.encode("do not")) in words
    with pytest.raises(ValueError, match="bad_words .* no tokenizer"):
        generate(make_llm(with_tokenizer=False), [5], SamplingParams(bad_words=["dog"]))
    with pytest.raises(ValueError, match="bad_words holds '  ', which has no tokens"):
        generate(llm, "x", SamplingParams(bad_words=["  "]))


def test_every_completion_gets_a_grammar_of_its_own(make_llm):
    pytest.importorskip("llguidance")
    llm = make_llm()
    structure = StructuredOutputsParams(choice=["dog", "world"])
    params = SamplingParams(n=2, max_tokens=3, structured_outputs=structure)
    generate(llm, ["Hello", "x"], [params, SamplingParams()])
    first, second, plain = llm.engine.added
    assert None not in (first.grammar, second.grammar)
    assert first.grammar is not second.grammar
    assert plain.grammar is None


def test_structure_that_cannot_be_followed_is_refused_before_anything_is_queued(make_llm):
    pytest.importorskip("llguidance")
    llm = make_llm()
    wrong = SamplingParams(structured_outputs=StructuredOutputsParams(regex="["))
    with pytest.raises(ValueError, match="cannot follow this regex"):
        generate(llm, ["Hello", "x"], [SamplingParams(), wrong])
    assert llm.engine.added == []


def test_allowed_token_outside_the_vocabulary_is_refused(make_llm):
    with pytest.raises(ValueError, match="allowed_token_ids of prompt 0 holds token id 99999"):
        generate(make_llm(), "x", SamplingParams(allowed_token_ids=[99999]))


# Chat ---------------------------------------------------------------------------------------------


def test_chat_takes_one_conversation_or_several(make_llm):
    llm = make_llm()
    one = [{"role": "user", "content": "Hello"}]
    (output,) = llm.chat(one, FULL, use_tqdm=False)
    assert output.prompt == "user: Hello\nassistant: "
    assert output.outputs[0].text == ANSWER
    two = [one, [*one, {"role": "assistant", "content": "dog"}]]
    outputs = llm.chat(two, [FULL, FULL], use_tqdm=False, add_generation_prompt=False)
    assert [output.prompt for output in outputs] == [
        "user: Hello\n",
        "user: Hello\nassistant: dog\n",
    ]


def test_options_of_chat_reach_the_template(make_llm):
    llm = make_llm()
    template = "{{ mood }} {{ tools | length }}{{ messages[0].content }};"
    (output,) = llm.chat(
        [{"role": "user", "content": [{"type": "text", "text": "dog"}]}],
        FULL,
        use_tqdm=False,
        chat_template=template,
        chat_template_content_format="string",
        add_generation_prompt=False,
        continue_final_message=True,
        tools=[{"type": "function"}],
        chat_template_kwargs={"mood": "lazy"},
    )
    assert output.prompt == "lazy 1dog"


def test_chat_refuses_what_is_no_conversation(make_llm):
    llm = make_llm()
    for wrong in ([], [[]], [{"role": "user"}], "Hello", {"role": "user", "content": "x"}, None):
        with pytest.raises(ValueError, match=r"conversation|message 0"):
            llm.chat(wrong, use_tqdm=False)
    with pytest.raises(ValueError, match="no tokenizer and so no chat template"):
        make_llm(with_tokenizer=False).chat([{"role": "user", "content": "x"}])


# Streams ------------------------------------------------------------------------------------------


def test_stream_yields_the_growing_text_after_every_token(make_llm, tokenizer):
    outputs = list(make_llm().stream("Hello", FULL))
    texts = [output.outputs[0].text for output in outputs]
    assert len(outputs) == len(tokenizer.encode(ANSWER)) + 1
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == ANSWER
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(
        range(1, len(outputs) + 1)
    )


def test_stream_of_several_completions_yields_all_of_them(make_llm):
    *_, last = make_llm().stream("Hello", SamplingParams(n=2, max_tokens=None))
    assert [completion.text for completion in last.outputs] == [ANSWER, ANSWER]


def test_closed_stream_aborts_its_request(make_llm):
    llm = make_llm()
    stream = llm.stream("Hello", SamplingParams(n=2, max_tokens=None))
    next(stream)
    assert llm.engine.has_unfinished_requests()
    stream.close()
    assert llm.engine.aborted == ["0-0", "0-1"]
    assert not llm.engine.has_unfinished_requests()


def test_mistakes_of_a_stream_show_at_the_call(make_llm):
    llm = make_llm(max_model_len=30)
    with pytest.raises(ValueError, match="prompt 0"):
        llm.stream([10**6])
    with pytest.raises(ValueError, match="46 tokens exceed"):
        llm.stream([70] * 30)
    assert not llm.engine.has_unfinished_requests()
    assert generate(llm, "Hello")[0].finished


def test_stream_that_is_never_read_takes_its_request_back(make_llm):
    llm = make_llm()
    stream = llm.stream("Hello")
    assert [request.request_id for request in llm.engine.added] == ["0"]
    stream.close()
    stream.close()
    assert list(stream) == []
    assert llm.engine.aborted == ["0"]
    llm.stream("Hello", SamplingParams(n=2))  # and nobody keeps it
    assert llm.engine.aborted == ["0", "1-0", "1-1"]
    assert not llm.engine.has_unfinished_requests()


def test_stream_that_is_dropped_within_a_step_is_taken_back_in_the_next(make_llm):
    """A collector of garbage may run anywhere, also where the engine is in use."""
    llm = make_llm()
    dropped = [llm.stream("Hello", FULL)]
    llm.engine.before_step = lambda num_steps: dropped.clear()
    assert generate(llm, "dog", FULL)[0].outputs[0].text == ANSWER
    assert llm.engine.aborted == ["0"]


def test_stream_ends_after_an_interrupt(make_llm):
    llm = make_llm()
    stream = llm.stream("Hello", FULL)
    next(stream)
    llm.engine.before_step = interrupt_at(1, llm)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert llm.engine.aborted == ["0"]
    assert list(stream) == []


def test_streams_and_generate_may_be_interleaved(make_llm):
    llm = make_llm(max_num_seqs=8)
    first, second = llm.stream("Hello", FULL), llm.stream("dog", FULL)
    next(first), next(second)
    assert generate(llm, "fox", FULL)[0].outputs[0].text == ANSWER
    assert [*first][-1].outputs[0].text == ANSWER
    assert [*second][-1].outputs[0].text == ANSWER
    assert llm.engine.aborted == []


def test_stream_ends_at_a_stop_string(make_llm):
    outputs = list(make_llm().stream("Hello", SamplingParams(max_tokens=None, stop="naps")))
    assert outputs[-1].outputs[0].text == "The dog "
    assert not any("na" in output.outputs[0].text for output in outputs)


# Defaults of the model ----------------------------------------------------------------------------


@pytest.fixture
def llm_with_defaults(make_llm, tmp_path):
    """Makes an LLM over a model whose generation_config.json has these settings."""

    def make(**settings):
        make_llm()  # replaces load_model
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        return ScriptedLLM(tmp_path)

    return make


def test_call_without_params_follows_the_generation_config(llm_with_defaults):
    settings = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}
    llm = llm_with_defaults(**settings, max_new_tokens=3, do_sample=True, eos_token_id=[1])
    expected = SamplingParams(**settings, max_tokens=3)
    assert llm.get_default_sampling_params() == expected
    generate(llm, [[70], [71]])
    list(llm.stream([72]))
    assert [request.sampling_params for request in llm.engine.added] == [expected] * 3
    generate(llm, [70], SamplingParams())
    assert llm.engine.added[-1].sampling_params == SamplingParams()


def test_generation_config_without_sampling_is_greedy(llm_with_defaults):
    params = llm_with_defaults(do_sample=False, temperature=0.6).get_default_sampling_params()
    assert params.is_greedy


def test_setting_of_the_generation_config_that_we_do_not_have_is_named(llm_with_defaults):
    llm = llm_with_defaults(no_repeat_ngram_size=3, num_beams=1)
    with pytest.raises(ValueError, match="generation_config.json sets no_repeat_ngram_size=3"):
        generate(llm, [70])
    assert generate(llm, [70], SamplingParams())[0].finished
    with pytest.raises(ValueError, match="generation_config.json cannot be followed: top_p must"):
        generate(llm_with_defaults(top_p=7), [70])


# Threads ------------------------------------------------------------------------------------------


def test_calls_of_several_threads_get_their_own_outputs(make_llm):
    def answer(request):
        time.sleep(1e-4)  # another thread may run
        return [request.prompt_token_ids[0]]

    llm = make_llm(answer, eos=(), max_num_seqs=3)

    def call(number):
        ids, params = [70 + number], SamplingParams(max_tokens=1 + number % 7)
        if number % 3:
            outputs = generate(llm, [ids, ids], params)
        else:
            *_, last = llm.stream(ids, params)
            outputs = [last]
        return [output.outputs[0].token_ids for output in outputs]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, range(60)))
    expected = [[[70 + n] * (1 + n % 7)] * (2 if n % 3 else 1) for n in range(60)]
    assert found == expected
    assert len({request.request_id for request in llm.engine.added}) == 100
    assert llm.engine.aborted == []


def test_call_returns_when_others_have_finished_its_prompts(make_llm):
    """It is not kept waiting by a call that goes on for long."""
    llm = make_llm([70], eos=(), max_num_seqs=8)
    long = llm.stream([71], SamplingParams(max_tokens=200))
    next(long)
    reached = threading.Event()
    llm.engine.before_step = lambda num_steps: (reached.set(), time.sleep(1e-3))
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(generate, llm, [72], SamplingParams(max_tokens=250))
        reached.wait(5)
        assert len(generate(llm, [73], SamplingParams(max_tokens=2))[0].outputs[0].token_ids) == 2
        assert not running.done()
        assert len(next(long).outputs[0].token_ids) < 60
        assert not running.done()
        assert len(running.result().pop().outputs[0].token_ids) == 250


def test_salt_of_a_prompt_reaches_all_its_requests(make_llm):
    llm = make_llm(eos=())
    prompt = {"prompt_token_ids": [5], "cache_salt": "a"}
    generate(llm, [prompt, [5]], SamplingParams(n=2, max_tokens=1))
    llm.beam_search([prompt], BeamSearchParams(beam_width=2, max_tokens=3))
    assert [r.cache_salt for r in llm.engine.added[:4]] == ["a", "a", None, None]
    assert {r.cache_salt for r in llm.engine.added[4:]} == {"a"}


def test_stage_without_a_prefix_cache_has_nothing_to_reset(make_llm):
    llm = make_llm()
    assert generate(llm, [5], SamplingParams(max_tokens=1))[0].num_cached_tokens == 0
    with pytest.raises(ValueError, match="keeps no prefixes that could be forgotten"):
        llm.reset_prefix_cache()


def test_beam_searches_of_several_threads_do_not_mix(make_llm):
    llm = make_llm([70], eos=())

    def search(token_id):
        params = BeamSearchParams(beam_width=1, max_tokens=3)
        return llm.beam_search([[token_id]], params)[0].sequences[0].tokens

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(search, range(70, 90))) == [[i, 0, 0, 0] for i in range(70, 90)]
    assert not llm.engine.has_unfinished_requests()


def test_every_thread_takes_its_steps_on_the_models_device(make_llm, monkeypatch):
    llm = make_llm()
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    generate(llm, "Hello")
    assert chosen == []
    object.__setattr__(llm.model, "device", torch.device("cuda:1"))
    generate(llm, "Hello")
    assert set(chosen) == {torch.device("cuda:1")}


def test_turns_are_given_in_the_order_in_which_they_were_asked_for():
    turns, order, threads = Turns(), [], []

    def take(number):
        for _ in range(3):
            with turns.turn():
                order.append(number)

    with turns.turn():
        for number in range(4):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            while len(turns._queue) < number + 2:
                time.sleep(1e-4)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3] * 3


def interrupted():
    raise KeyboardInterrupt


def test_turn_that_is_interrupted_while_it_is_waited_for_is_given_up():
    turns, has_turn, stop = Turns(), threading.Event(), threading.Event()

    def keep():
        with turns.turn():
            has_turn.set()
            stop.wait(5)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(keep)
        has_turn.wait(5)
        with pytest.raises(KeyboardInterrupt), turns.turn(interrupted):
            pass
        assert turns.try_turn(interrupted) is False
        stop.set()
    with turns.turn() as has_turn:
        assert has_turn
    assert turns.try_turn(lambda: None) is True


def test_place_that_an_interrupt_left_behind_goes_when_its_thread_asks_again(monkeypatch):
    turns = Turns()
    with monkeypatch.context() as patch:
        patch.setattr(turns, "_leave", lambda ticket: interrupted())
        with pytest.raises(KeyboardInterrupt), turns.turn():
            pass
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: turns.turn().__enter__())
        with turns.turn():
            pass
        assert other.result(5) is True


def test_interrupt_within_a_step_takes_effect_behind_it(make_llm):
    """A real Ctrl-C, where the engine's books are half written."""
    llm = make_llm([70], eos=(), max_num_seqs=8)
    stream = llm.stream("Hello", SamplingParams(max_tokens=9))
    right = llm.engine.step

    def step():
        signal.raise_signal(signal.SIGINT)
        return right()

    llm.engine.step = step
    with pytest.raises(KeyboardInterrupt):
        generate(llm, "dog")
    llm.engine.step = right
    assert [len(output.outputs[0].token_ids) for output in stream] == list(range(1, 10))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_interrupt_within_a_step_takes_effect_at_once(make_llm):
    llm = make_llm()
    steps = []

    def step():
        signal.raise_signal(signal.SIGINT)
        steps.append("after the first")
        signal.raise_signal(signal.SIGINT)
        steps.append("after the second")

    llm.engine.step = step
    with pytest.raises(KeyboardInterrupt):
        generate(llm, "dog")
    assert steps == ["after the first"]


# Failures leave a usable LLM ----------------------------------------------------------------------


def test_prompt_that_the_engine_refuses_takes_its_whole_call_back(make_llm):
    llm = make_llm(max_model_len=30)
    with pytest.raises(ValueError, match="46 tokens exceed"):
        generate(llm, [[70], [71], [72] * 30])
    assert llm.engine.aborted == ["0", "1"]
    assert len(generate(llm, "Hello")[0].outputs[0].token_ids) > 0


def test_wrong_prompt_is_found_before_any_is_queued(make_llm):
    llm = make_llm()
    with pytest.raises(ValueError, match="prompt 2 holds token id"):
        generate(llm, ["Hello", "dog", [70, 10**6]])
    assert llm.engine.added == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_call_aborts_its_requests(make_llm, error):
    llm = make_llm()

    def interrupt(num_steps):
        if num_steps == 3:
            llm.engine.before_step = lambda num_steps: None
            raise error

    llm.engine.before_step = interrupt
    with pytest.raises(error):
        generate(llm, ["Hello", "dog", "fox"], FULL)
    assert sorted(llm.engine.aborted) == ["0", "1", "2"]
    assert generate(llm, "Hello", FULL)[0].outputs[0].text == ANSWER


def test_interrupted_call_leaves_other_streams_alone(make_llm):
    llm = make_llm(max_num_seqs=8)
    stream = llm.stream("Hello", FULL)
    next(stream)
    with pytest.raises(ValueError):
        generate(llm, [[70], [71] * 290])
    assert [*stream][-1].outputs[0].text == ANSWER


@pytest.mark.parametrize("params", [FULL, SamplingParams(n=2, max_tokens=None, stop="STOP")])
def test_tokens_of_a_step_that_was_broken_off_behind_the_engine_are_not_lost(make_llm, params):
    llm = make_llm(max_num_seqs=8)
    stream = llm.stream("Hello", params)
    next(stream)
    break_off_behind_the_engine(llm)
    *_, last = stream
    text = ANSWER.partition("STOP")[0] if params.stop else ANSWER
    assert {completion.text for completion in last.outputs} == {text}
    assert not llm.engine.has_unfinished_requests()


def test_last_token_in_a_step_that_was_broken_off_ends_its_request(make_llm):
    llm = make_llm([70], eos=(), max_num_seqs=8)
    stream = llm.stream("Hello", SamplingParams(max_tokens=2))
    next(stream)
    break_off_behind_the_engine(llm)
    (last,) = stream
    assert (last.outputs[0].token_ids, last.outputs[0].finish_reason) == ([70, 70], "length")


def test_request_whose_logprobs_were_lost_ends_as_aborted(make_llm):
    llm = make_llm([70], eos=(), max_num_seqs=8)
    stream = llm.stream("Hello", SamplingParams(max_tokens=9, logprobs=1))
    next(stream)
    break_off_behind_the_engine(llm)
    assert generate(llm, "dog")[0].finished
    (last,) = stream
    assert (last.outputs[0].token_ids, last.outputs[0].finish_reason) == ([70], "abort")
    assert not llm.engine.has_unfinished_requests()


def test_request_id_in_use_by_someone_else_is_not_aborted(make_llm):
    llm, other = make_llm(), make_llm()
    generate(other, "Hello")
    foreign = other.engine.added[0]
    llm.engine.add_request(type(foreign)(
        request_id="0", prompt_token_ids=[70], sampling_params=SamplingParams(max_tokens=3)
    ))  # fmt: skip
    with pytest.raises(ValueError, match="id 0 is in use"):
        generate(llm, "Hello")
    assert llm.engine.aborted == []
    assert len(generate(llm, "dog", FULL)[0].outputs[0].token_ids) > 3


def test_requests_that_disappear_from_the_engine_are_an_error(make_llm):
    llm = make_llm()
    llm.engine.before_step = lambda num_steps: llm.engine.abort_request("0")
    with pytest.raises(RuntimeError, match="nothing left to run, but 1 prompts are unfinished"):
        generate(llm, "Hello")


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        (5, "a prompt is text, a list of token ids"),
        (np.array([70, 71]), "a prompt is text, a list of token ids"),
        ([[70], 5], "prompt 1 must be text"),
        ([None], "prompt 0 must be text"),
        ([[]], "prompt 0 has no tokens"),
        ("", "prompt 0 has no tokens"),
        ("a\ud800", r"no valid Unicode: it holds '\\ud800' at index 1"),
        ([True, False], "prompt 0 must be"),
        ([[1.5]], "prompt 0 must be"),
        ([-1], "token id -1, but this model's ids are 0 to"),
        ({"prompt": 5}, "prompt 0 must be"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "prompt 0 must be"),
        ({"prompt_embeds": [1]}, "prompt_embeds"),
        ({"prompt_token_ids": "abc"}, "prompt 0 must be"),
        ({"prompt_token_ids": [[1]]}, "prompt 0 must be"),
    ],
)
def test_malformed_prompt_is_refused(make_llm, prompts, match):
    llm = make_llm()
    with pytest.raises(ValueError, match=match):
        generate(llm, prompts)
    assert llm.engine.added == []


def test_text_and_stop_strings_without_a_tokenizer_are_refused(make_llm):
    llm = make_llm(with_tokenizer=False)
    with pytest.raises(ValueError, match="prompt 0 is text, but this model has no tokenizer"):
        generate(llm, "Hello")
    with pytest.raises(ValueError, match=r"stop strings .* need text"):
        generate(llm, [5], SamplingParams(stop="x"))


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ([SamplingParams()], "got 1 sampling_params for 2 prompts"),
        ([SamplingParams()] * 3, "got 3 sampling_params for 2 prompts"),
        ({"max_tokens": 3}, "must be a SamplingParams or a list"),
        ([SamplingParams(), None], "must be a SamplingParams or a list"),
        (SamplingParams(stop_token_ids=[10**6]), "stop_token_ids of prompt 0 holds token id"),
        (SamplingParams(logit_bias={-4: 1.0}), "logit_bias of prompt 0 holds token id -4"),
        (SamplingParams(max_tokens=None, min_tokens=400), "min_tokens .400. is above"),
    ],
)
def test_sampling_params_that_cannot_work_are_refused(make_llm, params, match):
    llm = make_llm()
    with pytest.raises(ValueError, match=match):
        generate(llm, ["Hello", "dog"], params)
    assert llm.engine.added == []


def test_unknown_engine_option_is_named_with_the_closest_and_all_known(make_llm):
    with pytest.raises(
        ValueError, match=r"'max_num_seq' \(did you mean 'max_num_seqs'\?\)"
    ) as info:
        make_llm(max_num_seq=3)
    assert "max_model_len, max_num_seqs, kv_cache_bytes, scheduling_policy" in str(info.value)
    with pytest.raises(ValueError, match="unknown engine option 'zzz'; this stage knows"):
        make_llm(zzz=3)


def test_enum_options_take_their_values_as_strings(make_llm):
    for value in ("priority", ScriptedPolicy.PRIORITY):
        config = make_llm(scheduling_policy=value).engine.config
        assert config.scheduling_policy is ScriptedPolicy.PRIORITY
    with pytest.raises(ValueError, match="one of 'fcfs', 'priority', got 'lifo'"):
        make_llm(scheduling_policy="lifo")


def test_max_model_len_follows_the_model_unless_given(make_llm):
    assert make_llm(max_positions=512).engine.config.max_model_len == 300
    assert make_llm(max_positions=100).engine.config.max_model_len == 100
    with pytest.raises(ValueError, match="max_model_len=200 is beyond this model's limit of 100"):
        make_llm(max_positions=100, max_model_len=200)


def test_seed_must_be_a_natural_number(make_llm):
    for seed in (-1, 1.5, True):
        with pytest.raises(ValueError, match="seed must be a whole number"):
            make_llm(seed=seed)


def test_missing_embedded_model_says_how_to_fetch_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="python -m m0_infra fetch"):
        ScriptedLLM()


def test_name_that_can_be_no_model_is_refused_before_the_network_is_asked(monkeypatch):
    monkeypatch.setattr("folovllm.entrypoints.llm.Tokenizer", None)
    with pytest.raises(FileNotFoundError, match="nonexistent does not exist.*a Hub id such as"):
        ScriptedLLM("nonexistent")


def test_cache_that_no_memory_can_hold_is_refused_and_other_failures_are_not_hidden(
    make_llm, monkeypatch
):
    def make_engine(config, model):
        if model.config.max_context_len == 512:
            torch.zeros(2**60, dtype=torch.uint8)
        raise RuntimeError("another failure")

    monkeypatch.setattr(ScriptedLLM, "engine_class", staticmethod(make_engine))
    with pytest.raises(ValueError, match="does not fit.*lower kv_cache_bytes"):
        make_llm()
    with pytest.raises(RuntimeError, match="another failure"):
        make_llm(max_positions=256)


def test_unknown_arguments_of_generate_are_refused(make_llm):
    with pytest.raises(TypeError, match="lora_request"):
        make_llm().generate("Hello", lora_request=1)


def test_tokenizer_is_read_from_the_models_directory_if_it_is_there(
    make_llm, tokenizer_path, tmp_path
):
    make_llm()  # replaces load_model
    assert ScriptedLLM(tokenizer_path).tokenizer.vocab_size == 360
    assert ScriptedLLM(tmp_path).tokenizer is None
    assert ScriptedLLM("qwen3-0.6b", load_format="dummy").tokenizer is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ('{"model_type": "llama"}', "config.json has no 'num_attention_heads'"),
        ('{"model_type": "gpt2"}', "model_type 'gpt2' is not supported"),
    ],
)
def test_broken_config_is_blamed_and_not_the_tokenizer(tmp_path, content, message):
    save_byte_level_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        ScriptedLLM(tmp_path)


def test_progress_bar_reports_prompts_and_tokens_per_second(make_llm, capsys):
    make_llm().generate(["Hello", "dog"], FULL, use_tqdm=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown and "output" in shown and "tok/s" in shown
    make_llm().generate(["Hello", "dog"], FULL, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_progress_bar_counts_the_prompts_of_its_own_call(make_llm, capsys):
    llm = make_llm(max_num_seqs=8)
    streams = [llm.stream("Hello", SamplingParams(max_tokens=n)) for n in (5, 6, 7)]
    for stream in streams:
        next(stream)
    llm.generate(["Hello", "dog"], FULL, use_tqdm=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown and "3/2" not in shown and "5/2" not in shown
    assert [len([*stream][-1].outputs[0].token_ids) for stream in streams] == [5, 6, 7]


def test_results_cannot_be_changed(make_llm):
    (output,) = generate(make_llm(), "Hello")
    with pytest.raises(AttributeError):
        output.finished = False
    assert isinstance(output.outputs[0], CompletionOutput)
    assert issubclass(ScriptedLLM, LLM)
