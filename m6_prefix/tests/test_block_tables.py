"""Block tables on the device: what is copied when, and that they are always the manager's."""

import contextlib
import random
from itertools import count

import numpy as np
import pytest
import torch

from folovllm.request import Request, RequestStatus, SamplingParams
from folovllm.testing.driver import drain, make_requests, random_prompts
from folovllm.testing.engine_contract import toy_model
from folovllm.testing.line_interrupts import LineInterrupt
from m6_prefix import block_tables
from m6_prefix.block_tables import BlockTables, LastBlocks
from m6_prefix.config import PreemptionMode
from m6_prefix.kv_cache_manager import CopyKind
from m6_prefix.scheduler import ScheduledRequest
from m6_prefix.tests.test_preemption import GREEDY, RANDOM, forks, make_engine

__all__ = ["toy_model"]


class CountedTables(BlockTables):
    """Remembers which requests were copied whole, step by step."""

    def __init__(self, num_rows: int, num_columns: int = 4) -> None:
        super().__init__(num_rows, num_columns, torch.device("cpu"))
        self.copied: list[list[str]] = []

    def _copy(self, stale) -> None:
        self.copied.append([s.request.request_id for s in stale])
        super()._copy(stale)


def share(request_id: str, table: list[int], num_tokens: int = 1) -> ScheduledRequest:
    """A running request's part of a step."""
    (request,) = make_requests([[1]], SamplingParams(max_tokens=1), ids=[request_id])
    request.status = RequestStatus.RUNNING
    return ScheduledRequest(request, num_tokens, table)


def assign(tables: BlockTables, scheduled: list[ScheduledRequest]) -> LastBlocks:
    """The step ends in the last block of everybody's table."""
    return tables.assign(scheduled, np.array([len(s.block_table) - 1 for s in scheduled]))


def rows_of(tables: BlockTables, scheduled: list[ScheduledRequest]) -> np.ndarray:
    return assign(tables, scheduled).rows


def check_rows(tables: BlockTables, rows: np.ndarray, scheduled: list[ScheduledRequest]) -> None:
    """Everybody has a row of its own that says the same on both sides."""
    assert rows.dtype == np.int64
    assert len(set(rows.tolist())) == len(scheduled)
    assert tables.padding_row not in rows
    for row, s in zip(rows.tolist(), scheduled, strict=True):
        assert tables.host[row, : len(s.block_table)].tolist() == list(s.block_table)
        assert tables.device[row, : len(s.block_table)].tolist() == list(s.block_table)


def test_new_requests_get_rows_that_agree_on_host_and_device() -> None:
    tables = CountedTables(num_rows=3)
    scheduled = [share("a", [7, 2, 5], 9), share("b", [3], 1)]
    rows = rows_of(tables, scheduled)
    check_rows(tables, rows, scheduled)
    assert tables.copied == [["a", "b"]]
    assert tables.device.dtype == torch.int32
    assert tables.device.shape == (4, 4)
    assert not tables.device[tables.padding_row].any()


def test_interrupt_at_any_line_costs_no_row() -> None:
    for line_number in count(1):
        tables = BlockTables(2, num_columns=4, device=torch.device("cpu"))
        left = [share("a", [0, 1]), share("b", [2])]
        assign(tables, left)
        for s in left:
            s.request.status = RequestStatus.FINISHED
        c, d = share("c", [3]), share("d", [4, 5])
        interrupt = LineInterrupt([block_tables.__file__], line_number)
        with contextlib.suppress(KeyboardInterrupt), interrupt:
            assign(tables, [c, d])
        # The step is done again, with new lists; then c goes on and somebody else comes.
        for names in ("cd", "ce"):
            d.request.status = RequestStatus.FINISHED
            scheduled = [c._replace(block_table=[6]), share(names[1], [7, 8])]
            check_rows(tables, rows_of(tables, scheduled), scheduled)
            scheduled[1].request.status = RequestStatus.FINISHED
        if not interrupt.has_fired:
            break


def test_row_follows_the_request_and_not_its_place_in_the_batch() -> None:
    tables = CountedTables(num_rows=3)
    a, b, c = share("a", [0]), share("b", [1]), share("c", [2])
    row_a, row_b, row_c = rows_of(tables, [a, b, c])
    assert rows_of(tables, [c, a]).tolist() == [row_c, row_a]
    assert rows_of(tables, [b]).tolist() == [row_b]
    assert len(tables.copied) == 1


def test_single_token_of_a_known_request_copies_nothing() -> None:
    tables = CountedTables(num_rows=2)
    table = [7, 2]
    (row,) = rows_of(tables, [share("a", table, 8)])
    table.append(5)  # as the manager grows it, and copy on write replaces its last entry
    assert rows_of(tables, [share("a", table)]).tolist() == [row]
    table[-1] = 6
    rows_of(tables, [share("a", table)])
    assert tables.copied == [["a"]]
    # To the device that entry travels with the step.
    assert tables.device[row].tolist() == [7, 2, 0, 0]
    assert tables.host[row].tolist() == [7, 2, 6, 0]


def test_several_tokens_of_a_known_request_copy_its_row() -> None:
    tables = CountedTables(num_rows=2)
    table = [7]
    rows_of(tables, [share("a", table, 3), share("b", [1])])
    table += [2, 5]
    scheduled = [share("a", table, 6)]
    check_rows(tables, rows_of(tables, scheduled), scheduled)
    assert tables.copied == [["a", "b"], ["a"]]


def test_table_that_is_another_list_is_copied_whole_even_if_it_is_equal() -> None:
    """Swapped or forked: that the blocks happen to be the same could not be known cheaply."""
    tables = CountedTables(num_rows=2)
    table, other = [7, 2], share("b", [1])
    (row, _) = rows_of(tables, [share("a", table), other])
    for replaced in ([4, 9], [4, 9], [4, 9, 3]):
        scheduled = [share("a", replaced), other]
        rows = rows_of(tables, scheduled)
        assert rows[0] == row
        check_rows(tables, rows, scheduled)
    assert tables.copied == [["a", "b"], ["a"], ["a"], ["a"]]


LEFT = [RequestStatus.FINISHED, RequestStatus.SWAPPED, RequestStatus.WAITING]


def test_shorter_table_in_a_reused_row_leaves_only_its_own_entries_valid() -> None:
    tables = CountedTables(num_rows=1)
    gone = share("gone", [7, 2, 5, 8], 16)
    rows_of(tables, [gone])
    gone.request.status = RequestStatus.FINISHED
    scheduled = [share("new", [4], 2)]
    check_rows(tables, rows_of(tables, scheduled), scheduled)


@pytest.mark.parametrize("status", LEFT)
def test_rows_of_requests_that_do_not_run_are_reused_when_rows_run_out(status) -> None:
    tables = CountedTables(num_rows=3)
    kept, gone = share("kept", [0]), share("gone", [1])
    (row, gone_row) = rows_of(tables, [kept, gone])
    gone.request.status = status
    rows_of(tables, [kept, share("third", [5])])
    assert tables.copies.keys() == {"kept", "gone", "third"}, "nobody needed the row"
    scheduled = [kept, share("new", [2])]
    rows = rows_of(tables, scheduled)
    assert rows.tolist() == [row, gone_row]
    check_rows(tables, rows, scheduled)
    assert tables.copies.keys() == {"kept", "third", "new"}
    assert tables.copied == [["kept", "gone"], ["third"], ["new"]]


@pytest.mark.parametrize("status", LEFT)
def test_request_that_ran_before_is_copied_when_it_is_back(status) -> None:
    """Its table is another list by then, whether it lost its row in between or not."""
    for others in ([], [share("other", [9])]):
        tables = CountedTables(num_rows=1)
        first = share("back", [3, 4], 5)
        rows_of(tables, [first])
        first.request.status = status
        for other in others:
            rows_of(tables, [other])
            other.request.status = RequestStatus.FINISHED
        scheduled = [share("back", [6, 1])]
        check_rows(tables, rows_of(tables, scheduled), scheduled)
        assert tables.copied[-1] == ["back"]


def test_running_request_keeps_its_row_through_steps_without_it() -> None:
    """A step of prompts alone does not name those that only decode."""
    tables = CountedTables(num_rows=2)
    decoding, gone = share("decoding", [3]), share("gone", [1])
    (row, _) = rows_of(tables, [decoding, gone])
    gone.request.status = RequestStatus.FINISHED
    prompt = share("new", [2], 2)
    rows_of(tables, [prompt])
    assert tables.copied[1:] == [["new"]]
    scheduled = [decoding, ScheduledRequest(prompt.request, 1, prompt.block_table)]
    rows = rows_of(tables, scheduled)
    assert rows[0] == row
    check_rows(tables, rows, scheduled)
    assert len(tables.copied) == 2


def test_id_that_is_used_again_gets_the_new_requests_table() -> None:
    tables = CountedTables(num_rows=3)
    first = share("a", [7, 2], 5)
    (row,) = rows_of(tables, [first])
    first.request.status = RequestStatus.FINISHED
    scheduled = [share("a", [8])]
    rows = rows_of(tables, scheduled)
    assert rows.tolist() == [row]
    check_rows(tables, rows, scheduled)


def test_id_that_is_used_again_just_when_rows_run_out() -> None:
    """The row of the id's first request is given away, and its heir gets a row as well."""
    tables = CountedTables(num_rows=2)
    first, other = share("a", [7]), share("other", [1])
    rows_of(tables, [first, other])
    for gone in (first, other):
        gone.request.status = RequestStatus.FINISHED
    scheduled = [share("a", [8, 3], 7), share("new", [5])]
    check_rows(tables, rows_of(tables, scheduled), scheduled)
    assert tables.copies["a"].request is scheduled[0].request


def test_more_requests_over_time_than_rows() -> None:
    rng = random.Random(0)
    tables = CountedTables(num_rows=5, num_columns=6)
    running: dict[str, ScheduledRequest] = {}
    for step in range(300):
        for request_id in rng.sample(sorted(running), rng.randint(0, len(running))):
            running.pop(request_id).request.status = RequestStatus.FINISHED
        while len(running) < 5 and rng.random() < 0.7:
            name = f"{step}-{len(running)}"
            blocks = [rng.randrange(100) for _ in range(rng.randint(1, 6))]
            running[name] = share(name, blocks, rng.choice([1, len(blocks)]))
        scheduled = rng.sample(list(running.values()), len(running))[: rng.randint(0, 5)]
        if scheduled:
            check_rows(tables, rows_of(tables, scheduled), scheduled)
        used_rows = [copy.row for copy in tables.copies.values()]
        assert sorted(used_rows + tables.free_rows) == list(range(5))


@pytest.mark.parametrize("seed", range(12))
def test_attention_sees_the_managers_tables_whatever_happens(toy_model, monkeypatch, seed) -> None:
    """Forks, copy on write, both ways of preemption and requests that come and go."""
    rng = random.Random(seed)
    mode = list(PreemptionMode)[seed % 2]
    engine = make_engine(
        toy_model, rng.randint(17, 24), max_num_seqs=4, preemption_mode=mode, enforce_eager=True
    )
    runner, manager = engine.model_runner, engine.kv_cache_manager
    seen_kinds: set[CopyKind] = set()
    num_checks = 0
    launch, attend = runner.launch, runner.attention.forward
    scheduled: tuple[ScheduledRequest, ...] = ()

    def launch_and_note(scheduler_output):
        nonlocal scheduled
        scheduled = scheduler_output.scheduled
        seen_kinds.update(copy.kind for copy in scheduler_output.block_copies)
        return launch(scheduler_output)

    def attend_and_check(metadata, *args):
        nonlocal num_checks
        for s, row in zip(scheduled, metadata.block_tables.tolist(), strict=True):
            table = manager.block_tables[s.request.request_id]
            assert row[: len(table)] == table
            num_checks += 1
        return attend(metadata, *args)

    monkeypatch.setattr(runner, "launch", launch_and_note)
    monkeypatch.setattr(runner.attention, "forward", attend_and_check)
    requests: list[Request] = []
    for index, prompt in enumerate(random_prompts(seed=seed, count=4, vocab_size=199, max_len=20)):
        for request in forks(prompt, 2, rng.choice([GREEDY, RANDOM])):
            request.request_id = f"{index}-{request.request_id}"
            requests.append(request)
    drain(engine, requests[:4], later={5: requests[4:6], 30: requests[6:]})
    assert num_checks > 100
    assert CopyKind.COPY_ON_WRITE in seen_kinds
    if mode is PreemptionMode.SWAP:
        assert seen_kinds == set(CopyKind)
