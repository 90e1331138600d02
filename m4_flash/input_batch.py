"""The tokens of one step, packed end to end: on the host, then on the device."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch

from .block_tables import BlockTables
from .scheduler import ScheduledRequest


@dataclass(frozen=True)
class InputBatch:
    """What the model reads in one step, on the device.

    Two requests with 3 and 1 tokens to compute, the second with 6 in the cache, rows 5 and 2 of
    BlockTables with 8 columns, blocks of 4, and tables [7] and [3, 2]:

        positions     [0, 1, 2, 6]     slot_mapping   [28, 29, 30, 10]
        table_rows    [5, 2]           table_entries  [40, 17]          last_block_ids [7, 2]
        seq_lens      [3, 7]           cu_seqlens_q   [0, 3, 4]
    """

    input_ids: torch.Tensor
    """[num_tokens] int64"""
    positions: torch.Tensor
    """[num_tokens] int64, each token's index in its own sequence"""
    slot_mapping: torch.Tensor
    """[num_tokens] int64, where each token's keys and values go; -1 for padding"""
    table_rows: torch.Tensor
    """[num_requests] int64, each request's row of BlockTables"""
    table_entries: torch.Tensor
    """[num_requests] int64, index of each request's last block in the flattened BlockTables"""
    last_block_ids: torch.Tensor
    """[num_requests] int32, to be written there"""
    seq_lens: torch.Tensor
    """[num_requests] int32, tokens in the cache after this step; 0 for padding"""
    cu_seqlens_q: torch.Tensor
    """[num_requests + 1] int32, request i's tokens are rows [i] to [i + 1]"""
    _: KW_ONLY
    min_query_len: int
    """Known to the host, which decides by them what to launch."""
    max_query_len: int


@dataclass(frozen=True)
class HostBatch:
    """The same as numpy arrays, in the same order."""

    input_ids: np.ndarray
    positions: np.ndarray
    slot_mapping: np.ndarray
    table_rows: np.ndarray
    table_entries: np.ndarray
    last_block_ids: np.ndarray
    seq_lens: np.ndarray
    cu_seqlens_q: np.ndarray
    _: KW_ONLY
    padding_row: int
    """The row of BlockTables that belongs to nobody."""
    num_columns: int
    """Of BlockTables."""

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_requests(self) -> int:
        return len(self.seq_lens)

    @staticmethod
    def dtypes() -> tuple[Any, ...]:
        """Of the columns."""
        return (*[np.int64] * 5, *[np.int32] * 3)

    def columns(self) -> tuple[np.ndarray, ...]:
        """What is uploaded, in the order of the fields of `InputBatch`."""
        return (
            self.input_ids,
            self.positions,
            self.slot_mapping,
            self.table_rows,
            self.table_entries,
            self.last_block_ids,
            self.seq_lens,
            self.cu_seqlens_q,
        )

    def paddings(self) -> tuple[int, ...]:
        """What fills up each column: tokens that are stored nowhere, requests without tokens."""
        first_entry = self.padding_row * self.num_columns
        # Of a step without tokens the first is taken, so that its request has a last row.
        num_tokens = max(self.num_tokens, 1)
        return (0, 0, -1, self.padding_row, first_entry, 0, 0, num_tokens)

    @staticmethod
    def gather(
        scheduled: Sequence[ScheduledRequest], block_tables: BlockTables, block_size: int
    ) -> "HostBatch":
        """Collect the step from its requests, and bring the rows of `block_tables` up to date.

        Costs O(num_requests) Python and O(num_tokens) numpy.
        """
        starts = np.array([s.request.num_computed_tokens for s in scheduled], dtype=np.int64)
        rows = block_tables.assign(scheduled)
        last_block_ids = np.array([s.block_table[-1] for s in scheduled], dtype=np.int32)
        token_ids: list[int] = []
        for request, num_scheduled_tokens, _ in scheduled:
            start = request.num_computed_tokens
            token_ids += request.token_ids[start : start + num_scheduled_tokens]
        is_decode = len(token_ids) == len(scheduled)
        # query_lens [2, 3] -> cu_seqlens_q [0, 2, 5], places in the own request [0, 1, 0, 1, 2]
        query_lens = 1 if is_decode else np.array([s.num_scheduled_tokens for s in scheduled])
        seq_lens = starts + query_lens
        last_columns, last_offsets = np.divmod(seq_lens - 1, block_size)
        table_entries = rows * block_tables.num_columns + last_columns
        block_tables.host.reshape(-1)[table_entries] = last_block_ids
        if is_decode:
            cu_seqlens_q = np.arange(len(scheduled) + 1, dtype=np.int32)
            positions, block_ids, offsets = starts, last_block_ids, last_offsets
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
            table_entries=table_entries,
            last_block_ids=last_block_ids,
            seq_lens=seq_lens.astype(np.int32),
            cu_seqlens_q=cu_seqlens_q,
            padding_row=block_tables.padding_row,
            num_columns=block_tables.num_columns,
        )

    @staticmethod
    def nothing(block_tables: BlockTables) -> "HostBatch":
        """A step without requests, to be padded."""
        empty, empty_int32 = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)
        return HostBatch(
            input_ids=empty,
            positions=empty,
            slot_mapping=empty,
            table_rows=empty,
            table_entries=empty,
            last_block_ids=empty_int32,
            seq_lens=empty_int32,
            cu_seqlens_q=np.zeros(1, dtype=np.int32),
            padding_row=block_tables.padding_row,
            num_columns=block_tables.num_columns,
        )
