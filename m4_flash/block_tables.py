"""Block tables of the running requests, kept on the device from step to step."""

from collections.abc import Sequence

import numpy as np
import torch

from folovllm.transfer import upload

from .scheduler import ScheduledRequest


class BlockTables:
    """A row per running request, on the host and on the device.

    A decode step changes at most the entry of the block it writes to, so that is all that
    travels: the host's work does not grow with the context. Rows are copied whole when a request
    is new here, when it computes several tokens, or when its table is another list than before
    (it was swapped, or shares its parent's blocks).
    """

    def __init__(self, num_rows: int, num_columns: int, device: torch.device) -> None:
        self.host = np.zeros((num_rows + 1, num_columns), dtype=np.int32)
        """[num_rows + 1, num_columns]; the last row belongs to nobody: padding points to it."""
        self.device = torch.zeros(self.host.shape, dtype=torch.int32, device=device)
        self.padding_row = num_rows
        self.rows: dict[str, int] = {}
        self.tables: dict[str, Sequence[int]] = {}
        """The list that a request's row was copied from."""
        self.free_rows = list(range(num_rows))

    def assign(self, scheduled: Sequence[ScheduledRequest]) -> np.ndarray:
        """[num_requests] int64: the row of each request; copies those that must be copied whole.

        The entries that single-token requests write to this step are left to the caller.
        """
        stale = [
            s
            for s in scheduled
            if s.num_scheduled_tokens > 1
            or self.tables.get(s.request.request_id) is not s.block_table
        ]
        if stale:
            self._copy(stale, scheduled)
        rows = self.rows
        return np.array([rows[s.request.request_id] for s in scheduled], dtype=np.int64)

    def _copy(
        self, stale: Sequence[ScheduledRequest], scheduled: Sequence[ScheduledRequest]
    ) -> None:
        num_new = sum(s.request.request_id not in self.rows for s in stale)
        if num_new > len(self.free_rows):
            self._forget_all_but(scheduled)
        for s in stale:
            request_id = s.request.request_id
            if request_id not in self.rows:
                self.rows[request_id] = self.free_rows.pop()
            self.tables[request_id] = s.block_table
            self.host[self.rows[request_id], : len(s.block_table)] = s.block_table
        rows = np.array([self.rows[s.request.request_id] for s in stale], dtype=np.int64)
        num_columns = max(len(s.block_table) for s in stale)
        device_rows, entries = upload((rows, self.host[rows, :num_columns]), self.device.device)
        self.device[:, :num_columns].index_copy_(0, device_rows, entries)

    def _forget_all_but(self, scheduled: Sequence[ScheduledRequest]) -> None:
        """Free the rows of everybody else: finished, or back in a later step and copied then."""
        kept = {s.request.request_id for s in scheduled}
        for request_id in self.rows.keys() - kept:
            self.free_rows.append(self.rows.pop(request_id))
            del self.tables[request_id]
