"""Matrices of the transformer: the one kind of part whose weights may be stored in another format.

A stage may put something else in their place (`LLM.linears`); whatever it is, the transformer
calls it, and the loader asks it where the tensors of a checkpoint belong.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ..kernels.selection import Kernels


class Part:
    """A part of a model: its attributes are tensors, other parts, and what it needs to compute."""


class Slice(NamedTuple):
    """Outputs of a merged matrix that a checkpoint has as a matrix of their own."""

    name: str
    """As in the checkpoint: `q_proj`."""
    num_outputs: int


class LinearLayer(Protocol):
    """y = x W^T + b, in whatever way W is stored. Starts uninitialised. Also a `Part`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, in_features]; result: [num_tokens, out_features]."""

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """silu of the first half of the outputs times the second half."""

    def targets(self, slices: Sequence[Slice]) -> dict[str, torch.Tensor]:
        """Name of a tensor in a checkpoint (`q_proj.weight`) -> where it is to be copied to.

        slices: the checkpoint's matrices, in the order in which they make up this one.
        """

    def optional(self, slices: Sequence[Slice]) -> frozenset[str]:
        """Those of the targets that a checkpoint may leave out."""

    def finish(self) -> None:
        """Called once, when all targets are filled that the checkpoint has."""

    def finish_part(self, first_input: int) -> None:
        """Instead of `finish`, if the whole matrix has more inputs, and these from first_input on.
        ValueError if the format cannot be cut there."""

    def randomize(self, generator: torch.Generator) -> None:
        """Fill with random weights instead; biases are 0."""

    @property
    def num_parameters(self) -> int:
        """Weights and biases, however they are stored."""


class LinearFactory(Protocol):
    """Makes a matrix on the device and in the dtype of `like`."""

    def __call__(
        self,
        in_features: int,
        out_features: int,
        has_bias: bool,
        kernels: Kernels,
        like: torch.Tensor,
    ) -> Any: ...


INITIAL_STD = 0.02
"""Standard deviation of random weights; what the published models were initialised with."""


class Linears(NamedTuple):
    """What makes the matrices of a model."""

    of_layers: LinearFactory
    of_head: LinearFactory | None = None
    """None: logits come from a table as it is, which may be the embedding's."""


LinearsOf = Callable[[dict[str, Any] | None], Linears]
"""What matrices a checkpoint wants, by the quantisation that its config names (None: none).
ValueError if they cannot be had."""


class Linear(Part):
    """The weights as they are; weight: [out_features, in_features]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        has_bias: bool,
        kernels: Kernels,
        like: torch.Tensor,
    ) -> None:
        self.kernels = kernels
        self.weight = like.new_empty(out_features, in_features)
        self.bias = like.new_empty(out_features) if has_bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernels.linear(x, self.weight, self.bias)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernels.gated_linear(x, self.weight, self.bias)

    def targets(self, slices: Sequence[Slice]) -> dict[str, torch.Tensor]:
        targets, start = {}, 0
        for name, num_outputs in slices:
            rows = slice(start, start + num_outputs)
            targets[f"{name}.weight"] = self.weight[rows]
            if self.bias is not None:
                targets[f"{name}.bias"] = self.bias[rows]
            start += num_outputs
        return targets

    def optional(self, slices: Sequence[Slice]) -> frozenset[str]:
        return frozenset()

    def finish(self) -> None: ...

    def finish_part(self, first_input: int) -> None: ...

    def randomize(self, generator: torch.Generator) -> None:
        self.weight.normal_(0.0, INITIAL_STD, generator=generator)
        if self.bias is not None:
            self.bias.zero_()

    @property
    def num_parameters(self) -> int:
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())


PLAIN = Linears(Linear)


def plain_linears(quantization: dict[str, Any] | None) -> Linears:
    """Refuses every quantised checkpoint."""
    if quantization is not None:
        raise ValueError(
            f"this checkpoint is quantised ({quantization.get('quant_method')}); give an "
            f"unquantised one, or run it in a stage that computes with such weights"
        )
    return PLAIN
