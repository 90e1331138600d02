"""Readers of published traces, on small synthetic files in their schemas."""

import gzip
import json

import pytest

from folovllm.workloads.traces import (
    Conversation,
    TraceRow,
    read_azure,
    read_mooncake,
    read_sharegpt,
    read_turns,
    select_rows,
    spread_arrivals,
)

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:15:48.0000000,12,0\r\n"
)


def write(path, text):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_bytes(text.encode())
    return path


def mooncake_line(**changes):
    row = {"timestamp": 3000, "input_length": 513, "output_length": 7, "hash_ids": [0, 4]}
    return json.dumps({**row, **changes}) + "\n"


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_azure_rows_arrive_relative_to_the_first_and_in_order(tmp_path, name):
    rows = read_azure(write(tmp_path / name, AZURE))
    assert [(row.input_len, row.output_len) for row in rows] == [(374, 44), (12, 0), (396, 109)]
    assert [row.arrival_s for row in rows] == pytest.approx([0.0, 1.31941, 4.314579])


@pytest.mark.parametrize(
    "line", ["yesterday,1,2", "2023-11-16 18:15:46,1", "2023-11-16 18:15:46,-1,2", "x"]
)
def test_malformed_azure_row_is_named_by_file_and_line(tmp_path, line):
    path = write(tmp_path / "bad.csv", AZURE + line + "\n")
    with pytest.raises(ValueError, match=r"bad\.csv, line 5: expected a timestamp") as error:
        read_azure(path)
    assert line in str(error.value)


def test_azure_file_with_other_columns_or_no_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: expected the header TIMESTAMP,ContextTokens"):
        read_azure(write(tmp_path / "other.csv", "a,b\n1,2\n"))
    with pytest.raises(ValueError, match="at least one row"):
        read_azure(write(tmp_path / "empty.csv", AZURE.splitlines()[0] + "\n"))


def test_missing_trace_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read trace .*nowhere\.csv"):
        read_azure(tmp_path / "nowhere.csv")


def test_broken_or_binary_file_is_named(tmp_path):
    truncated = tmp_path / "cut.csv.gz"
    truncated.write_bytes(gzip.compress(AZURE.encode())[:-9])
    with pytest.raises(ValueError, match=r"cannot read trace .*cut\.csv\.gz"):
        read_azure(truncated)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"cannot read trace .*binary\.jsonl"):
        read_mooncake(tmp_path / "binary.jsonl")


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_mooncake_rows_keep_their_hash_ids(tmp_path, name):
    text = mooncake_line() + "\n" + mooncake_line(timestamp=6000, input_length=5, hash_ids=[9])
    assert read_mooncake(write(tmp_path / name, text)) == [
        TraceRow(0.0, 513, 7, (0, 4)),
        TraceRow(3.0, 5, 7, (9,)),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{\n",
        "[1]\n",
        "{}\n",
        mooncake_line(hash_ids=[0]),
        mooncake_line(input_length="513"),
        mooncake_line(output_length=-1),
        mooncake_line(timestamp=None),
    ],
)
def test_malformed_mooncake_row_is_named_by_file_and_line(tmp_path, line):
    path = write(tmp_path / "bad.jsonl", mooncake_line() + line)
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: expected a JSON object with"):
        read_mooncake(path)


def test_empty_mooncake_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one JSON object"):
        read_mooncake(write(tmp_path / "empty.jsonl", "\n"))


def test_quantised_arrivals_are_spread_inside_their_slot_in_file_order():
    rows = [TraceRow(arrival, n, 1) for n, arrival in enumerate([0.0, 0.0, 3.0, 4.5])]
    spread = spread_arrivals(rows, 3.0, iter([0.9, 0.1, 0.5, 0.25]))
    assert [row.input_len for row in spread] == [0, 1, 2, 3]
    assert [row.arrival_s for row in spread] == pytest.approx([0.3, 2.7, 3.75, 4.5])


def test_selection_reports_every_row_that_it_leaves_out():
    lens = [(0, 1), (5, 0), (100, 1), (5, 100), (5, 2), (6, 2), (7, 2)]
    rows = [TraceRow(10.0 + i, *pair) for i, pair in enumerate(lens)]
    selection = select_rows(rows, num=2, max_input=50, max_output=50)
    assert [(row.arrival_s, row.input_len) for row in selection.rows] == [(0.0, 5), (1.0, 6)]
    assert selection.report == {
        "num_rows_in_file": 7,
        "num_dropped_empty": 2,
        "num_dropped_too_long": 2,
        "num_after_head": 1,
    }
    assert len(selection.rows) + sum(selection.report.values()) == 2 * len(rows)


def turns(*pairs):
    return {"conversations": [{"from": who, "value": text} for who, text in pairs]}


def test_sharegpt_takes_the_first_question_and_its_answer(tmp_path):
    entries = [
        turns(("system", "be kind"), ("human", "hi"), ("gpt", "hello"), ("human", "bye")),
        turns(
            ("gpt", "no question"),
        ),
        turns(
            ("human", "unanswered"),
        ),
        turns(("human", ""), ("gpt", "answer to nothing")),
        turns(),
    ]
    path = write(tmp_path / "share.json.gz", json.dumps(entries))
    assert read_sharegpt(path) == ([Conversation("hi", "hello")], 4)


@pytest.mark.parametrize("entry", [1, {}, {"conversations": 3}, turns(("human", None))])
def test_malformed_sharegpt_entry_is_named(tmp_path, entry):
    path = write(tmp_path / "bad.json", json.dumps([turns(("human", "a"), ("gpt", "b")), entry]))
    with pytest.raises(ValueError, match=r"bad\.json: expected in entry 1 an object"):
        read_sharegpt(path)


def test_sharegpt_file_that_is_no_json_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"broken\.json, line 2: expected a JSON list"):
        read_sharegpt(write(tmp_path / "broken.json", "[\n{]"))
    with pytest.raises(ValueError, match="expected a JSON list of conversations, got 'dict'"):
        read_sharegpt(write(tmp_path / "object.json", "{}"))


@pytest.mark.parametrize("name", ["questions.jsonl", "questions.jsonl.gz"])
def test_turns_of_mt_bench_questions_are_read_in_file_order(tmp_path, name):
    lines = [
        {"question_id": 9, "category": "writing", "turns": ["Ask.", "Ask again."]},
        {"question_id": 1, "category": "math", "turns": ["Once."]},
    ]
    path = write(tmp_path / name, "\n\n".join(json.dumps(line) for line in lines))
    assert read_turns(path) == [("Ask.", "Ask again."), ("Once.",)]


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"turns": "ask"}', '{"turns": []}', '{"turns": ["a", ""]}']
)
def test_malformed_question_is_named_by_file_and_line(tmp_path, line):
    path = write(tmp_path / "bad.jsonl", '{"turns": ["a"]}\n' + line)
    with pytest.raises(
        ValueError, match=r'bad\.jsonl, line 2: expected a JSON object with "turns"'
    ):
        read_turns(path)


def test_file_without_questions_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one JSON object"):
        read_turns(write(tmp_path / "empty.jsonl", "\n"))
