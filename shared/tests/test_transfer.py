"""Where arrays lie in the one buffer that is uploaded."""

import numpy as np
import torch

from folovllm.transfer import aligned_offsets, upload


def test_every_array_starts_at_a_multiple_of_16_bytes_behind_the_one_before() -> None:
    """Other starts make Triton compile a kernel anew, for lengths that no earlier step had."""
    for sizes in ([8, 24, 16, 4], [1], [0, 40, 0], [], list(range(40))):
        *offsets, end = aligned_offsets(sizes)
        assert all(offset % 16 == 0 for offset in offsets)
        ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
        starts_behind = [*offsets, end][1:]
        assert all(stop <= start for stop, start in zip(ends, starts_behind, strict=True))
        assert end <= sum(sizes) + 15 * len(sizes)


def test_arrays_arrive_with_their_shapes_types_and_values() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arrays = [np.arange(3), np.ones((2, 5), dtype=np.int32), np.zeros(0), np.float32([[0.5]])]
    for array, tensor in zip(arrays, upload(arrays, device), strict=True):
        assert tensor.device.type == device.type
        np.testing.assert_array_equal(tensor.cpu().numpy(), array, strict=True)
