"""How a step's requests become arrays: exact values for small examples."""

import numpy as np
import torch

from folovllm.request import SamplingParams
from folovllm.testing.driver import make_requests
from m6_prefix.block_tables import BlockTables
from m6_prefix.input_batch import HostBatch, InputBatch, empty_batch, gather_batch, paddings
from m6_prefix.scheduler import ScheduledRequest

COLUMNS = [
    "input_ids",
    "positions",
    "slot_mapping",
    "table_rows",
    "table_entries",
    "last_block_ids",
    "seq_lens",
    "cu_seqlens_q",
]
"""In the order in which they are uploaded."""


def gather(tables: BlockTables, *shares: tuple[list[int], int, list[int]]) -> HostBatch:
    """shares: (all tokens, how many of them are computed, block table) per request."""
    requests = make_requests([tokens for tokens, _, _ in shares], SamplingParams(max_tokens=1))
    scheduled = []
    for request, (tokens, num_computed, table) in zip(requests, shares, strict=True):
        request.num_computed_tokens = num_computed
        scheduled.append(ScheduledRequest(request, len(tokens) - num_computed, table))
    return gather_batch(scheduled, tables, block_size=4)


def make_tables(num_rows: int = 2, num_columns: int = 3) -> BlockTables:
    tables = BlockTables(num_rows, num_columns, torch.device("cpu"))
    tables.free_rows.reverse()  # rows in the order of arrival: numbers that are easy to read
    return tables


def values(batch: HostBatch) -> dict[str, list[int]]:
    for name, column, like in zip(COLUMNS, batch.columns, empty_batch().columns, strict=True):
        assert column is getattr(batch, name)
        assert column.dtype == like.dtype == (np.int64 if name in COLUMNS[:5] else np.int32), name
    return {name: getattr(batch, name).tolist() for name in COLUMNS}


def test_prompt_and_single_token_of_the_worked_example() -> None:
    """Three tokens of a prompt, and the seventh of a sequence; see AttentionMetadata."""
    tables = make_tables()
    batch = gather(tables, ([11, 12, 13], 0, [7]), ([21, 22, 23, 24, 25, 26, 27], 6, [3, 2]))
    assert values(batch) == {
        "input_ids": [11, 12, 13, 27],
        "positions": [0, 1, 2, 6],
        "slot_mapping": [28, 29, 30, 10],
        "table_rows": [0, 1],
        "table_entries": [0, 4],  # row * 3 columns + the column of the last block
        "last_block_ids": [7, 2],
        "seq_lens": [3, 7],
        "cu_seqlens_q": [0, 3, 4],
    }
    assert tables.host.tolist() == [[7, 0, 0], [3, 2, 0], [0, 0, 0]]
    assert (batch.min_query_len, batch.max_query_len, batch.max_seq_len) == (1, 3, 7)


def test_single_tokens_write_the_entry_of_their_last_block_on_the_host() -> None:
    tables = make_tables()
    table = [5]
    gather(tables, ([1, 2, 3, 4], 0, table))
    table.append(8)
    batch = gather(tables, ([1, 2, 3, 4, 9], 4, table))
    assert values(batch) == {
        "input_ids": [9],
        "positions": [4],
        "slot_mapping": [32],
        "table_rows": [0],
        "table_entries": [1],
        "last_block_ids": [8],
        "seq_lens": [5],
        "cu_seqlens_q": [0, 1],
    }
    assert tables.host[0].tolist() == [5, 8, 0]
    assert tables.device[0].tolist() == [5, 0, 0]
    tables.device.view(-1)[torch.from_numpy(batch.table_entries)] = torch.tensor(
        batch.last_block_ids
    )
    assert tables.device[0].tolist() == [5, 8, 0]


def test_several_tokens_behind_a_cached_prefix_cross_blocks() -> None:
    batch = gather(make_tables(), (list(range(10, 21)), 3, [2, 0, 9]))
    assert batch.input_ids.tolist() == list(range(13, 21))
    assert batch.positions.tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
    assert batch.slot_mapping.tolist() == [11, 0, 1, 2, 3, 36, 37, 38]
    assert batch.table_entries.tolist() == [2]
    assert batch.cu_seqlens_q.tolist() == [0, 8]


def test_request_may_fill_the_last_column() -> None:
    batch = gather(make_tables(), (list(range(12)), 11, [2, 0, 9]))
    assert batch.slot_mapping.tolist() == [39]
    assert batch.table_entries.tolist() == [2]


def test_worked_example_of_the_docstring() -> None:
    tables = make_tables(num_rows=6, num_columns=8)
    tables.free_rows = [0, 1, 3, 4, 2, 5]
    batch = gather(tables, ([11, 12, 13], 0, [7]), ([21, 22, 23, 24, 25, 26, 27], 6, [3, 2]))
    assert batch.table_rows.tolist() == [5, 2]
    assert batch.table_entries.tolist() == [40, 17]
    assert batch.last_block_ids.tolist() == [7, 2]


def test_single_tokens_are_gathered_like_any_others() -> None:
    """A decode step takes a shorter way: the numbers are those of the long one."""
    shares = [
        (list(range(9)), 8, [5, 1, 0]),
        ([3], 0, [9]),
        (list(range(4)), 3, [4]),
        (list(range(5)), 4, [7, 6]),
    ]
    short = values(gather(make_tables(num_rows=5), *shares))
    together = values(gather(make_tables(num_rows=5), *shares, ([1, 2], 0, [8])))
    for name in COLUMNS:
        assert short[name] == together[name][: len(short[name])], name


def test_large_cache_positions_do_not_wrap_around() -> None:
    """Block ids are int32, their products with the block size are not."""
    batch = gather(make_tables(), ([1], 0, [2**30]))
    assert batch.slot_mapping.tolist() == [2**32]
    batch = gather(make_tables(), ([1, 2], 0, [2**30]))
    assert batch.slot_mapping.tolist() == [2**32, 2**32 + 1]


def test_padding_stores_nothing_attends_to_nothing_and_names_nobodys_row() -> None:
    tables = make_tables()
    batch = gather(tables, ([11, 12, 13], 0, [7]), ([21, 22], 1, [3]))
    assert dict(zip(COLUMNS, paddings(len(batch.input_ids), tables), strict=True)) == {
        "input_ids": 0,
        "positions": 0,
        "slot_mapping": -1,
        "table_rows": 2,
        "table_entries": 6,
        "last_block_ids": 0,
        "seq_lens": 0,
        "cu_seqlens_q": 4,  # all tokens: a request of padding has none
    }


def test_step_without_requests_is_all_padding() -> None:
    assert values(empty_batch()) == {name: [] for name in COLUMNS[:-1]} | {"cu_seqlens_q": [0]}
    # Recorded with one token of padding, because every request's last row is looked up.
    assert paddings(0, make_tables()) == (0, 0, -1, 2, 6, 0, 0, 1)


def test_columns_are_in_the_order_of_the_fields_that_they_fill() -> None:
    host = gather(make_tables(), ([1, 2], 1, [4]), ([3, 4, 5, 6, 7], 3, [6, 1]))
    batch = InputBatch[torch.Tensor]._make([*map(torch.from_numpy, host.columns), *host[8:]])
    assert (batch.min_query_len, batch.max_query_len, batch.max_seq_len) == (1, 2, 5)
    for name, column in zip(COLUMNS, host.columns, strict=True):
        assert torch.equal(getattr(batch, name), torch.from_numpy(column)), name


def test_chunk_of_a_prompt_ends_where_its_last_token_is_and_not_where_its_table_does() -> None:
    tables = make_tables()
    (request,) = make_requests([[11, 12, 13, 14, 15, 16, 17, 18, 19]], SamplingParams(max_tokens=1))
    table = [7, 2, 5]
    batches = []
    for num_tokens in (5, 3, 1):
        share = ScheduledRequest(request, num_tokens, table)
        batches.append(values(gather_batch([share], tables, block_size=4)))
        request.num_computed_tokens += num_tokens
    assert [batch["input_ids"] for batch in batches] == [[11, 12, 13, 14, 15], [16, 17, 18], [19]]
    assert [batch["positions"] for batch in batches] == [[0, 1, 2, 3, 4], [5, 6, 7], [8]]
    assert [b["slot_mapping"] for b in batches] == [[28, 29, 30, 31, 8], [9, 10, 11], [20]]
    assert [(b["table_entries"], b["last_block_ids"]) for b in batches] == [
        ([1], [2]),
        ([1], [2]),
        ([2], [5]),
    ]
    assert [batch["seq_lens"] for batch in batches] == [[5], [8], [9]]
    assert tables.host[0].tolist() == table


def test_token_that_the_host_does_not_know_is_named_by_the_row_of_its_request() -> None:
    tables = make_tables()
    requests = make_requests([[11, 12], [21, 22, 23]], SamplingParams(max_tokens=4))
    gather_batch(
        [ScheduledRequest(r, r.num_tokens, [i]) for i, r in enumerate(requests)], tables, 4
    )
    for request in requests:
        request.num_computed_tokens = request.num_tokens
        request.num_pending_tokens = 1
    pending = [ScheduledRequest(r, 1, [i]) for i, r in enumerate(requests)]
    batch = values(gather_batch(pending[::-1], tables, block_size=4))
    # Of three rows, one of which is padding: from the end of the table of tokens.
    assert (batch["table_rows"], batch["input_ids"]) == ([1, 0], [-2, -3])
    assert batch["positions"] == [3, 2]
    requests[0].append_output_token(13)
    batch = values(gather_batch(pending, tables, block_size=4))
    assert batch["input_ids"] == [13, -2]
