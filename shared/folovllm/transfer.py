"""Moving a step's small host arrays to the device in one copy."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, cycle
from typing import Any

import numpy as np
import torch

_ALIGNMENT = 16
"""Bytes. Triton compiles a kernel anew for pointers that are not multiples of 16: offsets that
depend on a step's lengths would make it compile in the middle of a run."""


def aligned_offsets(num_bytes: Sequence[int]) -> list[int]:
    """Where arrays of these sizes start in one buffer; the last entry is the buffer's length."""
    return list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in num_bytes), initial=0))


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Return the arrays as tensors on `device`, same shapes and dtypes.

    All arrays travel in one pinned, asynchronous copy: a copy costs the host some ten
    microseconds whatever its size, and a copy from pageable memory would make it wait. The
    pinned buffer comes from torch's caching host allocator, which does not reuse it before the
    copy is done.
    """
    if device.type != "cuda":
        return [torch.from_numpy(array) for array in arrays]
    *offsets, end = aligned_offsets([array.nbytes for array in arrays])
    staging = torch.empty(max(end, 1), dtype=torch.uint8, pin_memory=True)
    staging_np = staging.numpy()
    for array, offset in zip(arrays, offsets, strict=True):
        flat = staging_np[offset : offset + array.nbytes].view(array.dtype)
        flat[:] = array.reshape(-1)
    on_device = staging.to(device, non_blocking=True)
    return [
        on_device[offset : offset + array.nbytes]
        .view(torch.from_numpy(array).dtype)
        .view(array.shape)
        for array, offset in zip(arrays, offsets, strict=True)
    ]


class PinnedColumns:
    """Named by position: arrays of fixed length in pinned host memory, and their twins.

    There are two sets on the host, written in turns, so that the next step can be filled in while
    the copy of the one before is still queued.
    """

    def __init__(self, lengths: Sequence[int], dtypes: Sequence[Any], device: torch.device) -> None:
        sizes = [n * np.dtype(dtype).itemsize for n, dtype in zip(lengths, dtypes, strict=True)]
        *offsets, end = aligned_offsets(sizes)
        self._twin = torch.zeros(end, dtype=torch.uint8, device=device)
        is_pinned = device.type == "cuda"
        self._pinned = [torch.zeros(end, dtype=torch.uint8, pin_memory=is_pinned) for _ in range(2)]
        self._turns = cycle(range(2))
        windows = [slice(o, o + size) for o, size in zip(offsets, sizes, strict=True)]
        self._host = [
            [pinned.numpy()[w].view(dtype) for w, dtype in zip(windows, dtypes, strict=True)]
            for pinned in self._pinned
        ]
        self.device: list[torch.Tensor] = [
            self._twin[w].view(torch.from_numpy(np.empty(0, dtype)).dtype)
            for w, dtype in zip(windows, dtypes, strict=True)
        ]

    def upload(self, columns: Iterable[np.ndarray], paddings: Iterable[int]) -> None:
        """Fill the front with `columns` and the rest with `paddings`, in one copy.

        What there is no column for is left out. The copy before the last must be done: an engine
        waits for the tokens of a step before it launches the one after the next, so it is.
        """
        turn = next(self._turns)
        for target, values, padding in zip(self._host[turn], columns, paddings, strict=False):
            target[: len(values)] = values
            if len(values) < len(target):
                target[len(values) :] = padding
        self._twin.copy_(self._pinned[turn], non_blocking=True)
