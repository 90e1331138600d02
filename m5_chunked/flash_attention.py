"""Attention by kernels that read and write the paged KV cache in place: how they are launched.

Two kernels, because two things limit: prefill_kernel.py is bound by arithmetic, decode_kernel.py by
memory. In both a cached context is split over programs where there are too few to occupy the
device. Programs are given out by length (attention_plan.py), once per step, so that a long context
among short ones gets the most. All lengths come from device tensors: the grid depends on shapes
alone, so that one captured launch serves any mix of lengths.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from folovllm.kernels.overlap import overlap_options

from .attention import AttentionMetadata
from .attention_plan import plan_kernel
from .decode_kernel import decode_kernel
from .kv_cache import KVCache
from .prefill_kernel import prefill_kernel

_LOG2_E = math.log2(math.e)
MAX_SPLITS = 32
"""Most programs that share one query's context."""
_PROGRAMS_PER_MULTIPROCESSOR = 3
"""Among these the keys of single queries are divided; more cost merging."""
_TILES_PER_MULTIPROCESSOR = 2
"""As many tiles of queries have room at a time; with fewer, contexts are split."""
_MIN_SPLIT_TILES = 8
"""Tiles of keys in a part of a prompt's context, at least: a part costs a tile of float32."""
_INTERPRETER_MULTIPROCESSORS = 4
_MAX_STACK = 2
"""Most heads that are stacked in a tile; with 4 a cached context was slower, not faster."""


class _Tiles(NamedTuple):
    """How a kernel cuts its work; chosen by measuring on an H200."""

    rows: int
    """Queries times the heads that are stacked."""
    keys: int
    num_warps: int
    num_stages: int
    """Tiles of keys and values on their way from memory while one is computed, plus that one."""
    max_registers: int | None = None
    """Of a thread; None leaves it to the compiler."""
    max_splits: int = MAX_SPLITS
    """Most programs that share a tile's context."""


def _prefill_tiles(dim_block: int, dtype: torch.dtype) -> tuple[_Tiles, _Tiles]:
    """For steps that have not enough rows to fill the device with large tiles, and for others.

    Large tiles read every key half as often. With 128 registers a thread two of them fit on a
    multiprocessor and one computes weights while the other multiplies (docs/dev/milestone_4.md).
    """
    if dtype == torch.float32:  # for comparisons, not for speed: no tensor core computes it
        tiles = _Tiles(rows=16, keys=32, num_warps=4, num_stages=1)
        return tiles, tiles
    if dim_block > 128:
        tiles = _Tiles(rows=64, keys=32, num_warps=4, num_stages=3)
        return tiles, tiles
    return (
        _Tiles(rows=64, keys=64, num_warps=4, num_stages=3),
        # Chosen where they fill the device: no context is split, and no register is lost to it.
        _Tiles(rows=128, keys=64, num_warps=8, num_stages=2, max_registers=128, max_splits=1),
    )


def _decode_tiles(dim_block: int, group_block: int, dtype: torch.dtype) -> _Tiles:
    if dtype == torch.float32:
        return _Tiles(rows=group_block, keys=32, num_warps=4, num_stages=1)
    keys = 64 if dim_block <= 128 else 32
    return _Tiles(rows=group_block, keys=keys, num_warps=4, num_stages=2)


class TritonAttention:
    """The two kernels over one model's cache; `Attention` has the contract."""

    def __init__(self, kv_cache: KVCache, num_heads: int, max_num_requests: int) -> None:
        self.kv_cache = kv_cache
        _, _, self.block_size, self.num_kv_heads, self.head_dim = kv_cache.keys.shape
        self.num_heads, self.group = num_heads, num_heads // self.num_kv_heads
        self.dim_block = max(16, triton.next_power_of_2(self.head_dim))
        group_block = max(16, triton.next_power_of_2(self.group))  # a matrix unit's least rows
        self.scale = self.head_dim**-0.5 * _LOG2_E
        device, dtype = kv_cache.keys.device, kv_cache.keys.dtype
        self.constants = {
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "DIM_BLOCK": self.dim_block,
            "BLOCK_SIZE": self.block_size,
            **overlap_options(device),
        }
        self.small_tiles, self.large_tiles = _prefill_tiles(self.dim_block, dtype)
        # As many of a group's heads as divide it and are a power of 2: rows of a tile are one.
        self.stack = min(self.group & -self.group, _MAX_STACK)
        # Slots of a cache of less than 2^31 elements, the usual case, take half the registers.
        is_small = kv_cache.keys[0].numel() < 1 << 31
        self.offset_type = tl.int32 if is_small else tl.int64
        self.decode_tiles = _decode_tiles(self.dim_block, group_block, dtype)
        self.num_programs = _PROGRAMS_PER_MULTIPROCESSOR * (
            torch.cuda.get_device_properties(device).multi_processor_count
            if device.type == "cuda"
            else _INTERPRETER_MULTIPROCESSORS
        )
        self.programs_per_head = -(-self.num_programs // self.num_kv_heads)
        self.num_head_tiles = num_heads // self.stack
        num_tiles = self.num_programs // _PROGRAMS_PER_MULTIPROCESSOR * _TILES_PER_MULTIPROCESSOR
        self.tiles_per_head = -(-num_tiles // self.num_head_tiles)
        # Programs that share a context meet here; fixed addresses, so that a graph can hold them.
        starts = torch.zeros((3, max_num_requests + 1), dtype=torch.int32, device=device)
        self.split_starts, self.tile_starts, self.part_starts = starts
        num_parts = (self.programs_per_head + max_num_requests) * self.num_kv_heads
        num_tile_parts = self.tiles_per_head * self.num_head_tiles
        num_rows = max(num_parts * self.group, num_tile_parts * self.large_tiles.rows)
        self.partial = torch.empty((num_rows, self.head_dim), dtype=torch.float32, device=device)
        self.lse = torch.empty(num_rows, dtype=torch.float32, device=device)
        num_pairs = max(max_num_requests * self.num_kv_heads, num_tile_parts)
        self.num_arrived = torch.zeros(num_pairs, dtype=torch.int32, device=device)

    def start_step(self, metadata: AttentionMetadata) -> None:
        """Give programs to requests, of each head or the heads that are stacked.

        Request r gets programs [split_starts[r], split_starts[r + 1]) of the decode kernel, or
        [tile_starts[r], tile_starts[r + 1]) of the prefill kernel: its tiles, each as often as its
        context is split. part_starts[r] are the parts before it (all int32). A launch per step;
        the model begins with others that take no part in overlap, so that every layer may read it
        before it waits.
        """
        tiles = self._prefill_tiles_of(metadata, len(metadata.slot_mapping))
        plan_kernel[(1,)](
            metadata.cu_seqlens_q,
            metadata.seq_lens,
            self.split_starts,
            self.tile_starts,
            self.part_starts,
            len(metadata.seq_lens),
            NUM_PROGRAMS=self.programs_per_head,
            TILE_K=self.decode_tiles.keys,
            NUM_TILES=self.tiles_per_head,
            TILE_Q=tiles.rows // self.stack,
            MIN_SPLIT=_MIN_SPLIT_TILES * tiles.keys,
            MAX_TILE_SPLITS=tiles.max_splits,
            MAX_SPLITS=MAX_SPLITS,
        )

    def _prefill_tiles_of(self, metadata: AttentionMetadata, num_tokens: int) -> _Tiles:
        """Large tiles where there are enough of them to fill the device evenly.

        Programs behind a long context take about the same time, those of prompts do not.
        """
        num_large = self.num_heads * num_tokens // self.large_tiles.rows
        is_even = metadata.max_seq_len > 2 * metadata.max_query_len
        least = self.num_programs // 2 if is_even else 3 * self.num_programs
        return self.large_tiles if num_large >= least else self.small_tiles

    def forward(
        self,
        metadata: AttentionMetadata,
        layer_idx: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        """Launches what the step's query lengths call for: one kernel, or for a mix both.

        Between `start_step` of the same metadata and that of the next.
        """
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        keys, values = self.kv_cache.keys[layer_idx], self.kv_cache.values[layer_idx]
        tables = metadata.block_tables
        tensors = (q, k, v, out, keys, values, metadata.cu_seqlens_q, metadata.seq_lens, tables)
        strides = (q.stride(0), k.stride(0), v.stride(0), *keys.stride()[:2], tables.stride(0))
        arguments = (*tensors, metadata.slot_mapping, *strides, self.scale)
        if metadata.max_query_len > 1:
            self._prefill(metadata, len(q), arguments)
        if metadata.min_query_len == 1:
            self._decode(len(metadata.seq_lens), arguments)
        return out

    def _prefill(
        self, metadata: AttentionMetadata, num_tokens: int, arguments: tuple[Any, ...]
    ) -> None:
        tiles, num_requests = self._prefill_tiles_of(metadata, num_tokens), len(metadata.seq_lens)
        tile_q = tiles.rows // self.stack
        # At most one tile per request is not full; parts of contexts come on top.
        num_tiles = num_tokens // tile_q + num_requests + self.tiles_per_head
        prefill_kernel[(self.num_head_tiles, num_tiles)](
            *arguments,
            self.tile_starts,
            self.part_starts,
            self.partial,
            self.lse,
            self.num_arrived,
            num_requests,
            NUM_HEADS=self.num_heads,
            STACK=self.stack,
            TILE_Q=tile_q,
            TILE_K=tiles.keys,
            MAX_SPLITS=tiles.max_splits,
            OFFSET_TYPE=self.offset_type,
            NUM_STAGES=tiles.num_stages,
            num_warps=tiles.num_warps,
            maxnreg=tiles.max_registers,
            **self.constants,
        )

    def _decode(self, num_requests: int, arguments: tuple[Any, ...]) -> None:
        tiles = self.decode_tiles
        # With a part per request beside the whole ones, what is rounded up has room too.
        decode_kernel[(self.num_kv_heads, self.programs_per_head + num_requests)](
            *arguments,
            self.split_starts,
            self.partial,
            self.lse,
            self.num_arrived,
            num_requests,
            NUM_KV_HEADS=self.num_kv_heads,
            GROUP_BLOCK=tiles.rows,
            TILE_K=tiles.keys,
            MAX_SPLITS=MAX_SPLITS,
            NUM_STAGES=tiles.num_stages,
            num_warps=tiles.num_warps,
            **self.constants,
        )
