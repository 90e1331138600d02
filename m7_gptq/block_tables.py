"""Block tables of the running requests, kept on the device from step to step."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from folovllm.request import Request, RequestStatus
from folovllm.transfer import upload

from .scheduler import ScheduledRequest


class LastBlocks(NamedTuple):
    """Where a step's requests are in BlockTables, and the blocks that they write to last."""

    rows: np.ndarray
    """[num_requests] int64"""
    entries: np.ndarray
    """[num_requests] int64, of the last block, in the flattened tables"""
    block_ids: np.ndarray
    """[num_requests] int32, that belong there"""


class _Copy(NamedTuple):
    """Whose table a row holds."""

    row: int
    request: Request
    block_table: Sequence[int]
    """The list that was copied; the manager appends to it, or makes a new one."""


class BlockTables:
    """A row per running request, on the host and on the device.

    A decode step changes at most the entry of the block it writes to, so that is all that
    travels: the host's work does not grow with the context. Rows are copied whole when a request
    is new here, when it computes several tokens, or when its table is another list than before
    (it was swapped, or shares its parent's blocks). A row is kept until somebody needs it, also
    if its request has finished.
    """

    def __init__(self, num_rows: int, num_columns: int, device: torch.device) -> None:
        self.host = np.zeros((num_rows + 1, num_columns), dtype=np.int32)
        """[num_rows + 1, num_columns]; the last row belongs to nobody: padding points to it."""
        self.device = torch.zeros(self.host.shape, dtype=torch.int32, device=device)
        self.num_columns = num_columns
        self.padding_row = num_rows
        self.copies: dict[str, _Copy] = {}
        self.free_rows = list(range(num_rows))

    def assign(self, scheduled: Sequence[ScheduledRequest], last_columns: np.ndarray) -> LastBlocks:
        """Give every request a row, and copy the rows that must be copied whole.

        last_columns: [num_requests] int64, of the block of each request's last token in this step.
        These entries are written on the host only: to the device they travel with the step.
        """
        copies = [self.copies.get(s.request.request_id) for s in scheduled]
        stale = [
            s
            for s, copy in zip(scheduled, copies, strict=True)
            if copy is None or copy.block_table is not s.block_table or s.num_scheduled_tokens > 1
        ]
        if stale:
            self._copy(stale)
            copies = [self.copies[s.request.request_id] for s in scheduled]
        rows = np.array([copy.row for copy in copies if copy], dtype=np.int64)
        block_ids = np.array(
            [s.block_table[c] for s, c in zip(scheduled, last_columns.tolist(), strict=True)],
            dtype=np.int32,
        )
        self.host[rows, last_columns] = block_ids
        return LastBlocks(rows, rows * self.num_columns + last_columns, block_ids)

    def _copy(self, stale: Sequence[ScheduledRequest]) -> None:
        num_new = sum(s.request.request_id not in self.copies for s in stale)
        if num_new > len(self.free_rows):
            self._forget_who_left()
        rows = []
        for request, _, block_table in stale:
            known = self.copies.get(request.request_id)
            rows.append(known.row if known else self.free_rows.pop())
            self.copies[request.request_id] = _Copy(rows[-1], request, block_table)
            self.host[rows[-1], : len(block_table)] = block_table
        num_columns = max(len(s.block_table) for s in stale)
        device_rows, entries = upload(
            (np.array(rows), self.host[rows, :num_columns]), self.device.device
        )
        self.device[:, :num_columns].index_copy_(0, device_rows, entries)

    def _forget_who_left(self) -> None:
        """Free the rows of requests that do not run: finished, preempted, or aborted."""
        self.copies = {
            request_id: copy
            for request_id, copy in self.copies.items()
            if copy.request.status is RequestStatus.RUNNING
        }
        # Counted anew: Ctrl-C may have come where a row belonged to nobody.
        used_rows = {copy.row for copy in self.copies.values()}
        self.free_rows = [row for row in range(self.padding_row) if row not in used_rows]
