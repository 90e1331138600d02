"""Device-side storage of keys and values."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from folovllm.model.config import kv_bytes_per_token
from folovllm.model.transformer import CausalLM
from folovllm.transfer import upload

from .config import EngineConfig
from .kv_cache_manager import BlockCopy, CopyKind


class KVCache:
    """Keys and values of all running requests in blocks, and of swapped ones in host memory.

    kv: [2, num_layers, num_blocks, block_size, num_kv_heads, head_dim], keys first;
    keys[layer_idx], values[layer_idx] are views of it. swapped: [num_swap_blocks, 2, num_layers,
    block_size, num_kv_heads, head_dim] in pinned memory, a block in one piece, so that the device
    copies from and to it by itself while the host goes on.
    """

    def __init__(self, config: EngineConfig, model: CausalLM, num_bytes: int) -> None:
        block_bytes = config.block_size * kv_bytes_per_token(model.config, model.dtype)
        # More than every request at its full length could never be used.
        blocks_per_request = -(-config.max_model_len // config.block_size)
        num_blocks = min(num_bytes // block_bytes, blocks_per_request * config.max_num_seqs)
        if num_blocks < blocks_per_request:
            raise ValueError(
                f"one request of max_model_len {config.max_model_len} takes {blocks_per_request} "
                f"blocks of {block_bytes} bytes but only {num_bytes} are there for the KV cache; "
                f"lower max_model_len or raise kv_cache_bytes"
            )
        self.num_tokens = num_blocks * config.block_size
        block_shape = (config.block_size, model.config.num_kv_heads, model.config.head_dim)
        self.kv = torch.empty(
            (2, model.config.num_layers, num_blocks, *block_shape),
            dtype=model.dtype,
            device=model.device,
        )
        self.keys, self.values = self.kv
        self.swapped = torch.empty(
            (config.num_swap_blocks, 2, model.config.num_layers, *block_shape),
            dtype=model.dtype,
            pin_memory=model.device.type == "cuda" and config.num_swap_blocks > 0,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes held on the device, used or not."""
        return self.kv.nbytes

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Perform the copies as if one after the other: a later one may read an earlier one's.

        Only queues work on the device, whose order also keeps the host memory right.
        """
        for run in _independent_runs(copies):
            sources = np.array([copy.source for copy in run], dtype=np.int64)
            destinations = np.array([copy.destination for copy in run], dtype=np.int64)
            if run[0].kind is CopyKind.COPY_ON_WRITE:
                # As rows of a matrix: along an axis in the middle, torch launches a kernel for
                # every 2 GiB that the tensor has.
                rows = self.kv.view(-1, self.kv[0, 0, 0].numel())
                firsts = np.arange(0, len(rows), self.kv.shape[2])[:, None]
                places = ((firsts + sources).ravel(), (firsts + destinations).ravel())
                read, write = upload(places, self.kv.device)
                rows.index_copy_(0, write, rows.index_select(0, read))
            elif run[0].kind is CopyKind.SWAP_OUT:
                (read,) = upload((sources,), self.kv.device)
                blocks = self.kv.index_select(2, read).movedim(2, 0).contiguous()
                for block, destination in zip(blocks, destinations, strict=True):
                    self.swapped[destination].copy_(block, non_blocking=True)
            else:
                (write,) = upload((destinations,), self.kv.device)
                blocks = self.kv.new_empty(len(run), *self.swapped.shape[1:])
                for block, source in zip(blocks, sources, strict=True):
                    block.copy_(self.swapped[source], non_blocking=True)
                self.kv.index_copy_(2, write, blocks.movedim(0, 2))


def _independent_runs(copies: Sequence[BlockCopy]) -> Iterator[list[BlockCopy]]:
    """Split into runs of one kind in which no copy reads or writes what an earlier one wrote."""
    run: list[BlockCopy] = []
    written: set[int] = set()
    for copy in copies:
        is_device_copy = copy.kind is CopyKind.COPY_ON_WRITE
        reads_written = is_device_copy and copy.source in written
        if run and (copy.kind is not run[0].kind or copy.destination in written or reads_written):
            yield run
            run, written = [], set()
        run.append(copy)
        written.add(copy.destination)
    if run:
        yield run
