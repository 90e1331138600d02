"""Which of several engines gets a call: without Ray, and without engines."""

import json
import sys
from collections import Counter

import pytest

from folovllm.cli.main import main
from folovllm.entrypoints.server.replica_settings import ReplicaSettings
from folovllm.testing.served_llm import ServedLLM

pytest.importorskip("msgspec", reason="the extra `serve` is not installed")
from folovllm.entrypoints.server.metrics import EngineMetrics
from folovllm.entrypoints.server.replicas.merged_metrics import merge_metrics
from folovllm.entrypoints.server.replicas.prefix_routing import (
    MAX_PIECES,
    PIECE_BYTES,
    Placement,
    PrefixPolicy,
    prefix_pieces,
)


def pieces(**body):
    return prefix_pieces(json.dumps(body).encode())


QUESTION = [{"role": "user", "content": "Why is the sky blue? " * 20}]
ANSWER = [
    {"role": "assistant", "content": "Because of Rayleigh."},
    {"role": "user", "content": "?"},
]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"messages": QUESTION}, {"messages": QUESTION + ANSWER}),
        ({"prompt": "word " * 100}, {"prompt": "word " * 100 + "and more " * 20}),
        ({"prompt": [*range(100)]}, {"prompt": [*range(150)]}),
        ({"prompt": ["word " * 100]}, {"prompt": ["word " * 100, "another"]}),
    ],
)
def test_a_longer_prompt_has_the_pieces_of_its_beginning(first, second):
    one, other = pieces(**first), pieces(**second)
    assert len(one) > 3 and other[: len(one)] == one
    assert len(set(other)) == len(other)
    assert pieces(**first, max_tokens=5, stream=True, temperature=0.5) == one


def test_pieces_name_all_that_is_before_them():
    plain = {"messages": QUESTION}
    for change in (
        {"cache_salt": "a"},
        {"tools": [{"type": "function"}]},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [{"role": "system", "content": "x"}, *QUESTION]},
    ):
        assert not set(pieces(**plain)) & set(pieces(**plain | change))


def test_what_is_no_prompt_has_no_pieces():
    for body in (b"", b"[", b"[" * 5000, b"5", b"{}", b'{"prompt": "short"}', b'{"prompt": 1}'):
        assert prefix_pieces(body) == []
    assert len(pieces(prompt="a" * PIECE_BYTES * 2 * MAX_PIECES)) == MAX_PIECES


def send(policy, names, engines):
    """A call whose prompt has these pieces; where it went."""
    call = Placement([name.encode() for name in names])
    ranked = policy.place(call, engines)
    assert sorted(ranked) == sorted(engines) and call.engine == ranked[0]
    return call


ENGINES = ["a", "b", "c"]


def test_prompts_that_begin_alike_go_to_one_engine_and_others_are_spread():
    policy = PrefixPolicy(max_load_gap=8)
    firsts = {name: send(policy, [name, name * 2], ENGINES) for name in "xyz"}
    assert sorted(call.engine for call in firsts.values()) == ENGINES
    for call in firsts.values():
        call.is_over = True
    for name in "zzxyxz":
        call = send(policy, [name, name * 2, name * 3], ENGINES)
        assert call.engine == firsts[name].engine
        call.is_over = True


def test_longest_beginning_decides():
    policy = PrefixPolicy(max_load_gap=8)
    assert send(policy, ["s", "x"], ENGINES).engine == "a"
    assert send(policy, ["t"], ENGINES).engine == "b"
    assert send(policy, ["s", "y", "z"], ["b"]).engine == "b"
    assert send(policy, ["s", "y", "q"], ENGINES).engine == "b"
    assert send(policy, ["s", "x", "q"], ENGINES).engine == "a"


def test_engine_with_too_many_calls_gets_no_more_until_one_is_over():
    policy = PrefixPolicy(max_load_gap=2)
    calls = [send(policy, ["x"], ENGINES) for _ in range(3)]
    assert [call.engine for call in calls] == ["a"] * 3
    assert send(policy, ["x"], ENGINES).engine == "b"
    calls[0].is_over = True
    assert send(policy, ["x"], ENGINES).engine == "b"  # which has it now, and fewer calls
    for call in calls:
        call.is_over = True
    assert send(policy, ["x"], ENGINES).engine == "a"


def test_what_all_prompts_share_does_not_gather_them_and_many_calls_may_be_uneven():
    policy = PrefixPolicy(max_load_gap=2)
    calls = [send(policy, ["system", str(number)], ["a", "b"]) for number in range(40)]
    engines = Counter(call.engine for call in calls)
    assert engines == {"a": 20, "b": 20}
    assert calls[0].engine == "a"
    for call in [call for call in calls if call.engine == "b"][:7]:
        call.is_over = True
    names = ["system", "0", "next"]  # a has 20 calls beside 13, and may have 1.5 * 13 + 2
    assert [send(policy, names, ["a", "b"]).engine for _ in range(3)] == ["a", "a", "b"]


def test_without_prefix_the_load_decides_and_then_what_is_remembered():
    policy = PrefixPolicy(max_load_gap=0)
    for _ in range(2):
        assert sorted(send(policy, [], ENGINES).engine for _ in ENGINES) == ENGINES
    policy = PrefixPolicy(max_load_gap=8)
    sent = []
    for name in "xyz":
        sent.append(send(policy, [name], ENGINES))
        sent[-1].is_over = True
    assert sorted(call.engine for call in sent) == ENGINES


def test_engine_that_is_gone_is_forgotten():
    policy = PrefixPolicy(max_load_gap=8)
    assert send(policy, ["x"], ENGINES).engine == "a"
    policy.keep_only(["b", "c"])
    assert send(policy, ["x"], ["b", "c", "d"]).engine == "b"
    assert send(policy, ["x"], ["a", "b"]).engine == "b"  # one of that name would be another


def test_memory_is_bounded_and_keeps_beginnings():
    policy = PrefixPolicy(max_load_gap=0, max_remembered=4)
    send(policy, ["1", "2", "3"], ["a"]).is_over = True
    send(policy, ["x", "y"], ["a"]).is_over = True
    send(policy, ["1", "2", "3"], ["b"]).is_over = True
    for names, engine in (("123", "b"), ("xy", "a"), ("12", "b")):  # which remembers less than a
        call = send(policy, names, ["a", "b"])
        assert call.engine == engine
        call.is_over = True


def test_calls_without_a_prompt_go_to_one_engine_and_count_for_nothing():
    policy = PrefixPolicy(max_load_gap=0)
    for _ in range(3):
        assert policy.place(Placement(None), ["b", "a", "c"]) == ENGINES
    assert send(policy, [], ENGINES).engine == "a"


def test_metrics_of_all_engines_are_one_text():
    texts = []
    for engine in ("0", "1"):
        metrics = EngineMetrics("toy", engine)
        metrics.on_idle()
        texts.append(metrics.text().decode())
    merged = merge_metrics(texts).decode()
    assert merged.count("# TYPE vllm:num_requests_running gauge") == 1
    for engine in ("0", "1"):
        assert f'vllm:num_requests_running{{engine="{engine}",model_name="toy"}} 0.0' in merged
        assert f'vllm:generation_tokens_total{{engine="{engine}",model_name="toy"}} 0.0' in merged
    lines = {line for text in texts for line in text.splitlines()}
    assert lines == set(merged.splitlines())
    assert merge_metrics([]) == b""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicas": 0}, "replicas"),
        ({"routing": "prefix"}, "routing has no effect with one"),
        ({"max_load_gap": 0}, "max_load_gap has no effect with one"),
        ({"ray_address": "auto"}, "ray_address has no effect with one"),
        ({"replicas": 2, "routing": "random"}, "prefix, round-robin"),
        ({"replicas": 2, "max_load_gap": -1}, "max_load_gap"),
        ({"replicas": 2, "ray_address": "ray://head:10001"}, "auto or HOST:PORT"),
        ({"replicas": 2, "routing": "round-robin", "max_load_gap": 1}, "no effect with round"),
    ],
)
def test_settings_that_cannot_work_or_would_do_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReplicaSettings(**settings)


def test_missing_ray_is_named(monkeypatch, capsys):
    pytest.importorskip("uvicorn")
    # Whoever has it already would find it.
    users = ("ray.", "folovllm.entrypoints.server.replicas.")
    for name in [name for name in sys.modules if f"{name}.".startswith(users)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(ServedLLM, ["serve", "--model", "x", "--replicas", "2"]) == 2
    error = capsys.readouterr().err
    assert "folovllm[serve,ray]" in error and "'ray'" in error
