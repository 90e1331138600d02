"""Decode steps as CUDA graphs: all launches of a step, recorded once, are one call.

A launch costs the host more than most kernels of a decode step cost the device. A graph replays
the same launches on the same addresses, so inputs and outputs live in buffers that never move,
and a batch is padded to the next captured size.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from folovllm.sampling_tensors import Noise

from .input_batch import HostBatch, InputBatch

RunStepFn = Callable[[InputBatch, Noise, torch.Tensor], torch.Tensor]
"""(batch, noise, logits [num_requests, vocab_size], written) -> choices [2, num_requests]."""


class _Twin(NamedTuple):
    """The same bytes in pinned host memory and on the device."""

    host: torch.Tensor
    device: torch.Tensor

    def upload(self) -> None:
        self.device.copy_(self.host, non_blocking=True)


class DecodeGraph:
    """The decode step of up to `size` requests, ready to be replayed."""

    def __init__(self, size: int, padding: HostBatch, logits: torch.Tensor) -> None:
        """padding: what an unused row holds, as a batch of one request; logits: see DecodeGraphs.

        The buffers start as `size` rows of padding.
        """
        self.size = size
        self.logits = logits[:size]
        """[size, vocab_size], of the last replay of any size."""
        self.choices = torch.empty((2, size), dtype=torch.int64, device=logits.device)
        """[2, size] int64, see SampledTokens; rows of padding hold anything."""
        arrays = [np.repeat(column, size) for column in padding.columns()]
        num_bytes = [-(-array.nbytes // 8) * 8 for array in arrays]
        self.twin = _Twin(
            torch.zeros(sum(num_bytes), dtype=torch.uint8, pin_memory=True),
            torch.zeros(sum(num_bytes), dtype=torch.uint8, device=logits.device),
        )
        self.columns: list[np.ndarray] = []
        tensors, offset = [], 0
        for array, length in zip(arrays, num_bytes, strict=True):
            window = slice(offset, offset + array.nbytes)
            self.columns.append(self.twin.host.numpy()[window].view(array.dtype))
            self.columns[-1][:] = array
            tensors.append(self.twin.device[window].view(torch.from_numpy(array).dtype))
            offset += length
        self.paddings = [column[0] for column in padding.columns()]
        self.twin.upload()
        self.batch = InputBatch.of_single_tokens(tensors)
        self.noise = Noise(
            temperatures=torch.zeros(size, dtype=torch.float32, device=logits.device),
            seeds=torch.zeros(size, dtype=torch.int64, device=logits.device),
            positions=torch.zeros(size, dtype=torch.int64, device=logits.device),
        )
        self.has_noise = False
        self.graph = torch.cuda.CUDAGraph()

    def fill(self, host_batch: HostBatch) -> InputBatch:
        """Put a step's inputs where the graph reads them, in one copy."""
        num_requests = host_batch.num_requests
        for column, values, padding in zip(
            self.columns, host_batch.columns(), self.paddings, strict=True
        ):
            column[:num_requests] = values
            column[num_requests:] = padding
        self.twin.upload()
        return self.batch

    def set_noise(self, noise: Sequence[np.ndarray]) -> None:
        """noise: as `Sampler.collect_noise` returns it; empty for a batch of greedy requests."""
        if not noise:
            if self.has_noise:
                self.noise.temperatures.zero_()
                self.has_noise = False
            return
        num_requests = len(noise[0])
        columns = (self.noise.temperatures, self.noise.seeds, self.noise.positions)
        for column, values in zip(columns, noise, strict=True):
            column[:num_requests].copy_(torch.from_numpy(values).pin_memory(), non_blocking=True)
        self.has_noise = True


class DecodeGraphs:
    """Captured decode steps of several sizes, which share their memory.

    Capturing happens at start-up, largest size first, so that smaller ones fit into the memory of
    the larger, and no request waits for it.
    """

    def __init__(
        self, sizes: Sequence[int], padding: HostBatch, logits: torch.Tensor, run_step: RunStepFn
    ) -> None:
        """logits: [max(sizes), vocab_size], where every size writes its logits.

        ValueError if the device's memory does not suffice.
        """
        start = time.perf_counter()
        torch.cuda.empty_cache()  # capturing does it too, which would hide what graphs take
        free_before, _ = torch.cuda.mem_get_info(logits.device)
        self.graphs: dict[int, DecodeGraph] = {}
        # One stream for all: the matrix library keeps a workspace for every stream it has seen.
        stream, pool = torch.cuda.Stream(logits.device), torch.cuda.graph_pool_handle()
        try:
            for size in sorted(sizes, reverse=True):
                self.graphs[size] = DecodeGraph(size, padding, logits)
                self._capture(self.graphs[size], run_step, stream, pool)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"no memory is left to capture CUDA graphs of up to {max(sizes)} requests; lower "
                f"kv_cache_bytes, gpu_memory_utilization or max_graph_size, or set enforce_eager"
            ) from error
        torch.cuda.synchronize(logits.device)
        free_after, _ = torch.cuda.mem_get_info(logits.device)
        self.capture_s = time.perf_counter() - start
        self.num_bytes = free_before - free_after
        """Device memory that the graphs took."""

    def _capture(
        self, graph: DecodeGraph, run_step: RunStepFn, stream: torch.cuda.Stream, pool: Any
    ) -> None:
        """Run the step once, which compiles kernels and loads libraries, then record it."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run_step(graph.batch, graph.noise, graph.logits)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph.graph, pool=pool, stream=stream):
            graph.choices.copy_(run_step(graph.batch, graph.noise, graph.logits))

    def size_for(self, num_requests: int) -> int | None:
        """The smallest captured size that holds so many requests; None if all are too small."""
        return min((size for size in self.graphs if size >= num_requests), default=None)

    def find(self, batch: InputBatch) -> DecodeGraph | None:
        """The graph that reads this batch, if it is a graph's."""
        graph = self.graphs.get(len(batch.input_ids))
        return graph if graph is not None and graph.batch is batch else None


def capture_sizes(max_size: int) -> list[int]:
    """1, 2, 4, then multiples of 8 to 64 and of 16 beyond, and max_size itself."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, max_size, 16)]
    return [size for size in sizes if size < max_size] + [max_size]
