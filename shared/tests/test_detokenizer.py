"""Incremental detokenisation against decoding everything at once, on three kinds of tokenizers."""

from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.request import SamplingParams
from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer, save_metaspace_tokenizer
from folovllm.text.detokenizer import IncrementalDetokenizer
from folovllm.text.tokenizer import Tokenizer

MODEL = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"
TEXTS = [
    "Hello world, the quick brown fox",
    "你好世界，今天天气很好。",
    "😀 👩‍👩‍👧‍👦 family 🇫🇷",
    "สวัสดีชาวโลก ยินดีต้อนรับ",
    "naïve café, Ünïcödé\n\n\tdef f():",
    "  two spaces  and one ",
]
FIXED = settings(max_examples=150, deadline=None, derandomize=True)
MIXED_TEXT = st.text(
    st.sampled_from("ab c,.\n你好世界😀🦊สวัฬéÜ\u200d\ufffd\U0001f468"), min_size=1, max_size=30
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    found = {
        "byte_level": Tokenizer(save_byte_level_tokenizer(tmp_path_factory.mktemp("byte_level"))),
        "metaspace": Tokenizer(save_metaspace_tokenizer(tmp_path_factory.mktemp("metaspace"))),
    }
    if MODEL.is_dir():
        found["embedded"] = Tokenizer(MODEL)
    return found


@pytest.fixture(params=["byte_level", "metaspace", "embedded"])
def kind(request):
    if request.param == "embedded" and not MODEL.is_dir():
        pytest.skip("the embedded model is not fetched")
    return request.param


@pytest.fixture
def tokenizer(tokenizers, kind):
    return tokenizers[kind]


@pytest.fixture(scope="module")
def byte_level(tokenizers):
    return tokenizers["byte_level"]


def run(tokenizer, token_ids, prompt_token_ids=None, **params):
    """Deltas of every token up to a stop, then what finish() adds, and the stop reason."""
    prompt = tokenizer.encode("dog") if prompt_token_ids is None else prompt_token_ids
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, SamplingParams(**params))
    deltas = []
    for token_id in token_ids:
        deltas.append(detokenizer.append(token_id))
        if detokenizer.stop_reason is not None:
            break
    deltas.append(detokenizer.finish())
    return deltas, detokenizer.stop_reason


def in_characters(tokenizer, text):
    """Token ids of a text with tokens as short as possible: one byte each, where there are."""
    token_of = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return [token_of[bytes([byte])] for byte in text.encode()]


# What a stream gives ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_stream_is_the_text_and_every_delta_is_whole_characters(tokenizer, text):
    ids = tokenizer.encode("dog" + text)
    deltas, _ = run(tokenizer, ids, prompt_token_ids=[*tokenizer.special_token_ids])
    assert "".join(deltas) == tokenizer.decode(ids) == "dog" + text
    assert "\ufffd" not in "".join(deltas)
    assert len([delta for delta in deltas if delta]) > 3


def test_character_spread_over_tokens_comes_with_its_last_byte(byte_level):
    ids = in_characters(byte_level, "a😀b")
    deltas, _ = run(byte_level, ids)
    assert deltas == ["a", "", "", "", "😀", "b", ""]


def test_first_word_keeps_its_space_after_a_prompt_and_not_without_one(tokenizers):
    tokenizer = tokenizers["metaspace"]
    ids = tokenizer.encode("dog fox")
    after_text, _ = run(tokenizer, ids, prompt_token_ids=tokenizer.encode("the"))
    assert "".join(after_text) == " dog fox"
    after_bos, _ = run(tokenizer, ids, prompt_token_ids=[1])
    assert "".join(after_bos) == tokenizer.decode(ids) == "dog fox"


def test_unfinished_last_character_becomes_a_replacement_character_only_at_the_end(byte_level):
    ids = in_characters(byte_level, "a世")[:-1]
    deltas, _ = run(byte_level, ids)
    assert deltas == ["a", "", "", "\ufffd"]
    assert "".join(deltas) == byte_level.decode(ids)


def test_broken_bytes_do_not_hold_up_the_stream(byte_level):
    (bad,) = [i for i in range(byte_level.vocab_size) if byte_level.token_bytes(i) == b"\xff"]
    deltas, _ = run(byte_level, [bad] * 50)
    assert deltas == ["\ufffd"] * 50 + [""]


def test_special_tokens_are_skipped_unless_wanted(tokenizer):
    (eos,) = tokenizer.eos_token_ids
    ids = [*tokenizer.encode("dog"), eos]
    with_special = tokenizer.decode(ids, skip_special_tokens=False)
    start = [*tokenizer.special_token_ids]
    assert "".join(run(tokenizer, ids, start)[0]) == "dog"
    deltas, _ = run(tokenizer, ids, [eos], skip_special_tokens=False)
    assert "".join(deltas).strip() == with_special.strip() != "dog"


def test_ids_beyond_the_tokenizer_add_nothing(byte_level):
    ids = [byte_level.vocab_size + 3, *byte_level.encode("dog")]
    assert "".join(run(byte_level, ids)[0]) == "dog"


# A prompt that ends inside a character ------------------------------------------------------------


def test_character_begun_by_the_prompt_is_given_whole_and_nothing_else_of_the_prompt(byte_level):
    ids = in_characters(byte_level, "secret 世b")
    for cut in (-3, -2):
        deltas, _ = run(byte_level, ids[cut:], prompt_token_ids=ids[:cut])
        assert "".join(deltas) == "世b"


def test_character_that_the_output_does_not_go_on_with_stays_with_the_prompt(byte_level):
    prompt = in_characters(byte_level, "secret 世")[:-1]
    for text in ("b", "é"):
        deltas, _ = run(byte_level, in_characters(byte_level, text), prompt_token_ids=prompt)
        assert "".join(deltas) == text


def test_special_token_ends_the_character_that_the_prompt_began(byte_level):
    ids = in_characters(byte_level, "世")
    deltas, _ = run(byte_level, ids[-1:], prompt_token_ids=[*ids[:-1], *byte_level.eos_token_ids])
    assert deltas == ["\ufffd", ""]


def test_unfinished_character_of_a_metaspace_prompt_does_not_leak_it(tokenizers):
    tokenizer = tokenizers["metaspace"]
    ids = tokenizer.encode("secret 🦊")
    deltas, _ = run(tokenizer, ids[-2:], prompt_token_ids=ids[:-2])
    assert "".join(deltas) == "🦊"


# Stop strings -------------------------------------------------------------------------------------


def test_stop_string_across_tokens_is_held_back_and_cut(byte_level):
    ids = in_characters(byte_level, "ABCDEFGHIJ")
    deltas, reason = run(byte_level, ids, stop="FG")
    assert reason == "FG"
    assert deltas == ["", "A", "B", "C", "D", "E", "", ""]


def test_beginning_of_a_stop_string_that_does_not_come_is_given_out(byte_level):
    ids = in_characters(byte_level, "DEF")
    deltas, reason = run(byte_level, ids, stop="EFG")
    assert (deltas, reason) == (["", "", "D", "EF"], None)


def test_stop_string_that_ends_inside_a_token_drops_the_rest_of_it(byte_level):
    token_id = max(range(byte_level.vocab_size), key=lambda i: len(byte_level.token_bytes(i)))
    text = byte_level.token_text(token_id)
    assert len(text) >= 3
    deltas, reason = run(byte_level, [token_id, token_id], stop=text[1])
    assert ("".join(deltas), reason) == (text[: text.index(text[1])], text[1])


def test_stop_string_of_several_bytes_per_character(byte_level):
    ids = in_characters(byte_level, "a世界b")
    assert run(byte_level, ids, stop="世界")[1] == "世界"
    assert "".join(run(byte_level, ids, stop="界")[0]) == "a世"


def test_stop_string_that_is_complete_first_wins_however_text_is_cut(byte_level):
    ids = in_characters(byte_level, "xabcd")
    for stops in (["abc", "b"], ["b", "abc"]):
        deltas, reason = run(byte_level, ids, stop=stops)
        assert ("".join(deltas), reason) == ("xa", "b")
    assert run(byte_level, ids, stop=["bc", "abc", "c"])[1] == "abc"


def test_included_stop_string_ends_the_text_and_delays_nothing(byte_level):
    ids = in_characters(byte_level, "ABCDEF")
    deltas, reason = run(byte_level, ids, stop="CD", include_stop_str_in_output=True)
    assert (deltas, reason) == (["A", "B", "C", "D", ""], "CD")


def test_stop_string_within_min_tokens_is_text(byte_level):
    ids = in_characters(byte_level, "ABABAB")
    for min_tokens, text in ((0, ""), (1, ""), (2, "AB"), (3, "AB"), (4, "ABAB")):
        deltas, reason = run(byte_level, ids, stop="AB", min_tokens=min_tokens)
        assert ("".join(deltas), reason) == (text, "AB"), min_tokens


def test_token_after_a_stop_string_is_refused(byte_level):
    detokenizer = IncrementalDetokenizer(byte_level, [5], SamplingParams(stop="A"))
    token_id = in_characters(byte_level, "A")[0]
    assert detokenizer.append(token_id) == ""
    with pytest.raises(RuntimeError, match="after the stop string 'A'"):
        detokenizer.append(token_id)


def test_each_token_is_looked_at_once(byte_level, monkeypatch):
    ids = byte_level.encode("The quick 世界 😀 dog " * 50)
    detokenizer = IncrementalDetokenizer(byte_level, ids, SamplingParams(stop=["never"]))
    asked = []
    original = byte_level.token_bytes
    monkeypatch.setattr(byte_level, "token_bytes", lambda i: asked.append(i) or original(i))
    monkeypatch.setattr(byte_level, "decode", None)
    for token_id in ids:
        detokenizer.append(token_id)
    # Nobody asks for the bytes of a token again whose text is known.
    parts = [i for i in ids if byte_level.whole_characters[i] is None]
    assert parts and asked == parts


def test_tokens_of_whole_characters_are_known_from_parts_of_one(byte_level, tokenizers):
    whole = byte_level.whole_characters
    assert [whole[i] for i in byte_level.encode("a")] == ["a"]
    parts = in_characters(byte_level, "😀")
    assert [whole[i] for i in parts] == [None] * 4
    for name, tokenizer in tokenizers.items():
        for token_id in range(tokenizer.vocab_size + 1):
            data = tokenizer.token_bytes(token_id)
            text = tokenizer.whole_characters[token_id]
            assert text is None or text.encode() == data, name
            assert (text is None) == (data.decode(errors="ignore").encode() != data), name


# Against a reference that decodes everything after every token ------------------------------------


def reference(texts, stops, include, min_tokens):
    """Text and stop reason from the certain text after each token (texts[0] is "")."""
    for num_tokens in range(1, len(texts)):
        before, now = texts[num_tokens - 1], texts[num_tokens]
        ends = range(len(before) + 1, len(now) + 1) if num_tokens > min_tokens else ()
        for end in ends:
            hits = [stop for stop in stops if now[:end].endswith(stop)]
            if hits:
                stop = max(hits, key=len)
                return now[: end if include else end - len(stop)], stop
    return None, None


def check_against_reference(tokenizer, prompt, ids, decoded, stops, include, min_tokens):
    # A U+FFFD at the end may be the beginning of a character: it is not certain yet.
    texts = ["", *(decoded(ids[:n]).removesuffix("\ufffd") for n in range(1, len(ids) + 1))]
    texts = list(accumulate(texts, lambda a, b: max(a, b, key=len)))
    expected, expected_stop = reference(texts, stops, include, min_tokens)
    deltas, stop = run(
        tokenizer, ids, prompt, stop=stops, include_stop_str_in_output=include,
        min_tokens=min_tokens, max_tokens=1000,
    )  # fmt: skip
    assert stop == expected_stop
    assert "".join(deltas) == (decoded(ids) if expected is None else expected)


STOPS = st.lists(st.text(st.sampled_from("ab c你好😀สé\n"), min_size=1, max_size=4), max_size=3)


@pytest.mark.parametrize("name", ["byte_level", "embedded"])
@FIXED
@given(data=st.data(), stops=STOPS, include=st.booleans(), min_tokens=st.integers(0, 5))
def test_random_byte_level_tokens_match_the_reference(
    tokenizers, name, data, stops, include, min_tokens
):
    if name not in tokenizers:
        pytest.skip("the embedded model is not fetched")
    tokenizer = tokenizers[name]
    of_text = MIXED_TEXT.map(tokenizer.encode)
    anything = st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=12)
    parts = data.draw(st.lists(of_text | anything, min_size=1, max_size=3))
    ids = [token_id for part in parts for token_id in part]
    check_against_reference(tokenizer, [70], ids, tokenizer.decode, stops, include, min_tokens)


@FIXED
@given(text=MIXED_TEXT, stops=STOPS, include=st.booleans(), min_tokens=st.integers(0, 5))
def test_random_metaspace_texts_match_the_reference(tokenizers, text, stops, include, min_tokens):
    tokenizer = tokenizers["metaspace"]
    prompt = tokenizer.encode("the dog")

    def decoded(ids):
        # A run of byte tokens that breaks off is all U+FFFD for this decoder: none is certain.
        text = tokenizer.decode([*prompt, *ids])[len("the dog") :]
        return text if len(ids) == len(all_ids) else text.rstrip("\ufffd")

    all_ids = tokenizer.encode(text.replace("\ufffd", ""))
    if all_ids:
        check_against_reference(tokenizer, prompt, all_ids, decoded, stops, include, min_tokens)


@FIXED
@given(text=MIXED_TEXT, cut=st.integers(1, 40))
def test_wherever_the_prompt_ends_its_text_and_the_stream_are_the_whole(tokenizers, text, cut):
    tokenizer = tokenizers["byte_level"]
    data = text.encode()
    ids = in_characters(tokenizer, text)
    prompt, output = ids[:cut], ids[cut:]
    if not output:
        return
    whole_characters = data[:cut].decode(errors="ignore")
    deltas, _ = run(tokenizer, output, prompt_token_ids=prompt)
    assert whole_characters + "".join(deltas) == text


@FIXED
@given(data=st.data(), name=st.sampled_from(["byte_level", "metaspace"]), skip=st.booleans())
def test_several_tokens_at_once_give_the_text_of_one_at_a_time(tokenizers, data, name, skip):
    tokenizer = tokenizers[name]
    some_ids = st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=8)
    prompt, pieces = data.draw(some_ids), data.draw(st.lists(some_ids, max_size=5))
    params = SamplingParams(skip_special_tokens=skip)
    at_once, one_by_one = (IncrementalDetokenizer(tokenizer, prompt, params) for _ in range(2))
    for ids in pieces:
        assert at_once.extend(ids) == "".join(map(one_by_one.append, ids))
    assert at_once.finish() == one_by_one.finish()


def test_tokens_that_are_searched_cannot_be_taken_at_once(byte_level):
    detokenizer = IncrementalDetokenizer(byte_level, [], SamplingParams(stop=["x"]))
    with pytest.raises(RuntimeError, match="one at a time"):
        detokenizer.extend([1, 2])
