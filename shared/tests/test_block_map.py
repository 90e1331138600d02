"""The map of blocks over a run: what is sampled, and that the JSON gives back what went in."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

from folovllm.bench import block_map
from folovllm.bench.block_map import (
    CACHED,
    FREE,
    MAX_PACKED_BYTES,
    MAX_SAMPLES,
    SHARED,
    BlockMap,
    BlockMapRecorder,
    pack_block_map,
    unpack_block_map,
)


class TickingClock:
    """Every look at it takes a second."""

    def __init__(self):
        self.time = 0.0

    def now(self):
        self.time += 1.0
        return self.time


def record(steps):
    """A recorder that saw these block tables, one dict per step."""
    manager = SimpleNamespace(block_tables={})
    recorder = BlockMapRecorder(manager, TickingClock())
    for tables in steps:
        manager.block_tables = tables
        recorder.after_step()
    return recorder


def test_owners_free_and_shared_blocks_are_told_apart():
    steps = [{"a": [3, 0]}, {"a": [3, 0], "b": [3, 1]}, {"b": [3, 1]}, {}]
    sampled = record(steps).block_map(5, ["a", "b", "never ran"])
    assert sampled.steps == [0, 1, 2, 3]
    assert sampled.owners.tolist() == [
        [0, 0, FREE, FREE],
        [FREE, 1, 1, FREE],
        [FREE, FREE, FREE, FREE],
        [0, SHARED, 1, FREE],
        [FREE, FREE, FREE, FREE],
    ]
    assert sampled.sampling_s == 4.0


def test_table_that_grows_after_a_sample_does_not_change_it():
    table = [0]
    recorder = record([{"a": table}])
    table.append(1)
    assert recorder.block_map(2, ["a"]).owners.tolist() == [[0], [FREE]]


def test_cached_block_that_nobody_holds_is_neither_free_nor_owned():
    cache = SimpleNamespace(idle={3: None, 1: None})
    manager = SimpleNamespace(block_tables={"a": [0]}, prefix_cache=cache)
    recorder = BlockMapRecorder(manager, TickingClock())
    recorder.after_step()
    del cache.idle[3]
    manager.block_tables = {"a": [0, 3]}
    recorder.after_step()
    sampled = recorder.block_map(4, ["a"])
    assert sampled.owners.tolist() == [[0, 0], [CACHED, CACHED], [FREE, FREE], [CACHED, 0]]
    assert unpack_block_map(pack_block_map(sampled)).owners.tolist() == sampled.owners.tolist()


@pytest.mark.parametrize("num_steps", [1, MAX_SAMPLES, MAX_SAMPLES + 1, 5 * MAX_SAMPLES + 3])
def test_samples_stay_few_and_evenly_spaced(num_steps):
    steps = record([{"a": [0]}] * num_steps).block_map(1, ["a"]).steps
    stride = steps[1] - steps[0] if len(steps) > 1 else 1
    assert steps == list(range(0, num_steps, stride))
    assert len(steps) <= MAX_SAMPLES and (stride == 1 or len(steps) >= MAX_SAMPLES // 2)


def test_large_pool_is_thinned_out_and_says_so(monkeypatch):
    monkeypatch.setattr(block_map, "MAX_ROWS", 4)
    sampled = record([{"a": [0, 1, 2, 8]}]).block_map(9, ["a"])
    assert (sampled.num_blocks, sampled.block_stride) == (9, 3)
    assert sampled.owners.tolist() == [[0], [FREE], [FREE]]


def test_packed_map_survives_json_and_is_read_back_as_it_was():
    sampled = record([{"a": [3, 0]}, {"b": [1]}, {}]).block_map(4, ["a", "b"])
    read = unpack_block_map(json.loads(json.dumps(pack_block_map(sampled))))
    np.testing.assert_array_equal(read.owners, sampled.owners)
    assert read.steps == sampled.steps and read.request_ids == sampled.request_ids
    assert (read.num_blocks, read.block_stride, read.sampling_s) == (4, 1, 3.0)


def test_map_that_does_not_compress_loses_samples_and_not_the_limit():
    rng = random.Random(0)
    noise = [[rng.randrange(30_000) for _ in range(100)] for _ in range(4000)]
    packed = pack_block_map(
        BlockMap(
            num_blocks=4000,
            block_stride=1,
            steps=list(range(100)),
            request_ids=[],
            sampling_s=0.0,
            owners=np.array(noise, dtype=np.int32),
        )
    )
    assert len(packed["owners"]) <= MAX_PACKED_BYTES
    kept = packed["steps"]
    assert 1 < len(kept) < 100
    assert unpack_block_map(packed).owners.tolist() == [
        [row[step] for step in kept] for row in noise
    ]


def test_map_in_another_encoding_is_refused():
    packed = pack_block_map(record([{"a": [0]}]).block_map(1, ["a"]))
    with pytest.raises(ValueError, match="block map with encoding 'gzip'"):
        unpack_block_map({**packed, "encoding": "gzip"})
