"""Starting a kernel while the one before it still runs (programmatic dependent launch, Hopper).

Between two kernels of a stream the device drains, launches and fills again: a microsecond or two,
as long as many kernels of a decode step take. A kernel that takes part lets the next one start
as soon as all of its own programs have started, and waits before it touches what an earlier
kernel wrote. Before that wait the kernel before may itself still be waiting, and so may the one
before it: only weights may be read there, and what was written before the last kernel that does
not take part, which begins when all before it are done. In a step that is at earliest the
model's fill with zeros before its first layer, and with many rows a product of the library:
block tables, lengths, and keys and values of earlier steps are older than either.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Return when every earlier kernel of the stream is done and what it wrote can be read.

    No program may end without it, not even one that finds nothing to do: the end of its kernel
    tells the next one that all before have ended.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@lru_cache
def overlap_options(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel with a parameter OVERLAP: on where the device can, else off."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}
