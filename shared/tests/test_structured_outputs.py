"""Structured outputs: what is accepted, which tokens a mask leaves, where an output may end."""

import json
import random
import sys

import numpy as np
import pytest

from folovllm.request import Request, SamplingParams, StructuredOutputsParams
from folovllm.sampling.token_masks import mask_length
from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer, save_metaspace_tokenizer
from folovllm.text.grammars import GrammarCompiler
from folovllm.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")
EOS = 1
NUM_PADDED = 13
"""Rows of the logits beyond the tokenizer's tokens."""


@pytest.fixture(scope="module", params=[save_byte_level_tokenizer, save_metaspace_tokenizer])
def tokenizer(request, tmp_path_factory):
    return Tokenizer(request.param(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + NUM_PADDED, frozenset({EOS}))


def make_request(compiler, stop_token_ids=(), **structure):
    params = StructuredOutputsParams(**structure)
    return Request(
        request_id="r",
        prompt_token_ids=[5, 6],
        sampling_params=SamplingParams(
            max_tokens=500, structured_outputs=params, stop_token_ids=stop_token_ids
        ),
        grammar=compiler.compile(params),
        eos_token_ids=frozenset({EOS}),
    )


def possible_tokens(request, compiler):
    mask = np.full(mask_length(compiler._vocab_size), -1, dtype=np.int32)
    request.grammar.fill_mask(request, mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits[: compiler._vocab_size]).tolist()


def write(request, compiler, tokenizer, text):
    """Append the tokens of a text, each of which must be possible."""
    while text:
        fitting = [
            token_id
            for token_id in possible_tokens(request, compiler)
            if token_id != EOS and text.encode().startswith(tokenizer.token_bytes(token_id))
        ]
        assert fitting, f"nothing of {text!r} may follow"
        best = max(fitting, key=lambda token_id: len(tokenizer.token_bytes(token_id)))
        request.append_output_token(best)
        text = text.encode()[len(tokenizer.token_bytes(best)) :].decode()


def finish_randomly(request, compiler, rng):
    while request.finish_reason is None:
        request.append_output_token(rng.choice(possible_tokens(request, compiler)))


def text_of(request, tokenizer):
    ids = [token_id for token_id in request.output_token_ids if token_id != EOS]
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


def test_output_ends_where_the_expression_may_and_not_before(tokenizer, compiler):
    request = make_request(compiler, regex="ab|abc")
    assert EOS not in possible_tokens(request, compiler)
    write(request, compiler, tokenizer, "ab")
    assert EOS in possible_tokens(request, compiler)
    write(request, compiler, tokenizer, "c")
    assert possible_tokens(request, compiler) == [EOS]


def test_own_stop_token_counts_as_an_end_of_sequence(tokenizer, compiler):
    stop = next(i for i in range(400) if tokenizer.token_bytes(i) == b"b")
    request = make_request(compiler, stop_token_ids=[stop], regex="ac?b?")
    assert stop not in possible_tokens(request, compiler)
    write(request, compiler, tokenizer, "a")
    assert {stop, EOS} <= set(possible_tokens(request, compiler))
    forced = make_request(compiler, stop_token_ids=[stop], regex="a[bc]d")
    write(forced, compiler, tokenizer, "a")
    assert stop not in possible_tokens(forced, compiler), "it would end the output before its d"


@pytest.mark.parametrize(
    ("structure", "is_valid"),
    [
        ({"json": {"type": "array", "items": {"enum": [1, 20]}, "maxItems": 4}},
         lambda text: set(json.loads(text)) <= {1, 20}),
        ({"json": '{"type": "string", "maxLength": 3}'}, lambda text: len(json.loads(text)) <= 3),
        ({"choice": ["dog", "the dog", "世界", 'say "x"']},
         lambda text: text in ("dog", "the dog", "世界", 'say "x"')),
        ({"regex": "[ab]{2}世?"}, lambda text: text[0] in "ab" and text[1] in "ab"),
        ({"grammar": 'start: "a" start "b" | "c"'},
         lambda text: text.count("a") == text.count("b") and "c" in text),
        ({"grammar": 'root ::= "a" | "b" root'}, lambda text: text.strip("b") == "a"),
    ],
)  # fmt: skip
def test_random_walk_through_the_masks_gives_valid_text(tokenizer, compiler, structure, is_valid):
    rng = random.Random(0)
    num_ended = 0
    for _ in range(20):
        request = make_request(compiler, **structure)
        finish_randomly(request, compiler, rng)
        if request.output_token_ids[-1] == EOS:
            num_ended += 1
            assert is_valid(text_of(request, tokenizer))
    assert num_ended > 10


def test_any_json_object_is_one(tokenizer, compiler):
    request = make_request(compiler, json_object=True)
    write(request, compiler, tokenizer, '{"a": [1, {"b": null}]}')
    assert possible_tokens(request, compiler).count(EOS) == 1


def test_white_space_of_json_is_as_asked_for(tokenizer, compiler):
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 2}
    write(make_request(compiler, json=schema), compiler, tokenizer, "[ 1 ,  2]")
    for options in ({"disable_any_whitespace": True}, {"whitespace_pattern": "_"}):
        request = make_request(compiler, json=schema, **options)
        with pytest.raises(AssertionError, match="may follow"):
            write(request, compiler, tokenizer, "[ 1")
        request = make_request(compiler, json=schema, **options)
    write(request, compiler, tokenizer, "[_1,_2]")


def test_tokens_that_are_taken_back_are_taken_back_in_the_grammar(tokenizer, compiler):
    request = make_request(compiler, regex="abc|axy")
    write(request, compiler, tokenizer, "a")
    after_a = possible_tokens(request, compiler)
    num_tokens = len(request.token_ids)
    write(request, compiler, tokenizer, "bc")
    assert possible_tokens(request, compiler) == [EOS]
    request.take_back_output(num_tokens)
    assert possible_tokens(request, compiler) == after_a
    write(request, compiler, tokenizer, "xy")
    request.take_back_output(2)
    write(request, compiler, tokenizer, "abc")


def test_output_that_the_vocabulary_cannot_complete_ends_with_a_warning(tokenizer, caplog):
    """The model names a letter as an end-of-sequence token: it is no text any more."""
    letters = {i for i in range(400) if b"a" in tokenizer.token_bytes(i)}
    ends = frozenset({EOS, *letters})
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, ends)
    request = make_request(compiler, regex="ba+")
    request.eos_token_ids = ends
    write(request, compiler, tokenizer, "b")
    assert not caplog.records
    assert set(possible_tokens(request, compiler)) == ends
    assert "r ends before its grammar does" in caplog.text


def test_requests_of_one_grammar_do_not_share_their_progress(tokenizer, compiler):
    first, second = (make_request(compiler, regex="abc") for _ in range(2))
    start = possible_tokens(second, compiler)
    write(first, compiler, tokenizer, "abc")
    assert possible_tokens(second, compiler) == start
    third = first.grammar.fork()
    second.grammar = third
    assert possible_tokens(second, compiler) == start


@pytest.mark.parametrize(
    ("structure", "match"),
    [
        ({"regex": "["}, "cannot follow this regex: .*invalid regex"),
        ({"json": {"type": 5}}, "cannot follow this json: type must be"),
        ({"json": {"not": {"type": "string"}}}, "cannot follow this json: Unimplemented keys"),
        ({"grammar": "start: x"}, "cannot follow this grammar: .*unknown name"),
    ],
)
def test_grammar_that_is_none_is_refused(compiler, structure, match):
    with pytest.raises(ValueError, match=f"(?s){match}"):
        compiler.compile(StructuredOutputsParams(**structure))


@pytest.mark.parametrize(
    ("structure", "match"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object, got none"),
        ({"regex": "a", "choice": ["a"]}, "exactly one of .*, got regex and choice"),
        ({"regex": 5}, "regex must be a text, got 5"),
        ({"json": "{"}, "json must be a JSON schema, got"),
        ({"json": "5"}, "json must be a JSON schema, which is an object"),
        ({"json": {"a": {1}}}, "json must be a JSON schema"),
        ({"choice": []}, "choice must be a list of at least one text"),
        ({"choice": "ab"}, "choice must be a list of at least one text"),
        ({"choice": [5]}, "choice must be"),
        ({"json_object": False}, "json_object can only be True"),
        ({"regex": "a", "disable_any_whitespace": True}, "concern JSON alone, but regex is given"),
    ],
)
def test_structure_that_cannot_work_is_refused(structure, match):
    with pytest.raises(ValueError, match=match):
        StructuredOutputsParams(**structure)


def test_what_is_missing_is_named(tokenizer, monkeypatch):
    structure = StructuredOutputsParams(regex="a")
    with pytest.raises(ValueError, match="no tokenizer"):
        GrammarCompiler(None, 50, frozenset({EOS})).compile(structure)
    with pytest.raises(ValueError, match="needs an end-of-sequence token"):
        GrammarCompiler(tokenizer, 500, frozenset()).compile(structure)
    with pytest.raises(ValueError, match="tokens, but the model only 50"):
        GrammarCompiler(tokenizer, 50, frozenset({EOS})).compile(structure)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"pip install 'folovllm\[structured\]'"):
        GrammarCompiler(tokenizer, 500, frozenset({EOS})).compile(structure)
