"""Small steps as CUDA graphs: all launches of a step, recorded once, are one call.

A launch costs the host more than most kernels of a small step cost the device. A graph replays
the same launches on the same addresses, so inputs and outputs live in buffers that never move,
and a step is padded to the next captured shape.
"""

import gc
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch

from folovllm.sampling.tensors import Noise
from folovllm.transfer import PinnedColumns

from .block_tables import BlockTables
from .input_batch import HostBatch, InputBatch, empty_batch, paddings

_MOST_PAIRS = 2048 * 16384
"""In a captured step; beyond, a layer's attention alone takes the device some 0.6 ms."""

RunStepFn = Callable[[InputBatch[torch.Tensor], Noise, torch.Tensor], torch.Tensor]
"""(batch, noise, logits [num_requests, vocab_size], written) -> choices [2, num_requests]."""


class StepShape(NamedTuple):
    """What a graph is captured for; a step of fewer tokens and requests is padded to it."""

    num_tokens: int
    num_requests: int


def decode_shapes(max_size: int) -> list[StepShape]:
    """One token of 1, 2, 4 requests, of multiples of 8 to 64 and of 16 beyond, and of max_size."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, max_size, 16)]
    return [StepShape(size, size) for size in (*(s for s in sizes if s < max_size), max_size)]


def mixed_lengths(max_tokens: int) -> list[int]:
    """64, 128, 256, then half as many more and double, …, and max_tokens tokens."""
    doublings = [64 << doubling for doubling in range(max_tokens.bit_length())]
    lengths = sorted([*doublings, *(length // 2 * 3 for length in doublings if length > 128)])
    return [*(length for length in lengths if length < max_tokens), max_tokens]


def mixed_shapes(max_tokens: int, max_size: int) -> list[StepShape]:
    """Up to each of `mixed_lengths` tokens, of up to 1, 8, 32 and max_size requests."""
    sizes = [*(size for size in (1, 8, 32) if size < max_size), max_size]
    return [
        StepShape(length, size)
        for length in mixed_lengths(max_tokens)
        for size in sizes
        if length > size
    ]


class Graph(Protocol):
    """Launches that were recorded."""

    def replay(self) -> None: ...


class GraphRecorder:
    """Records launches, all on one stream and into one pool of memory.

    Only one graph runs at a time, so they may share memory; and the matrix library keeps a
    workspace for every stream that it has seen.
    """

    num_bytes: int = 0
    """Device memory that the graphs took, once the session is over."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def session(self) -> Iterator[None]:
        """Around all recordings: nothing else may happen to the device's memory."""
        gc.collect()
        was_enabled = gc.isenabled()
        # Graphs of an engine that is gone must not be destroyed while another one is recorded.
        gc.disable()
        try:
            torch.cuda.empty_cache()  # recording does it too: it would hide what graphs take
            free_before, _ = torch.cuda.mem_get_info(self.device)
            yield
            torch.cuda.synchronize(self.device)
            free_after, _ = torch.cuda.mem_get_info(self.device)
            self.num_bytes = free_before - free_after
        finally:
            if was_enabled:
                gc.enable()

    def record(self, run: Callable[[], object]) -> Graph:
        """Run once, which compiles kernels and loads libraries, then again to record it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            run()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            run()
        return graph


class StepGraph:
    """A step of one shape, ready to be filled and replayed."""

    def __init__(
        self,
        shape: StepShape,
        block_tables: BlockTables,
        logits: torch.Tensor,
        run_step: RunStepFn,
        recorder: GraphRecorder,
    ) -> None:
        """logits: see StepGraphs."""
        num_tokens, num_requests = shape
        self.block_tables = block_tables
        self.logits = logits[:num_requests]
        """[num_requests, vocab_size], of the last replay of any shape."""
        self.choices = torch.empty((2, num_requests), dtype=torch.int64, device=logits.device)
        """[2, num_requests] int64, see SampledTokens; rows of padding hold anything."""
        is_decode = num_tokens == num_requests
        # In a decode step request i is row i, always: nothing to upload.
        lengths = [num_tokens] * 3 + [num_requests] * 4 + ([] if is_decode else [num_requests + 1])
        dtypes = [column.dtype for column in empty_batch().columns[: len(lengths)]]
        self._inputs = PinnedColumns(lengths, dtypes, logits.device)
        rows = torch.arange(num_requests + 1, dtype=torch.int32, device=logits.device)
        # A prompt alone in its step has no single queries beside it: a graph launches one kernel.
        query_lens = (1, 1) if is_decode else (2 if num_requests == 1 else 1, num_tokens)
        columns = [*self._inputs.device, *([rows] if is_decode else [])]
        self.batch = InputBatch[torch.Tensor]._make([*columns, *query_lens, num_tokens])
        self._noise = PinnedColumns(
            [num_requests] * 3, [np.float32, np.int64, np.int64], logits.device
        )
        self.noise = Noise(*self._noise.device)
        self._is_greedy = True
        self.fill(empty_batch())
        self.graph = recorder.record(
            lambda: self.choices.copy_(run_step(self.batch, self.noise, self.logits))
        )

    def fill(self, batch: HostBatch) -> None:
        """Put a step's inputs where the graph reads them."""
        self._inputs.upload(batch.columns, paddings(len(batch.input_ids), self.block_tables))

    def set_noise(self, noise: Sequence[np.ndarray]) -> None:
        """noise: as `Sampler.collect_noise` returns it; empty for a batch of greedy requests."""
        if noise or not self._is_greedy:
            self._noise.upload(noise or [np.empty(0)] * 3, (0, 0, 0))
        self._is_greedy = not noise


class StepGraphs:
    """Captured steps of several shapes.

    Capturing happens at start-up, largest shape first, so that smaller ones fit into the memory of
    the larger, and no request waits for it.
    """

    def __init__(
        self,
        shapes: Sequence[StepShape],
        block_tables: BlockTables,
        logits: torch.Tensor,
        run_step: RunStepFn,
        recorder: GraphRecorder,
    ) -> None:
        """logits: [most requests of a shape, vocab_size], where every shape writes its logits.

        ValueError if the device's memory does not suffice.
        """
        start = time.perf_counter()
        self.graphs: dict[StepShape, StepGraph] = {}
        self._decode_shapes = sorted(s for s in shapes if s.num_tokens == s.num_requests)
        self._mixed_shapes = sorted(s for s in shapes if s.num_tokens > s.num_requests)
        try:
            with recorder.session():
                for shape in sorted(shapes, reverse=True):
                    self.graphs[shape] = StepGraph(shape, block_tables, logits, run_step, recorder)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"no memory is left to capture CUDA graphs of up to {max(shapes).num_tokens} "
                f"tokens; lower kv_cache_bytes, gpu_memory_utilization, max_graph_size or "
                f"max_graph_tokens, or set enforce_eager"
            ) from error
        self.capture_s = time.perf_counter() - start
        self.num_bytes = recorder.num_bytes
        """Device memory that the graphs took."""

    def find(self, num_tokens: int, num_requests: int, num_pairs: int = 0) -> StepGraph | None:
        """The graph of the smallest shape that holds such a step; None if there is none.

        num_pairs: of a query and a key that it may see, at most, in one request. None if there
        are so many that the device is slower than a host that launches every kernel by itself:
        those kernels are told how long contexts are, and choose their tiles by that.
        """
        if num_pairs > _MOST_PAIRS:
            return None
        if num_tokens == num_requests:
            index = bisect_left(self._decode_shapes, (num_tokens, num_requests))
            fitting = self._decode_shapes[index : index + 1]
        else:
            fitting = [
                shape
                for shape in self._mixed_shapes
                if shape.num_tokens >= num_tokens and shape.num_requests >= num_requests
            ]
        return self.graphs[fitting[0]] if fitting else None
