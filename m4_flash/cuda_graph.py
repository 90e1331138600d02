"""Small steps as CUDA graphs: all launches of a step, recorded once, are one call.

A launch costs the host more than most kernels of a small step cost the device. A graph replays
the same launches on the same addresses, so inputs and outputs live in buffers that never move,
and a step is padded to the next captured shape.
"""

import gc
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from folovllm.sampling.tensors import Noise
from folovllm.transfer import aligned_offsets

from .input_batch import HostBatch, InputBatch

RunStepFn = Callable[[InputBatch, Noise, torch.Tensor], torch.Tensor]
"""(batch, noise, logits [num_requests, vocab_size], written) -> choices [2, num_requests]."""


class StepShape(NamedTuple):
    """What a graph is captured for; a step of fewer tokens and requests is padded to it."""

    num_tokens: int
    num_requests: int


def decode_shapes(max_size: int) -> list[StepShape]:
    """One token of 1, 2, 4 requests, of multiples of 8 to 64 and of 16 beyond, and of max_size."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, max_size, 16)]
    return [StepShape(size, size) for size in (*(s for s in sizes if s < max_size), max_size)]


def prompt_shapes(max_len: int) -> list[StepShape]:
    """One request of up to 64, 128, … tokens, and of max_len."""
    lengths = [64 << doubling for doubling in range(max_len.bit_length())]
    shorter = [length for length in lengths if length < max_len]
    return [StepShape(length, 1) for length in (*shorter, *([max_len] if max_len > 1 else []))]


class PinnedColumns:
    """Named by position: arrays of fixed length in pinned host memory, and their twins."""

    def __init__(self, lengths: Sequence[int], dtypes: Sequence[Any], device: torch.device) -> None:
        sizes = [n * np.dtype(dtype).itemsize for n, dtype in zip(lengths, dtypes, strict=True)]
        *offsets, end = aligned_offsets(sizes)
        self._pinned = torch.zeros(end, dtype=torch.uint8, pin_memory=True)
        self._twin = torch.zeros(end, dtype=torch.uint8, device=device)
        self.host: list[np.ndarray] = []
        self.device: list[torch.Tensor] = []
        for offset, size, dtype in zip(offsets, sizes, dtypes, strict=True):
            window = slice(offset, offset + size)
            self.host.append(self._pinned.numpy()[window].view(dtype))
            torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
            self.device.append(self._twin[window].view(torch_dtype))

    def upload(self, columns: Iterable[np.ndarray], paddings: Iterable[int]) -> None:
        """Fill the front with `columns` and the rest with `paddings`, in one copy.

        What there is no column for is left out. The copy before must be done: an engine waits for
        every step's tokens, so it is.
        """
        for target, values, padding in zip(self.host, columns, paddings, strict=False):
            target[: len(values)] = values
            if len(values) < len(target):
                target[len(values) :] = padding
        self._twin.copy_(self._pinned, non_blocking=True)


class StepGraph:
    """A step of one shape, ready to be filled and replayed."""

    def __init__(self, shape: StepShape, logits: torch.Tensor) -> None:
        """logits: see StepGraphs."""
        num_tokens, num_requests = shape
        self.logits = logits[:num_requests]
        """[num_requests, vocab_size], of the last replay of any shape."""
        self.choices = torch.empty((2, num_requests), dtype=torch.int64, device=logits.device)
        """[2, num_requests] int64, see SampledTokens; rows of padding hold anything."""
        is_decode = num_tokens == num_requests
        # In a decode step request i is row i, always: nothing to upload.
        lengths = [num_tokens] * 3 + [num_requests] * 4 + ([] if is_decode else [num_requests + 1])
        dtypes = HostBatch.dtypes()[: len(lengths)]
        self._inputs = PinnedColumns(lengths, dtypes, logits.device)
        rows = torch.arange(num_requests + 1, dtype=torch.int32, device=logits.device)
        self.batch = InputBatch(
            *self._inputs.device,
            *([rows] if is_decode else []),
            # A prompt of one token is a decode step, so that a graph launches one kernel.
            min_query_len=1 if is_decode else 2,
            max_query_len=1 if is_decode else num_tokens,
        )
        noise_dtypes = (np.float32, np.int64, np.int64)
        self._noise = PinnedColumns([num_requests] * 3, noise_dtypes, logits.device)
        self.noise = Noise(*self._noise.device)
        self._is_greedy = True
        self.graph = torch.cuda.CUDAGraph()

    def fill(self, host_batch: HostBatch) -> InputBatch:
        """Put a step's inputs where the graph reads them."""
        self._inputs.upload(host_batch.columns(), host_batch.paddings())
        return self.batch

    def set_noise(self, noise: Sequence[np.ndarray]) -> None:
        """noise: as `Sampler.collect_noise` returns it; empty for a batch of greedy requests."""
        if noise or not self._is_greedy:
            self._noise.upload(noise or [np.empty(0)] * 3, (0, 0, 0))
        self._is_greedy = not noise


class StepGraphs:
    """Captured steps of several shapes, which share their memory.

    Capturing happens at start-up, largest shape first, so that smaller ones fit into the memory of
    the larger, and no request waits for it.
    """

    def __init__(
        self,
        shapes: Sequence[StepShape],
        nothing: HostBatch,
        logits: torch.Tensor,
        run_step: RunStepFn,
    ) -> None:
        """nothing: a batch without requests, whose paddings fill graphs while they are recorded.

        logits: [most requests of a shape, vocab_size], where every shape writes its logits.
        ValueError if the device's memory does not suffice.
        """
        start = time.perf_counter()
        self.graphs: dict[StepShape, StepGraph] = {}
        self._decode_shapes = sorted(s for s in shapes if s.num_tokens == s.num_requests)
        self._prompt_shapes = sorted(s for s in shapes if s.num_tokens > s.num_requests)
        # One stream for all: the matrix library keeps a workspace for every stream it has seen.
        stream, pool = torch.cuda.Stream(logits.device), torch.cuda.graph_pool_handle()
        try:
            with _without_garbage_collection():
                torch.cuda.empty_cache()  # capturing does it too: it would hide what graphs take
                free_before, _ = torch.cuda.mem_get_info(logits.device)
                for shape in sorted(shapes, reverse=True):
                    self.graphs[shape] = StepGraph(shape, logits)
                    self.graphs[shape].fill(nothing)
                    self._capture(self.graphs[shape], run_step, stream, pool)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"no memory is left to capture CUDA graphs of up to {max(shapes).num_tokens} "
                f"tokens; lower kv_cache_bytes, gpu_memory_utilization, max_graph_size or "
                f"max_graph_prompt_len, or set enforce_eager"
            ) from error
        torch.cuda.synchronize(logits.device)
        free_after, _ = torch.cuda.mem_get_info(logits.device)
        self.capture_s = time.perf_counter() - start
        self.num_bytes = free_before - free_after
        """Device memory that the graphs took."""

    def _capture(
        self, graph: StepGraph, run_step: RunStepFn, stream: torch.cuda.Stream, pool: Any
    ) -> None:
        """Run the step once, which compiles kernels and loads libraries, then record it."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run_step(graph.batch, graph.noise, graph.logits)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph.graph, pool=pool, stream=stream):
            graph.choices.copy_(run_step(graph.batch, graph.noise, graph.logits))

    def find(self, num_tokens: int, num_requests: int) -> StepGraph | None:
        """The graph of the smallest shape that holds such a step; None if there is none."""
        if num_tokens == num_requests:
            shapes = self._decode_shapes
        elif num_requests == 1:
            shapes = self._prompt_shapes
        else:
            return None
        index = bisect_left(shapes, (num_tokens, num_requests))
        return self.graphs[shapes[index]] if index < len(shapes) else None

    def reading(self, batch: InputBatch) -> StepGraph | None:
        """The graph whose buffers this batch is; None if it is no graph's."""
        shape = StepShape(len(batch.input_ids), len(batch.seq_lens))
        graph = self.graphs.get(shape)
        return graph if graph is not None and graph.batch is batch else None


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Graphs of an engine that is gone must not be destroyed while another one is recorded."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
