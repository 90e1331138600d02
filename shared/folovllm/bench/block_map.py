"""Who holds which block of the KV cache, over one run: sampled, and packed for a JSON file."""

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

FREE, SHARED, CACHED = -1, -2, -3
"""Instead of an owner: nobody, several requests, nobody but a prefix cache."""
MAX_SAMPLES = 200
MAX_ROWS = 8192
MAX_PACKED_BYTES = 250_000
_ENCODING = "base64 of zlib of int32, little-endian, [rows, samples]"


class HasClock(Protocol):
    def now(self) -> float:
        """Seconds since some fixed moment."""


class HasBlockTables(Protocol):
    """The KV cache manager of a stage that has blocks."""

    block_tables: dict[str, list[int]]
    """Request id -> its blocks on the device."""


@dataclass(frozen=True, kw_only=True)
class BlockMap:
    """Owners of blocks at some moments of a run."""

    num_blocks: int
    """In the pool."""
    block_stride: int
    """Row i of `owners` is block i * block_stride; above 1, blocks between are left out."""
    steps: list[int]
    """Column j of `owners` is the state after this step, finished requests gone."""
    request_ids: list[str]
    sampling_s: float
    """Seconds of the run, between its steps, that sampling took."""
    owners: NDArray[np.int32]
    """[num_rows, num_samples]: an index into `request_ids`, FREE, SHARED or CACHED."""


class _Sample(NamedTuple):
    """Who held what after one step."""

    block_tables: dict[str, list[int]]
    cached_block_ids: NDArray[np.int32]
    """Blocks that a prefix cache keeps and nobody holds; none in stages without one."""


class BlockMapRecorder:
    """Copies the block tables at no more than MAX_SAMPLES moments of a run of unknown length.

    Every `stride`-th step is kept; when the list is full, every second sample goes and the
    stride doubles. Only copies are made while the run lasts: the map is made of them afterwards.
    """

    def __init__(self, manager: HasBlockTables, clock: HasClock) -> None:
        self._manager = manager
        self._clock = clock
        self._seconds = 0.0
        self._num_steps = 0
        self._stride = 1
        self._samples: dict[int, _Sample] = {}
        """Step -> what was after it."""

    def after_step(self) -> None:
        """To be called after every step, outside of its time."""
        step = self._num_steps
        self._num_steps += 1
        if step % self._stride:
            return
        start = self._clock.now()
        if len(self._samples) == MAX_SAMPLES:
            self._stride *= 2
            self._samples = {s: t for s, t in self._samples.items() if s % self._stride == 0}
        tables = self._manager.block_tables
        cache: Any = getattr(self._manager, "prefix_cache", None)
        self._samples[step] = _Sample(
            {request_id: list(table) for request_id, table in tables.items()},
            np.fromiter(() if cache is None else cache.idle, dtype=np.int32),
        )
        self._seconds += self._clock.now() - start

    def block_map(self, num_blocks: int, request_ids: Sequence[str]) -> BlockMap:
        """The samples as a grid. `request_ids` name every request of the run, in any order."""
        stride = -(-num_blocks // MAX_ROWS)
        index_of = {request_id: index for index, request_id in enumerate(request_ids)}
        owners = np.full((num_blocks, len(self._samples)), FREE, dtype=np.int32)
        for column, sample in zip(owners.T, self._samples.values(), strict=True):
            column[sample.cached_block_ids] = CACHED
            for request_id, table in sample.block_tables.items():
                taken = column[table] != FREE
                column[table] = np.where(taken, SHARED, index_of[request_id])
        return BlockMap(
            num_blocks=num_blocks,
            block_stride=stride,
            steps=list(self._samples),
            request_ids=list(request_ids),
            sampling_s=self._seconds,
            owners=owners[::stride],
        )


def pack_block_map(block_map: BlockMap) -> dict[str, Any]:
    """As JSON has it; every second sample is left out until it fits MAX_PACKED_BYTES."""
    steps, owners = block_map.steps, block_map.owners
    packed = _pack(owners)
    while len(packed) > MAX_PACKED_BYTES and len(steps) > 1:
        steps, owners = steps[::2], owners[:, ::2]
        packed = _pack(owners)
    return {
        "num_blocks": block_map.num_blocks,
        "block_stride": block_map.block_stride,
        "steps": steps,
        "request_ids": block_map.request_ids,
        "sampling_s": block_map.sampling_s,
        "free": FREE,
        "shared": SHARED,
        "cached": CACHED,
        "encoding": _ENCODING,
        "owners": packed,
    }


def unpack_block_map(packed: Mapping[str, Any]) -> BlockMap:
    """The inverse; ValueError if the text is none of ours."""
    if packed.get("encoding") != _ENCODING:
        raise ValueError(
            f"block map with encoding {packed.get('encoding')!r}; this reads {_ENCODING!r} only"
        )
    flat = np.frombuffer(zlib.decompress(base64.b64decode(packed["owners"])), dtype="<i4")
    return BlockMap(
        num_blocks=packed["num_blocks"],
        block_stride=packed["block_stride"],
        steps=packed["steps"],
        request_ids=packed["request_ids"],
        sampling_s=packed["sampling_s"],
        owners=flat.reshape(-1, len(packed["steps"])).astype(np.int32),
    )


def _pack(owners: NDArray[np.int32]) -> str:
    """Row after row, one block's owners over time: long runs of the same number."""
    return base64.b64encode(zlib.compress(owners.astype("<i4").tobytes(), level=9)).decode("ascii")
