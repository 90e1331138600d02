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
    "spec", ["fixed:batch=3,input=9,output=4", "poisson:rate=2,num=5", "shared-prefix:6", "chat:9"]
)
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


@pytest.mark.parametrize("kind", ["chat", "sharegpt:x.json"])
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
        ("nanoo", "unknown workload 'nanoo'; there are azure, chat, fixed"),
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
        ("azure", "needs a file: azure:PATH"),
        ("azure:,num=3", "needs a file: azure:PATH"),
    ],
)
def test_bad_spec_is_refused_by_name(spec, message):
    with pytest.raises(ValueError, match=message):
        make_workload(spec, tokenizer=ByteTokenizer(), vocab_size=VOCAB)
