"""The forms of a prompt: which are taken, which are refused, and what looking at them costs."""

import abc
from numbers import Integral
from types import SimpleNamespace

import numpy as np
import pytest

from folovllm.entrypoints import prompts
from folovllm.entrypoints.prompts import Prompt, parse_prompt, split_prompts

VOCAB = 100


@pytest.mark.parametrize(
    "token_ids", [[3, 4], (3, 4), range(3, 5), [np.int64(3), 4], [np.int32(3), np.uint8(4)]]
)
def test_whole_numbers_of_any_kind_are_token_ids(token_ids):
    assert len(split_prompts(token_ids)) == 1
    for form in (token_ids, {"prompt_token_ids": token_ids}):
        parsed = parse_prompt(form, 0, None, VOCAB)
        assert parsed.token_ids == [3, 4]
        assert {type(token_id) for token_id in parsed.token_ids} == {int}


@pytest.mark.parametrize(
    "wrong",
    [[1, True], [np.bool_(True), 1], [1, 2.0], [1, "2"], [1, None], [1, [2]], np.array([1])],
)
def test_anything_else_among_the_ids_is_refused_by_index(wrong):
    with pytest.raises(ValueError, match="prompt 7 must be text, a list of token ids"):
        parse_prompt(wrong, 7, None, VOCAB)


@pytest.mark.parametrize("token_id", [-1, VOCAB, 2**70])
def test_first_id_outside_of_the_vocabulary_is_named(token_id):
    with pytest.raises(ValueError, match=f"prompt 2 holds token id {token_id}, .* are 0 to 99"):
        parse_prompt([5, token_id, -3], 2, None, VOCAB)


@pytest.fixture
def checks(monkeypatch):
    """Every question whether something is a whole number."""
    asked = []

    class Counting(abc.ABCMeta):
        def __instancecheck__(cls, instance):
            asked.append(instance)
            return isinstance(instance, Integral)

        def __subclasscheck__(cls, subclass):
            asked.append(subclass)
            return issubclass(subclass, Integral)

    monkeypatch.setattr(prompts, "Integral", Counting("Counted", (), {}))
    return asked


def test_long_prompt_is_not_checked_id_by_id(checks):
    token_ids = [index % VOCAB for index in range(16_384)]
    assert split_prompts(token_ids) == [token_ids]
    assert parse_prompt(token_ids, 0, None, VOCAB).token_ids == token_ids
    assert len(checks) == 2


@pytest.mark.parametrize("prompt", ["text", [1, 2], {"prompt_token_ids": [1]}])
def test_list_of_many_prompts_is_checked_once_not_prompt_by_prompt(checks, prompt):
    many = [prompt] * 100_000
    assert split_prompts(many) == many
    assert len(checks) <= 1


@pytest.mark.parametrize("salt", ["a", "user 1", None])
def test_salt_stands_beside_the_prompt_in_either_form(salt):
    assert parse_prompt({"prompt_token_ids": [3], "cache_salt": salt}, 0, None, VOCAB) == Prompt(
        None, [3], salt
    )
    (item,) = split_prompts({"prompt": "3", "cache_salt": salt})
    tokenizer = SimpleNamespace(encode=lambda text: [int(text)])
    assert parse_prompt(item, 0, tokenizer, VOCAB) == Prompt("3", [3], salt)


@pytest.mark.parametrize("salt", ["", 3, b"a", ["a"]])
def test_salt_that_is_no_text_is_refused(salt):
    with pytest.raises(ValueError, match="cache_salt of prompt 1 must be a text, not empty"):
        parse_prompt({"prompt_token_ids": [3], "cache_salt": salt}, 1, None, VOCAB)


@pytest.mark.parametrize("form", [{"cache_salt": "a"}, {"prompt": "a", "salt": "a"}])
def test_salt_alone_and_other_names_are_refused(form):
    with pytest.raises(ValueError, match='or without "cache_salt"'):
        parse_prompt(form, 0, None, VOCAB)
