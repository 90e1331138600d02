"""Workloads: totals, reproducibility, cuts, and refusals."""

import json
import random
from itertools import pairwise

import pytest

from folovllm.workloads.workload import Workload, WorkloadRequest, make_workload, read_prompts

VOCAB = 32000


class ByteTokenizer:
    """One token per UTF-8 byte; a chat template that wraps the content in two tokens."""

    def encode(self, text):
        return list(text.encode())

    def apply_chat_template(self, messages):
        return [1, *self.encode(messages[0]["content"]), 2]


def prompt_lens(workload):
    return [len(request.prompt_token_ids) for request in workload.requests]


def test_nano_has_the_published_token_counts():
    workload = make_workload("nano", vocab_size=49152)
    assert len(workload.requests) == 256
    assert workload.num_input_tokens == 142_827
    assert workload.num_output_tokens == 133_966
    assert max(max(request.prompt_token_ids) for request in workload.requests) == 10_000
    assert {request.arrival_s for request in workload.requests} == {0.0}


def test_nano_is_the_same_everywhere():
    digest = "b813a387dbbbaa14cebb14208f10e42706b393f2f327e32379b7b4e05d0136a3"
    assert make_workload("nano").sha256 == digest


def test_nano_refuses_a_vocabulary_that_is_too_small():
    with pytest.raises(ValueError, match=r"token id 10000 .* vocab_size is 10000"):
        make_workload("nano:1", vocab_size=10_000)


@pytest.mark.parametrize(
    ("spec", "digest"),
    [
        ("fixed:batch=3,input=9,output=4",
         "ee7ab21f80056823d105da014418fd55902b94bffb822d7dc682752ee5e04272"),
        ("poisson:rate=2,num=5",
         "40a1f0ebe3a1d1be458acdb03450958d34c0a9c188623a3aae0f4decfabf98a9"),
        ("shared-prefix:6",
         "d1406e07d3fffeeba28615f0d83f141c96356116a39cbc24103bca3171edd933"),
        ("few-shot:6",
         "d7fc04cb1c363067e709fcbdfac91c868f9db26ccc0d81cf7edd63b79704d02c"),
        ("prefix-hit:4,prompt=50",
         "784acb730d21a72fa870e6f505c95d55167dd33f692d2a5fe79589dddfbf1ec8"),
        ("multi-turn:9,think=0.5",
         "f002d6e21da0c6ca377911a2991a8ed3de596fcfdeda9b98e1456e9fc3925900"),
    ],
)  # fmt: skip
def test_workload_is_the_same_everywhere(spec, digest):
    assert make_workload(spec, vocab_size=VOCAB).sha256 == digest


def test_cut_is_a_prefix_and_says_how_many_there_were():
    whole, cut = make_workload("nano"), make_workload("nano:8")
    assert cut.requests == whole.requests[:8]
    assert (cut.num_requests_before_cut, whole.num_requests_before_cut) == (256, None)
    assert cut.sha256 == whole.head(8).sha256 != whole.sha256
    assert whole.head(16).head(8).num_requests_before_cut == 256
    assert whole.head(256) is whole
    with pytest.raises(ValueError, match="first 257 requests of nano: it has 256"):
        whole.head(257)


def test_making_a_workload_leaves_the_global_generator_alone():
    random.seed(7)
    expected = random.random()
    random.seed(7)
    make_workload("nano:1")
    assert random.random() == expected


@pytest.mark.parametrize(
    "change",
    [{"prompt_token_ids": (1, 3)}, {"output_len": 4}, {"arrival_s": 0.5}],
)
def test_sha256_sees_every_field_that_changes_the_work(change):
    fields = {"prompt_token_ids": (1, 2), "output_len": 3, "arrival_s": 0.0, "request_id": "r0"}
    request, changed = WorkloadRequest(**fields), WorkloadRequest(**{**fields, **change})
    assert Workload("a", (request,)).sha256 == Workload("b", (request,), {"seed": 1}).sha256
    assert Workload("a", (request,)).sha256 != Workload("a", (changed,)).sha256


def test_sha256_tells_where_one_prompt_ends_and_the_next_begins():
    def two_requests(first, second):
        requests = (WorkloadRequest(first, 1, 0.0, "r0"), WorkloadRequest(second, 1, 0.0, "r1"))
        return Workload("a", requests)

    assert two_requests((1, 2), (3,)).sha256 != two_requests((1,), (2, 3)).sha256


@pytest.mark.parametrize(
    "spec",
    [
        "fixed:batch=3,input=9,output=4", "poisson:rate=2,num=5", "shared-prefix:6", "chat:9",
        "few-shot:6", "prefix-hit:4,prompt=50", "multi-turn:9",
    ],
)  # fmt: skip
def test_seed_alone_decides(spec):
    made = [
        make_workload(spec, tokenizer=ByteTokenizer(), vocab_size=VOCAB, seed=seed).sha256
        for seed in (0, 0, 1)
    ]
    assert made[0] == made[1] != made[2]


def test_fixed_shapes_are_exact_and_prompts_differ():
    workload = make_workload("fixed:batch=3,input=9,output=4", vocab_size=VOCAB)
    assert prompt_lens(workload) == [9, 9, 9]
    assert [request.output_len for request in workload.requests] == [4, 4, 4]
    assert len({request.prompt_token_ids for request in workload.requests}) == 3
    assert workload.parameters == {"batch": 3, "input": 9, "output": 4, "seed": 0}
    assert workload.name == "fixed-batch3-input9-output4"


def test_random_tokens_stay_inside_the_vocabulary():
    workload = make_workload("fixed:batch=1,input=5000,output=1", vocab_size=7)
    assert set(workload.requests[0].prompt_token_ids) == set(range(7))
    with pytest.raises(ValueError, match="vocab_size"):
        make_workload("fixed")


def test_poisson_gaps_have_the_asked_mean_and_vary():
    workload = make_workload("poisson:rate=10,num=2000,input=1-2,output=3", vocab_size=VOCAB)
    arrivals = [request.arrival_s for request in workload.requests]
    gaps = [after - before for before, after in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert arrivals[0] == 0.0
    assert mean == pytest.approx(0.1, rel=0.1)
    assert deviation == pytest.approx(mean, rel=0.1)
    assert set(prompt_lens(workload)) == {1, 2}
    assert {request.output_len for request in workload.requests} == {3}


def test_poisson_prefix_is_the_shorter_workload():
    whole = make_workload("poisson:rate=1,num=9", vocab_size=VOCAB)
    assert make_workload("poisson:rate=1,num=4", vocab_size=VOCAB).sha256 == whole.head(4).sha256


def test_long_prompt_arrives_after_the_decoders_and_every_option_is_reported():
    workload = make_workload("long-arrival", vocab_size=VOCAB)
    assert prompt_lens(workload) == [128] * 16 + [16384]
    assert [request.output_len for request in workload.requests] == [600] * 16 + [16]
    assert [request.arrival_s for request in workload.requests] == [0.0] * 16 + [0.5]
    assert workload.parameters == {
        "decoders": 16, "input": 128, "output": 600, "prompt": 16384, "prompt_output": 16,
        "at": 0.5, "seed": 0,
    }  # fmt: skip
    assert len({request.prompt_token_ids for request in workload.requests}) == 17


def test_long_arrival_is_the_same_everywhere_and_small_where_it_is_asked_to():
    spec = "long-arrival:decoders=2,input=4,output=6,prompt=32,prompt_output=3,at=0.25"
    workload = make_workload(spec, vocab_size=VOCAB)
    assert workload.sha256 == "c22397c1712326e100317a18557748668b021762a8442b5467b2d15ed92d7a3b"
    assert make_workload(spec, vocab_size=VOCAB, seed=1).sha256 != workload.sha256
    assert prompt_lens(workload) == [4, 4, 32]
    assert (workload.requests[2].output_len, workload.requests[2].arrival_s) == (3, 0.25)


def test_shared_prefix_requests_agree_within_a_group_only():
    workload = make_workload(
        "shared-prefix:groups=2,num=4,prefix=16,suffix=4-8,output=2", vocab_size=VOCAB
    )
    prompts = [request.prompt_token_ids for request in workload.requests]
    assert prompts[0][:16] == prompts[2][:16] != prompts[1][:16] == prompts[3][:16]
    assert prompts[0][16:20] != prompts[2][16:20]
    assert all(20 <= len(prompt) <= 24 for prompt in prompts)


def test_chat_runs_every_shipped_prompt_with_mixed_output_lengths():
    workload = make_workload(
        "chat:min_output=4,max_output=9", tokenizer=ByteTokenizer(), vocab_size=VOCAB
    )
    texts = [bytes(request.prompt_token_ids[1:-1]).decode() for request in workload.requests]
    assert sorted(texts) == sorted(prompt.text for prompt in read_prompts())
    lens = {request.output_len for request in workload.requests}
    assert min(lens) >= 4 and max(lens) <= 9 and len(lens) > 2


def test_chat_starts_over_when_more_are_asked_for_than_there_are():
    num = len(read_prompts())
    workload = make_workload(f"chat:num={num + 2}", tokenizer=ByteTokenizer())
    assert workload.requests[0].prompt_token_ids == workload.requests[num].prompt_token_ids
    assert workload.parameters["num_distinct_prompts"] == num
    assert len({request.request_id for request in workload.requests}) == num + 2


@pytest.mark.parametrize("kind", ["chat", "sharegpt:x.json", "multi-turn:x.jsonl"])
def test_text_without_a_tokenizer_is_refused(kind):
    with pytest.raises(ValueError, match="needs a tokenizer"):
        make_workload(kind, vocab_size=VOCAB)


def test_shipped_prompts_are_many_and_mixed():
    prompts = read_prompts()
    lens = [len(prompt.text) for prompt in prompts]
    assert len(prompts) >= 40 and len({prompt.text for prompt in prompts}) == len(prompts)
    assert min(lens) < 20 and max(lens) > 2000
    assert len({prompt.category for prompt in prompts}) >= 10
    assert any("\u0e00" <= character < "\u0e80" for p in prompts for character in p.text)


def test_azure_trace_replays_faster_and_reports_what_was_dropped(tmp_path):
    path = tmp_path / "a,b:c.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:00:00,5,0\n2023-11-16 18:00:01,5,2\n"
        "2023-11-16 18:00:03,999,2\n2023-11-16 18:00:05,6,3\n2023-11-16 18:00:06,7,3\n"
    )
    workload = make_workload(f"azure:{path},num=2,speed=4,max_input=100", vocab_size=VOCAB)
    assert prompt_lens(workload) == [5, 6]
    assert [request.arrival_s for request in workload.requests] == [0.0, 1.0]
    assert workload.parameters["num_dropped_empty"] == 1
    assert workload.parameters["num_dropped_too_long"] == 1
    assert workload.parameters["num_after_head"] == 1
    assert workload.num_requests_before_cut == 3
    assert workload.name == "azure-num2-speed4-max_input100"


def test_azure_at_eight_times_the_speed_ends_after_its_first_600_requests(tmp_path):
    path = tmp_path / "conv.csv"
    rows = [f"2023-11-16 18:{s // 60:02}:{s % 60:02},{s % 50 + 1},2" for s in range(0, 1400, 2)]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    workload = make_workload(f"azure:{path},speed=8,num=600", vocab_size=VOCAB)
    arrivals = [request.arrival_s for request in workload.requests]
    assert arrivals == [index * 2 / 8 for index in range(600)]
    assert (workload.parameters["speed"], workload.parameters["num"]) == (8.0, 600)
    assert workload.num_requests_before_cut == 700


def test_mooncake_blocks_with_equal_ids_hold_equal_tokens(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 1030, "output_length": 1, "hash_ids": [0, 1, 2]},
        {"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [0, 3]},
        {"timestamp": 3000, "input_length": 520, "output_length": 1, "hash_ids": [3, 2]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    workload = make_workload(f"mooncake:{path}", vocab_size=VOCAB)
    first, second, third = (request.prompt_token_ids for request in workload.requests)
    assert prompt_lens(workload) == [1030, 600, 520]
    assert first[:512] == second[:512]
    assert first[512:600] != second[512:600]
    assert third[:88] == second[512:]
    assert third[512:518] == first[1024:]
    arrivals = [request.arrival_s for request in workload.requests]
    assert 0 == arrivals[0] < arrivals[1] < 3 and arrivals[1] < arrivals[2] < 6


def test_sharegpt_output_is_as_long_as_the_answer(tmp_path):
    path = tmp_path / "share.json"
    exchange = [{"from": "human", "value": "question"}, {"from": "gpt", "value": "yes"}]
    path.write_text(json.dumps([{"conversations": exchange}, {"conversations": []}]))
    workload = make_workload(f"sharegpt:{path}", tokenizer=ByteTokenizer(), vocab_size=VOCAB)
    assert workload.requests[0].prompt_token_ids == tuple(b"question")
    assert workload.requests[0].output_len == 3
    assert workload.parameters["num_dropped_without_exchange"] == 1


def test_trace_of_which_nothing_is_left_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00,50,1\n")
    with pytest.raises(ValueError, match=r"no requests left.*'num_dropped_too_long': 1"):
        make_workload(f"azure:{path},max_input=5", vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nanoo", "unknown workload 'nanoo'; there are azure, chat, few-shot, fixed"),
        ("nano:eight", "number of requests must be a whole number of at least 1, got 'eight'"),
        ("nano:0", "at least 1, got '0'"),
        ("nano:seed=3", "unknown option 'seed'; nano takes: none"),
        ("fixed:size=3", "unknown option 'size'; fixed takes: batch, input, output"),
        ("fixed:batch=0", "batch must be a whole number of at least 1, got '0'"),
        ("fixed:batch=1,batch=2", "same option twice"),
        ("fixed:batch=3,7", "number of requests must be"),
        ("poisson:rate=nan", "rate must be a number above 0, got 'nan'"),
        ("poisson:rate=fast", "rate must be a number above 0, got 'fast'"),
        ("long-arrival:at=0", "at must be a number above 0, got '0'"),
        ("long-arrival:prompts=2", "unknown option 'prompts'; long-arrival takes: at, decoders"),
        ("poisson:input=9-3", "input must be a range"),
        ("poisson:input=a", "input must be a token count like 512 or a range like 100-1024"),
        ("chat:min_output=9,max_output=4", r"min_output \(9\) is above max_output \(4\)"),
        ("prefix-hit:cached=0.5/half", "cached must be different shares between 0 and 1"),
        ("prefix-hit:cached=1", "different shares between 0 and 1 like 0.9 or 0.5/0.9/0.99, got"),
        ("prefix-hit:cached=0.5/0.5", "cached must be different shares"),
        ("prefix-hit:prompt=4,cached=0.1", r"some of the 4 tokens .* comes to \[0\] tokens"),
        ("prefix-hit:prompt=4,cached=0.9", r"some of the 4 tokens .* comes to \[4\] tokens"),
        ("multi-turn:think=-1", "think must be a number of seconds, 0 or more, got '-1'"),
        ("multi-turn:think=inf", "think must be a number of seconds"),
        ("multi-turn:rate=3", "unknown option 'rate'; multi-turn takes: conversations, output"),
        ("multi-turn:questions.jsonl,system=3", "unknown option 'system'; multi-turn takes"),
        ("azure", "needs a file: azure:PATH"),
        ("azure:,num=3", "needs a file: azure:PATH"),
    ],
)
def test_bad_spec_is_refused_by_name(spec, message):
    with pytest.raises(ValueError, match=message):
        make_workload(spec, tokenizer=ByteTokenizer(), vocab_size=VOCAB)


# Workloads whose prompts begin alike --------------------------------------------------------------


def request(request_id, num_tokens=3, output_len=2, **fields):
    return WorkloadRequest(tuple(range(num_tokens)), output_len, 0.0, request_id, **fields)


def test_sha256_sees_who_follows_whom_and_what_it_continues_but_no_label():
    def with_last(**fields):
        return Workload("w", (request("a"), request("b"), request("c", **fields))).sha256

    digests = [with_last(), with_last(follows="a"), with_last(follows="b")]
    digests += [with_last(follows="b", history_len=5)]
    assert len(set(digests)) == 4
    assert with_last(group="turn 1") == with_last()
    renamed = Workload("w", (request("x"), request("y"), request("z", follows="x")))
    assert renamed.sha256 == with_last(follows="a")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"follows": "later"}, "r follows 'later', which is none of the requests before it"),
        ({"follows": "r"}, "r follows 'r', which is none of the requests before it"),
        ({"history_len": 5}, "r has history_len 5 and follows no request"),
        ({"follows": "a", "history_len": 4}, "history_len 4, but a has 5 tokens of prompt and"),
    ],
)
def test_request_that_cannot_follow_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Workload("w", (request("a"), request("r", **fields), request("later")))


def test_few_shot_requests_share_the_examples_and_nothing_else():
    workload = make_workload(
        "few-shot:examples=3,example=4-9,num=5,question=6-8,output=2-3", vocab_size=VOCAB
    )
    prompts = [r.prompt_token_ids for r in workload.requests]
    num_shared = sum(len(set(column)) == 1 for column in zip(*prompts, strict=False))
    assert 12 <= num_shared <= 27
    assert all(6 <= len(prompt) - num_shared <= 8 for prompt in prompts)
    assert len({prompt[num_shared] for prompt in prompts}) == 5
    assert {r.output_len for r in workload.requests} == {2, 3} and workload.arrives_at_once


def test_hit_shares_the_asked_part_of_the_cold_prompt_and_comes_when_it_is_done():
    workload = make_workload("prefix-hit:prompt=1000,cached=0.5/0.995,num=2", vocab_size=VOCAB)
    groups = [r.group for r in workload.requests]
    assert groups == ["cold", "hit 50%", "hit 99.5%"] * 2
    assert [r.follows for r in workload.requests] == [None, "r0", "r1", "r2", "r3", "r4"]
    cold, half, most, other_cold, *_ = (r.prompt_token_ids for r in workload.requests)
    assert cold[:500] == half[:500] and cold[500] != half[500]
    assert cold[:995] == most[:995] and cold[995] != most[995]
    assert (len(cold), len(half), len(most)) == (1000, 1000, 1000)
    assert cold[0] != other_cold[0]
    assert not any(r.history_len or r.arrival_s for r in workload.requests)
    assert (
        not workload.is_open_loop and workload.name == "prefix-hit-prompt1000-cached0.5-0.995-num2"
    )


def test_turns_of_a_conversation_follow_each_other_with_known_lengths():
    spec = "multi-turn:conversations=3,turns=3,system=10,question=4-6,output=2-5,think=0.25"
    workload = make_workload(spec, vocab_size=VOCAB)
    first, second, third = workload.requests[3:6]
    assert [r.request_id for r in (first, second, third)] == ["c1-turn1", "c1-turn2", "c1-turn3"]
    assert (second.follows, third.follows) == (first.request_id, second.request_id)
    assert [r.arrival_s for r in (first, second, third)] == [0.0, 0.25, 0.25]
    assert [r.group for r in (first, second, third)] == ["turn 1", "turn 2", "turn 3"]
    assert 14 <= first.num_prompt_tokens <= 16 and first.history_len == 0
    assert second.history_len == first.num_prompt_tokens + first.output_len
    assert third.num_prompt_tokens == second.num_tokens + len(third.prompt_token_ids)
    assert third.num_tokens == third.num_prompt_tokens + third.output_len
    assert workload.num_input_tokens == sum(r.num_prompt_tokens for r in workload.requests)
    starts = [r.prompt_token_ids for r in workload.requests if r.follows is None]
    assert len({start[:10] for start in starts}) == 1 and len({start[10] for start in starts}) == 3
    assert not workload.is_open_loop and not workload.arrives_at_once


def test_system_prompt_may_be_left_out_and_options_are_reported():
    spec = "multi-turn:conversations=2,turns=1,system=0,question=5,output=3"
    workload = make_workload(spec, vocab_size=VOCAB)
    assert prompt_lens(workload) == [5, 5] and workload.arrives_at_once
    assert workload.parameters == {
        "conversations": 2, "turns": 1, "system": 0, "question": "5", "output": "3",
        "think": 0.0, "seed": 0,
    }  # fmt: skip


def test_head_keeps_every_conversation_from_its_beginning():
    whole = make_workload("multi-turn:conversations=3,turns=4", vocab_size=VOCAB)
    for num_requests in range(1, 12):
        head = whole.head(num_requests)
        ids = [r.request_id for r in head.requests]
        assert all(r.follows is None or r.follows in ids for r in head.requests)
    assert make_workload("multi-turn:6,conversations=3,turns=4", vocab_size=VOCAB).sha256 == (
        whole.head(6).sha256
    )
    fewer = make_workload("multi-turn:conversations=2,turns=4", vocab_size=VOCAB)
    assert fewer.sha256 == whole.head(8).sha256


class ChatTokenizer(ByteTokenizer):
    """A template in the way of ChatML: 1 role content 2, and 3 opens an answer."""

    def apply_chat_template(self, messages):
        turns = [[1, *self.encode(m["role"][0] + m["content"]), 2] for m in messages]
        return [*(token for turn in turns for token in turn), 1, *self.encode("a")]


class ForgetfulTokenizer(ChatTokenizer):
    """A template that shows only the last message."""

    def apply_chat_template(self, messages):
        return super().apply_chat_template(messages[-1:])


class SilentTokenizer(ChatTokenizer):
    """A template that leaves out what the assistant said."""

    def apply_chat_template(self, messages):
        return super().apply_chat_template([m for m in messages if m["role"] == "user"])


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "a,b.jsonl"
    turns = [["How?", "And why?"], ["Once."], ["What?", "When?", "Who?"]]
    path.write_text("".join(json.dumps({"question_id": 1, "turns": t}) + "\n" for t in turns))
    return path


def test_real_questions_get_what_the_template_puts_between_an_answer_and_the_next(questions):
    workload = make_workload(f"multi-turn:{questions},output=4", tokenizer=ChatTokenizer())
    first, second, *_ = workload.requests
    assert bytes(first.prompt_token_ids) == b"\x01uHow?\x02\x01a"
    assert bytes(second.prompt_token_ids) == b"\x02\x01uAnd why?\x02\x01a"
    assert second.history_len == len(first.prompt_token_ids) + 4
    assert [r.request_id for r in workload.requests] == [
        "c0-turn1", "c0-turn2", "c1-turn1", "c1-turn2",
    ]  # fmt: skip
    assert workload.parameters["num_conversations_in_file"] == 3
    assert workload.parameters["num_conversations_too_short"] == 1
    assert workload.num_requests_before_cut is None


def test_first_conversations_of_a_file_are_a_stated_beginning(questions):
    spec = f"multi-turn:{questions},conversations=1,turns=2"
    workload = make_workload(spec, tokenizer=ChatTokenizer())
    assert (len(workload.requests), workload.num_requests_before_cut) == (2, 4)
    with pytest.raises(ValueError, match=r"1 of the 3 conversations of .* have 3 turns; ask for"):
        make_workload(f"multi-turn:{questions},conversations=2,turns=3", tokenizer=ChatTokenizer())


@pytest.mark.parametrize("tokenizer", [ForgetfulTokenizer(), SilentTokenizer(), ByteTokenizer()])
def test_template_that_does_not_append_to_a_conversation_is_refused(questions, tokenizer):
    with pytest.raises(ValueError, match="does not append to a conversation"):
        make_workload(f"multi-turn:{questions}", tokenizer=tokenizer)
