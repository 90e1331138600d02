"""Replays of small traces, and the trie as text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from m6_prefix.config import EngineConfig
from m6_prefix.prefix_cache import PrefixCache
from m6_prefix.replay import Replay, TraceSource, main, make_config, make_source, num_kv_tokens
from m6_prefix.tests.test_prefix_cache import insert
from m6_prefix.trie_text import trie_text

ROWS = [  # input_length, hash_ids
    (1024, [1, 2]),
    (1200, [1, 2, 3]),
    (600, [4, 5]),
    (1200, [1, 2, 3]),
    (1536, [1, 6, 2]),
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        "\n".join(
            json.dumps(
                {"timestamp": 0, "input_length": n, "output_length": 9, "hash_ids": hash_ids}
            )
            for n, hash_ids in ROWS
        )
    )
    return path


def report_of(trace: Path, tmp_path: Path, *options: str) -> dict:
    output = tmp_path / "report.json"
    assert main([f"mooncake:{trace}", "--output", str(output), *options]) == 0
    return json.loads(output.read_text())


def test_equal_hash_ids_are_equal_blocks(trace, tmp_path, capsys) -> None:
    report = report_of(trace, tmp_path, "--block-size", "512")
    assert report["num_prompt_tokens"] == sum(n for n, _ in ROWS)
    assert report["num_found_tokens"] == 0 + 1024 + 0 + 1199 + 512
    # The fourth prompt is found whole, but for the token that is left to compute.
    assert (report["num_found_blocks"], report["num_prompt_blocks"]) == (6, 13)
    assert report["hit_rate_blocks"] == 6 / 13
    assert report["num_evicted_blocks"] == 0
    assert report["num_requests"] == 5
    assert "hit_rate_tokens" in capsys.readouterr().out


def test_smaller_blocks_find_more_and_a_small_cache_finds_less(trace, tmp_path) -> None:
    small = report_of(trace, tmp_path, "--block-size", "16")
    assert small["num_found_tokens"] == 1024 + 1199 + 512
    tight = report_of(trace, tmp_path, "--block-size", "512", "--kv-cache-tokens", "2.1k")
    assert tight["num_blocks"] == 4
    assert tight["num_evicted_blocks"] > 0


def test_head_of_a_trace_can_be_replayed_with_longer_answers(trace, tmp_path) -> None:
    report = report_of(trace, tmp_path, "--num", "2", "--output-tokens", "5", "--max-num-seqs", "2")
    assert report["num_requests"] == 2
    assert report["num_prompt_tokens"] == 2224


def test_cache_that_cannot_hold_the_longest_request_is_refused(trace, capsys) -> None:
    assert main([f"mooncake:{trace}", "--kv-cache-tokens", "1k"]) == 2
    assert "cannot hold the longest request, which has 1537" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "hit_rate"),
    [
        ("fixed:batch=3,input=40,output=4", 0.0),
        ("shared-prefix:groups=1,num=5,prefix=64,suffix=8,output=4", 4 * 64 / (5 * 72)),
        ("multi-turn:conversations=2,turns=3,system=0,question=8,output=8", 2 * (15 + 31) / 144),
        ("prefix-hit:prompt=100,cached=0.5,num=2,output=4", 0.25),
    ],
)
def test_any_workload_can_be_replayed(spec, hit_rate) -> None:
    source = make_source(spec, None, 1)
    config = make_config(source, block_size=8, max_num_seqs=1)
    replay = Replay(config, num_kv_tokens("inf", source, 8))
    for _ in replay.steps(source):
        pass
    # A token that is the same by chance, and copied for, is found as well.
    assert replay.report()["hit_rate_tokens"] == pytest.approx(hit_rate, abs=0.04)


def test_time_is_told_for_every_thousand_requests() -> None:
    replay = Replay(EngineConfig(max_model_len=16, max_num_batched_tokens=256), 160)
    replay.finish_times_s = [0.001 * number for number in range(1, 2501)]
    replay.counts.update(num_prompt_tokens=1, num_prompt_blocks=1)
    assert replay.report()["us_per_request_by_thousand"] == [1000, 1000, 1000]


def test_trace_is_replayed_where_torch_is_not_installed(trace) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"from m6_prefix.replay import main; main(['mooncake:{trace}'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_prompts_of_a_trace_are_made_one_by_one(trace) -> None:
    source = make_source(f"mooncake:{trace}", None, 1)
    assert isinstance(source, TraceSource)
    assert [len(source.take()) for _ in ROWS] == [1] * 5
    assert not source


def test_trie_is_drawn_with_prefixes_holders_and_salts() -> None:
    cache = PrefixCache(block_size=2)
    insert(cache, [1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3])
    insert(cache, [1, 2, 3, 4, 9, 9], [0, 1, 4])
    insert(cache, [1, 2], [5], salt="mine")
    assert trie_text(cache, [2, 2, 1, 0, 0, 1]).splitlines() == [
        "no salt",
        "  [0] 1 2  held by 2",
        "  [1] 3 4  held by 2",
        "  + [2] 5 6  held by 1",
        "  |   [3] 7 8  idle",
        "  + [4] 9 9  idle",
        "salt 'mine'",
        "  [5] 1 2  held by 1",
    ]
    wide = PrefixCache(block_size=16)
    insert(wide, list(range(16)), [0])
    assert trie_text(wide, [0]).splitlines()[1] == "  [0] 0 1 2 3 … 15  idle"
    assert trie_text(PrefixCache(block_size=2), []) == ""


def test_drawing_shows_who_runs(capsys) -> None:
    spec = "shared-prefix:groups=1,num=2,prefix=32,suffix=32,output=2"
    assert main([spec, "--draw", "--max-num-seqs", "2"]) == 0
    assert "held by" in capsys.readouterr().out
