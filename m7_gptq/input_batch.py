"""The tokens of one step, packed end to end: on the host, then on the device."""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np

from .block_tables import BlockTables
from .scheduler import ScheduledRequest

ArrayT = TypeVar("ArrayT")


class InputBatch(NamedTuple, Generic[ArrayT]):
    """What the model reads in one step, as numpy arrays or as tensors on the device.

    Two requests with 3 and 1 tokens to compute, the second with 6 in the cache, rows 5 and 2 of
    BlockTables with 8 columns, blocks of 4, and tables [7] and [3, 2]:

        positions     [0, 1, 2, 6]     slot_mapping   [28, 29, 30, 10]
        table_rows    [5, 2]           table_entries  [40, 17]          last_block_ids [7, 2]
        seq_lens      [3, 7]           cu_seqlens_q   [0, 3, 4]
    """

    input_ids: ArrayT
    """[num_tokens] int64; row - (rows of BlockTables), which is below 0, stands for the token that
    was sampled last for that row and that the host does not know yet"""
    positions: ArrayT
    """[num_tokens] int64, each token's index in its own sequence"""
    slot_mapping: ArrayT
    """[num_tokens] int64, where each token's keys and values go; -1 for padding"""
    table_rows: ArrayT
    """[num_requests] int64, each request's row of BlockTables"""
    table_entries: ArrayT
    """[num_requests] int64, index of each request's last block in the flattened BlockTables"""
    last_block_ids: ArrayT
    """[num_requests] int32, to be written there"""
    seq_lens: ArrayT
    """[num_requests] int32, tokens in the cache after this step; 0 for padding"""
    cu_seqlens_q: ArrayT
    """[num_requests + 1] int32, request i's tokens are rows [i] to [i + 1]"""
    min_query_len: int
    """Known to the host, like those below, which decides by them what to launch."""
    max_query_len: int
    max_seq_len: int

    @property
    def columns(self) -> tuple[ArrayT, ...]:
        """What is uploaded."""
        columns: tuple[ArrayT, ...] = self[:8]
        return columns


HostBatch: TypeAlias = InputBatch[np.ndarray]


def gather_batch(
    scheduled: Sequence[ScheduledRequest], block_tables: BlockTables, block_size: int
) -> HostBatch:
    """Collect the step from its requests, and bring the rows of `block_tables` up to date.

    Costs O(num_requests) Python and O(num_tokens) numpy.
    """
    starts = np.array([s.request.num_computed_tokens for s in scheduled], dtype=np.int64)
    # query_lens [2, 3] -> cu_seqlens_q [0, 2, 5], places in the own request [0, 1, 0, 1, 2]
    query_lens = np.array([s.num_scheduled_tokens for s in scheduled])
    seq_lens = starts + query_lens
    last_columns = (seq_lens - 1) // block_size
    rows, entries, last_block_ids = block_tables.assign(scheduled, last_columns)
    token_ids: list[int] = []
    for (request, num_scheduled_tokens, _), row in zip(scheduled, rows.tolist(), strict=True):
        start, end = request.num_computed_tokens, request.num_computed_tokens + num_scheduled_tokens
        token_ids += request.token_ids[start:end]
        if end > len(request.token_ids):
            token_ids.append(row - len(block_tables.host))
    if len(token_ids) == len(scheduled):  # single tokens, the short way
        cu_seqlens_q = np.arange(len(scheduled) + 1, dtype=np.int32)
        positions, block_ids, offsets = starts, last_block_ids, starts % block_size
    else:
        cu_seqlens_q = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)
        places = np.arange(len(token_ids)) - np.repeat(cu_seqlens_q[:-1], query_lens)
        positions = np.repeat(starts, query_lens) + places
        columns, offsets = np.divmod(positions, block_size)
        block_ids = block_tables.host[np.repeat(rows, query_lens), columns]
    return HostBatch(
        input_ids=np.array(token_ids, dtype=np.int64),
        positions=positions,
        slot_mapping=block_ids * np.int64(block_size) + offsets,
        table_rows=rows,
        table_entries=entries,
        last_block_ids=last_block_ids,
        seq_lens=seq_lens.astype(np.int32),
        cu_seqlens_q=cu_seqlens_q,
        min_query_len=int(query_lens.min()),
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
    )


def empty_batch() -> HostBatch:
    """A step without requests."""
    empty, empty_int32 = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)
    cu_seqlens_q = np.zeros(1, dtype=np.int32)
    return HostBatch._make([*[empty] * 5, *[empty_int32] * 2, cu_seqlens_q, 0, 0, 0])


def paddings(num_tokens: int, block_tables: BlockTables) -> tuple[int, ...]:
    """What fills up each column of a step of `num_tokens` tokens to a captured size.

    Tokens that are stored nowhere, and requests without tokens whose tables nobody owns.
    """
    row = block_tables.padding_row
    # Of a step without tokens the first is taken, so that its request has a last row.
    return (0, 0, -1, row, row * block_tables.num_columns, 0, 0, max(num_tokens, 1))
