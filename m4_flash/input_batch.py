"""The tokens of one step, packed end to end: on the host, then on the device."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch

from .block_tables import BlockTables
from .scheduler import ScheduledRequest


@dataclass(frozen=True)
class HostBatch:
    """What a step computes, as numpy arrays; `InputBatch` documents the fields."""

    input_ids: np.ndarray
    positions: np.ndarray
    slot_mapping: np.ndarray
    table_rows: np.ndarray
    table_entries: np.ndarray
    last_block_ids: np.ndarray
    seq_lens: np.ndarray
    query_lens: np.ndarray
    """[num_requests] int64"""

    @property
    def num_requests(self) -> int:
        return len(self.seq_lens)

    def columns(self) -> tuple[np.ndarray, ...]:
        """What a batch of single tokens uploads, in the order of `InputBatch.of_single_tokens`."""
        return (
            self.input_ids,
            self.positions,
            self.slot_mapping,
            self.table_rows,
            self.table_entries,
            self.last_block_ids,
            self.seq_lens,
        )

    @staticmethod
    def gather(
        scheduled: Sequence[ScheduledRequest], block_tables: BlockTables, block_size: int
    ) -> "HostBatch":
        """Collect the step from its requests, and bring the rows of `block_tables` up to date.

        Costs O(num_requests) Python and O(num_tokens) numpy.
        """
        starts = np.array([s.request.num_computed_tokens for s in scheduled], dtype=np.int64)
        query_lens = np.array([s.num_scheduled_tokens for s in scheduled], dtype=np.int64)
        seq_lens = starts + query_lens
        token_ids: list[int] = []
        for s, start in zip(scheduled, starts.tolist(), strict=True):
            token_ids += s.request.token_ids[start : start + s.num_scheduled_tokens]
        rows = block_tables.assign(scheduled)
        last_block_ids = np.array([s.block_table[-1] for s in scheduled], dtype=np.int32)
        last_columns = (seq_lens - 1) // block_size
        block_tables.host[rows, last_columns] = last_block_ids
        # query_lens [2, 3] -> ends [2, 5], offsets in the own request [0, 1, 0, 1, 2]
        ends = np.cumsum(query_lens)
        offsets = np.arange(ends[-1]) - np.repeat(ends - query_lens, query_lens)
        positions = np.repeat(starts, query_lens) + offsets
        block_ids = block_tables.host[np.repeat(rows, query_lens), positions // block_size]
        return HostBatch(
            input_ids=np.array(token_ids, dtype=np.int64),
            positions=positions,
            slot_mapping=block_ids.astype(np.int64) * block_size + positions % block_size,
            table_rows=rows,
            table_entries=rows * block_tables.host.shape[1] + last_columns,
            last_block_ids=last_block_ids,
            seq_lens=seq_lens.astype(np.int32),
            query_lens=query_lens,
        )

    @staticmethod
    def padding(block_tables: BlockTables) -> "HostBatch":
        """One row that computes a token for nobody: it stores nothing and attends to nothing."""
        zero = np.zeros(1, dtype=np.int64)
        row = zero + block_tables.padding_row
        return HostBatch(
            input_ids=zero,
            positions=zero,
            slot_mapping=zero - 1,
            table_rows=row,
            table_entries=row * block_tables.host.shape[1],
            last_block_ids=zero.astype(np.int32),
            seq_lens=zero.astype(np.int32),
            query_lens=zero + 1,
        )


@dataclass(frozen=True)
class InputBatch:
    """The same on the device."""

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
    _: KW_ONLY
    cu_seqlens_q: torch.Tensor
    """[num_requests + 1] int32, request i's tokens are rows [i] to [i + 1]"""
    logits_indices: torch.Tensor
    """[num_requests] int64, each request's last row"""
    min_query_len: int
    """Known to the host, which decides by them what to launch."""
    max_query_len: int

    @staticmethod
    def of_single_tokens(columns: Sequence[torch.Tensor]) -> "InputBatch":
        """columns: as `HostBatch.columns`; every request has one token."""
        size, device = len(columns[0]), columns[0].device
        return InputBatch(
            *columns,
            cu_seqlens_q=torch.arange(size + 1, dtype=torch.int32, device=device),
            logits_indices=torch.arange(size, device=device),
            min_query_len=1,
            max_query_len=1,
        )
