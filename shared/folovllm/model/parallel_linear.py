"""Matrices whose inputs are shared out: every rank multiplies its part, and the sums are added."""

from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.selection import Kernels
from .collectives import Collectives
from .linear import LinearFactory, LinearLayer, Part, Slice


class InputParallel(Part):
    """y = x W^T + b of which x and W have this rank's columns.

    Matrices whose outputs are shared out need nothing like it: their parts are smaller matrices.
    """

    def __init__(self, inner: LinearLayer, in_features: int, collectives: Collectives) -> None:
        self.inner, self.in_features, self.collectives = inner, in_features, collectives

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.collectives.all_reduce(self.inner(x))

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("a gate needs whole sums; no matrix of a model wants this")

    def targets(self, slices: Sequence[Slice]) -> dict[str, torch.Tensor]:
        return self.inner.targets(slices)

    def optional(self, slices: Sequence[Slice]) -> frozenset[str]:
        return self.inner.optional(slices)

    def finish(self) -> None:
        rank = self.collectives.ranks.rank
        self.inner.finish_part(rank * self.in_features)
        bias = getattr(self.inner, "bias", None)
        if bias is not None and rank:
            bias.zero_()  # every rank has read it, and it is added once

    def finish_part(self, first_input: int) -> None:
        raise NotImplementedError("this is a part already")

    def randomize(self, generator: torch.Generator) -> None:
        self.inner.randomize(generator)

    @property
    def num_parameters(self) -> int:
        return self.inner.num_parameters


def input_parallel(linear: LinearFactory, collectives: Collectives) -> LinearFactory:
    """`linear`, for matrices that are given a part of their inputs."""
    if collectives.ranks.size == 1:
        return linear

    def make(
        in_features: int,
        out_features: int,
        has_bias: bool,
        kernels: Kernels,
        like: torch.Tensor,
    ) -> Any:
        inner = linear(in_features, out_features, has_bias, kernels, like)
        return InputParallel(inner, in_features, collectives)

    return make
