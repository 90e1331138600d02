"""What ranks say to each other within a step. All ranks call the same in the same order."""

from typing import Protocol

import torch
import torch.distributed as dist

from .ranks import ALONE, Ranks


class Collectives(Protocol):
    @property
    def ranks(self) -> Ranks: ...
    @property
    def num_ranks(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, the same bits on each; may be `x` itself, overwritten."""

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_rows, n] on each rank; result: [num_rows, size * n], ranks in their order."""

    def largest(self, numbers: torch.Tensor) -> torch.Tensor:
        """numbers: [n] int64 on each rank; the largest of each place; may be `numbers` itself."""

    def least(self, number: int) -> int:
        """The smallest of what the ranks give."""


class Alone:
    """A process that holds the whole model."""

    ranks = ALONE
    num_ranks = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def largest(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers

    def least(self, number: int) -> int:
        return number


class ProcessGroup:
    """The processes of torch.distributed's default group: NCCL on CUDA, gloo on CPUs."""

    def __init__(self, device: torch.device) -> None:
        self.ranks = Ranks(dist.get_rank(), dist.get_world_size())
        self.num_ranks = self.ranks.size
        self._device = device

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x.new_empty(x.shape) for _ in range(self.ranks.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=1)

    def largest(self, numbers: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers

    def least(self, number: int) -> int:
        tensor = torch.tensor(number, dtype=torch.int64, device=self._device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)
