"""Moving a step's small host arrays to the device in one copy."""

from collections.abc import Sequence
from itertools import accumulate

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
