"""What an engine holds at one moment, small enough to be sent to somebody who watches."""

from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...request import Request, RequestStatus

MAX_REQUESTS = 256
"""Requests in a view: all that run, and of those who are next as many as make this number."""
MAX_CELLS = 2048
"""Most cells of a map; of a larger cache a cell stands for several blocks."""
FREE, CACHED, SHARED, FIRST_REQUEST = 0, 1, 2, 3
"""What a cell says: nobody's; nobody's, but found by a prefix cache; several requests'; else
FIRST_REQUEST + index of the request that has it."""


class RequestView(NamedTuple):
    """One unfinished request."""

    request_id: str
    status: str
    """waiting, running or swapped."""
    num_prompt_tokens: int
    num_tokens: int
    num_computed_tokens: int
    max_tokens: int
    num_blocks: int | None
    """None in stages without blocks."""
    num_cached_tokens: int | None
    """Prompt tokens that a prefix cache had."""


@dataclass(frozen=True, kw_only=True)
class MemoryView:
    """The KV cache as a row of cells."""

    unit: str
    """What a cell is: block or slot."""
    num_units: int
    unit_len: int
    """Tokens that one has room for."""
    stride: int
    """Units per cell; one that holds several says the most of what it has: a request before
    several, before a cache, before nobody."""
    cells: list[int]
    holders: dict[int, list[int]]
    """Cell -> indices of the requests, for cells that several hold, where the stride is 1."""
    kept: list[int]
    """Cells that a request holds and a prefix cache finds too, where the stride is 1."""
    num_free: int
    """Cached ones that nobody holds included."""
    num_cached: int | None
    """Of the free ones, those that a prefix cache finds; None in stages without one."""


@dataclass(frozen=True, kw_only=True)
class EngineView:
    """The requests of an engine, and who has what of its cache."""

    requests: list[RequestView]
    num_left_out: int
    """Requests that wait and are not among them."""
    memory: MemoryView | None
    """None where the cache has no parts that could be shown."""


def view_engine(scheduler: Any) -> EngineView:
    """`scheduler`: of any stage. Costs as much as there are requests and blocks held."""
    requests = list(scheduler.requests.values())
    running = [r for r in requests if r.status is RequestStatus.RUNNING]
    others = [r for r in requests if r.status is not RequestStatus.RUNNING]
    num_others = max(0, MAX_REQUESTS - len(running))
    shown = running + sorted(others, key=lambda r: r.place)[:num_others]
    manager = scheduler.kv_cache_manager
    return EngineView(
        requests=[_view_request(request, manager) for request in shown],
        num_left_out=len(requests) - len(shown),
        memory=_view_memory(shown, manager),
    )


def _view_request(request: Request, manager: Any) -> RequestView:
    tables = getattr(manager, "block_tables", None)
    return RequestView(
        request_id=request.request_id,
        status=request.status.name.lower(),
        num_prompt_tokens=request.num_prompt_tokens,
        num_tokens=request.num_tokens,
        num_computed_tokens=request.num_computed_tokens,
        max_tokens=request.max_tokens,
        num_blocks=None if tables is None else len(tables.get(request.request_id, ())),
        num_cached_tokens=request.num_cached_tokens,
    )


def _view_memory(requests: list[Request], manager: Any) -> MemoryView | None:
    if hasattr(manager, "pool"):
        return _view_blocks(requests, manager)
    if hasattr(manager, "slots"):
        return _view_slots(requests, manager)
    return None


def _view_slots(requests: list[Request], manager: Any) -> MemoryView:
    num_slots = manager.num_tokens // manager.slot_len
    units = np.zeros(num_slots, dtype=np.int32)
    for index, request in enumerate(requests):
        slot = manager.slots.get(request.request_id)
        if slot is not None:
            units[slot] = FIRST_REQUEST + index
    stride = _stride(num_slots)
    return MemoryView(
        unit="slot", num_units=num_slots, unit_len=manager.slot_len, stride=stride,
        cells=_cells(units, stride), holders={}, kept=[],
        num_free=num_slots - len(manager.slots), num_cached=None,
    )  # fmt: skip


def _view_blocks(requests: list[Request], manager: Any) -> MemoryView:
    num_blocks = manager.pool.num_blocks
    cache = manager.prefix_cache if getattr(manager, "is_caching", False) else None
    tables = [manager.block_tables.get(request.request_id, ()) for request in requests]
    ids = np.fromiter(chain.from_iterable(tables), dtype=np.int64)
    owners = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    is_shared = (np.bincount(ids, minlength=num_blocks) > 1)[ids]
    units = np.zeros(num_blocks, dtype=np.int32)
    if cache is not None:
        units[list(cache.idle)] = CACHED
    units[ids] = np.where(is_shared, SHARED, FIRST_REQUEST + owners)
    stride = _stride(num_blocks)
    holders: dict[int, list[int]] = {}
    kept: list[int] = []
    if stride == 1:
        pairs = zip(ids[is_shared].tolist(), owners[is_shared].tolist(), strict=True)
        for block_id, owner in pairs:
            holders.setdefault(block_id, []).append(owner)
        kept = [] if cache is None else sorted(cache.nodes.keys() - cache.idle.keys())
    return MemoryView(
        unit="block", num_units=num_blocks, unit_len=manager.block_size, stride=stride,
        cells=_cells(units, stride), holders=holders, kept=kept,
        num_free=manager.num_free_blocks, num_cached=None if cache is None else len(cache.idle),
    )  # fmt: skip


def _stride(num_units: int) -> int:
    return max(1, -(-num_units // MAX_CELLS))


def _cells(units: NDArray[np.int32], stride: int) -> list[int]:
    """The most of every `stride` units; the last cell may have fewer."""
    padded = np.pad(units, (0, -len(units) % stride))
    cells: list[int] = padded.reshape(-1, stride).max(axis=1).tolist()
    return cells
