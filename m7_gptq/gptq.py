"""GPTQ: rounds a matrix column by column and lets the columns that are left make up for it.

What a layer computes is what should stay the same, not its weights: with inputs X the error of
rounded weights Q is |WX - QX|², whose second derivative in a row of weights is H = 2XX^T for every
row. Optimal brain surgeon (Hassibi & Stork 1993) says what the other weights of a row must become
when one is fixed; GPTQ (Frantar et al. 2022, arXiv 2210.17323) fixes all rows' weights in the same
order, so that one inverse serves all, and takes all its rows at once from a Cholesky factor.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

_BLOCK = 128
"""Columns after which the rest of the matrix is brought up to date (lazy updates), however wide the
groups are."""
_MSE_STEPS, _MSE_LEAST, _MSE_NORM = 100, 0.2, 2.4
"""Search of ranges: steps of a hundredth, down to a fifth, by the error to the power of 2.4."""


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How matrices are quantised."""

    bits: int = 4
    group_size: int = 128
    """Input columns that share a scale and a zero point, in each row; -1: all of them."""
    sym: bool = True
    """The zero point is the middle of the range, and no parameter."""
    desc_act: bool = False
    """Act order: columns of the largest inputs are rounded first, while there is most to adjust."""
    static_groups: bool = False
    """With desc_act: groups stay columns that are neighbours, with scales of the weights as given;
    else a group is what is rounded one after the other."""
    mse: bool = False
    """Shrink ranges where that lowers the error of rounding."""
    damp_percent: float = 0.01
    """Part of the mean of H's diagonal that is added to it, so that it has an inverse."""

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits must be 2, 3, 4 or 8, got {self.bits}")
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise ValueError(
                f"group_size must be a multiple of 8, or -1 for one group, got {self.group_size}"
            )
        if self.static_groups and not self.desc_act:
            raise ValueError("static_groups orders columns within desc_act; set desc_act as well")
        if not 0.0 < self.damp_percent < 1.0:
            raise ValueError(f"damp_percent must be in (0, 1), got {self.damp_percent}")

    def columns_per_group(self, num_inputs: int) -> int:
        """Of all groups but the last, which may have fewer."""
        return num_inputs if self.group_size == -1 else self.group_size


class Grid(NamedTuple):
    """What the integers of a group stand for: w = (q - zero) * scale."""

    scale: torch.Tensor
    """[num_outputs] float32"""
    zero: torch.Tensor
    """[num_outputs] float32, whole numbers"""
    num_levels: int

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Nearest integers, float32 in [0, num_levels); weight: [num_outputs] or [.., columns]."""
        scale, zero = self._like(weight)
        return torch.clamp(torch.round(weight / scale) + zero, 0, self.num_levels - 1)

    def value(self, rounded: torch.Tensor) -> torch.Tensor:
        scale, zero = self._like(rounded)
        return (rounded - zero) * scale

    def _like(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if weight.dim() == 1:
            return self.scale, self.zero
        return self.scale[:, None], self.zero[:, None]


class QuantizedMatrix(NamedTuple):
    """Integers of a matrix, and what they stand for: w[o, i] = (q - zero[g]) * scale[g], g of i."""

    q: torch.Tensor
    """[num_outputs, num_inputs] uint8, columns in the matrix's own order"""
    scales: torch.Tensor
    """[num_groups, num_outputs] float32"""
    zeros: torch.Tensor
    """[num_groups, num_outputs] int32"""
    g_idx: torch.Tensor
    """[num_inputs] int32, the group of each column"""

    def dequantize(self) -> torch.Tensor:
        """[num_outputs, num_inputs] float32"""
        groups = self.g_idx.to(torch.int64)
        scales, zeros = self.scales[groups].t(), self.zeros[groups].t()
        return (self.q.to(torch.float32) - zeros) * scales


class Hessian:
    """The sum of 2XX^T over calibration inputs, kept as a mean so that it does not overflow."""

    def __init__(self, num_inputs: int, device: torch.device) -> None:
        self.matrix = torch.zeros((num_inputs, num_inputs), dtype=torch.float32, device=device)
        """[num_inputs, num_inputs]"""
        self.total_weight = 0.0
        """Of all tokens: their number, if each counts once."""

    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """x: [num_tokens, num_inputs], what the matrix is multiplied with.

        weights: [num_tokens] float32, how often each token counts; None: once.
        """
        x = x.to(torch.float32)
        added = float(len(x))
        if weights is not None:
            added = weights.sum().item()
            x = x * weights.sqrt()[:, None]
        total = self.total_weight + added
        self.matrix *= self.total_weight / total
        self.matrix.addmm_(x.t(), x, alpha=2.0 / total)
        self.total_weight = total


def find_grid(weight: torch.Tensor, config: QuantizationConfig) -> Grid:
    """The grid of a group. weight: [num_outputs, columns] float32; a row of zeros has any grid."""
    num_levels = 1 << config.bits
    low, high = weight.amin(dim=1).clamp(max=0), weight.amax(dim=1).clamp(min=0)
    if config.sym:
        high = torch.maximum(-low, high)
        low = -high
    is_zero = low == high
    low, high = torch.where(is_zero, -1.0, low), torch.where(is_zero, 1.0, high)
    grid = _grid_of(low, high, num_levels, config)
    if not config.mse:
        return grid
    best = _error(grid, weight)
    for step in range(1, int(_MSE_STEPS * (1 - _MSE_LEAST))):
        part = 1 - step / _MSE_STEPS
        shrunk = _grid_of(part * low, part * high, num_levels, config)
        error = _error(shrunk, weight)
        is_better = error < best
        best = torch.where(is_better, error, best)
        scale = torch.where(is_better, shrunk.scale, grid.scale)
        grid = Grid(scale, torch.where(is_better, shrunk.zero, grid.zero), num_levels)
    return grid


def _grid_of(
    low: torch.Tensor, high: torch.Tensor, num_levels: int, config: QuantizationConfig
) -> Grid:
    # What a checkpoint stores is what is rounded with: scales are float16 there.
    scale = ((high - low) / (num_levels - 1)).to(torch.float16).to(torch.float32)
    scale = scale.clamp(min=torch.finfo(torch.float16).tiny)
    if config.sym:
        return Grid(scale, torch.full_like(scale, num_levels // 2), num_levels)
    return Grid(scale, torch.round(-low / scale).clamp(0, num_levels - 1), num_levels)


def _error(grid: Grid, weight: torch.Tensor) -> torch.Tensor:
    difference = (grid.value(grid.round(weight)) - weight).abs()
    return difference.pow(_MSE_NORM).sum(dim=1)


def round_to_nearest(weight: torch.Tensor, config: QuantizationConfig) -> QuantizedMatrix:
    """Every weight by itself: the baseline. weight: [num_outputs, num_inputs]."""
    weight = weight.to(torch.float32)
    num_inputs = weight.shape[1]
    size = config.columns_per_group(num_inputs)
    grids = [find_grid(group, config) for group in weight.split(size, dim=1)]
    q = [grid.round(group) for grid, group in zip(grids, weight.split(size, dim=1), strict=True)]
    g_idx = torch.arange(num_inputs, device=weight.device) // size
    return _matrix(torch.cat(q, dim=1), grids, g_idx)


def quantize(
    weight: torch.Tensor, hessian: torch.Tensor, config: QuantizationConfig
) -> QuantizedMatrix:
    """weight: [num_outputs, num_inputs]; hessian: [num_inputs, num_inputs], of `Hessian`."""
    weight, hessian = weight.to(torch.float32).clone(), hessian.clone()
    num_inputs = weight.shape[1]
    size = config.columns_per_group(num_inputs)
    diagonal = hessian.diagonal()
    # Inputs that were always 0 have no say: any weight is right, and 0 is on every grid.
    is_dead = diagonal == 0
    diagonal[is_dead] = 1.0
    weight[:, is_dead] = 0.0
    order = torch.arange(num_inputs, device=weight.device)
    grids: list[Grid] = []
    if config.static_groups:
        grids = [find_grid(group, config) for group in weight.split(size, dim=1)]
    if config.desc_act:
        order = torch.argsort(diagonal, descending=True, stable=True)
        weight, hessian = weight[:, order], hessian[order][:, order]
    groups = order // size if config.static_groups else torch.arange(num_inputs) // size
    factor = _inverse_factor(hessian, config.damp_percent)
    q = torch.empty_like(weight)
    group_ids = groups.tolist()
    for start in range(0, num_inputs, _BLOCK):
        columns = range(start, min(start + _BLOCK, num_inputs))
        errors = _quantize_block(weight, factor, columns, group_ids, grids, config, q)
        end = columns.stop
        weight[:, end:] -= errors @ factor[start:end, end:]
    restored = torch.argsort(order)
    return _matrix(q[:, restored], grids, groups.to(weight.device)[restored])


def _quantize_block(
    weight: torch.Tensor,
    factor: torch.Tensor,
    columns: range,
    group_ids: list[int],
    grids: list[Grid],
    config: QuantizationConfig,
    q: torch.Tensor,
) -> torch.Tensor:
    """Round the columns of a block in turn; mutates them in weight and q, and appends to grids.

    Returns each column's error over its diagonal, [num_outputs, columns], by which all columns
    behind the block are still to be changed.
    """
    start, end = columns.start, columns.stop
    errors = weight.new_empty(len(weight), len(columns))
    for column in columns:
        if group_ids[column] == len(grids):
            last = column + config.columns_per_group(weight.shape[1])
            # Of a group that reaches over the block, a part has missed the block's changes so far.
            missed = errors[:, : column - start] @ factor[start:column, end:last]
            members = weight[:, column : min(end, last)], weight[:, end:last] - missed
            grids.append(find_grid(torch.cat(members, dim=1), config))
        grid, value = grids[group_ids[column]], weight[:, column]
        q[:, column] = grid.round(value)
        error = (value - grid.value(q[:, column])) / factor[column, column]
        weight[:, column:end] -= torch.outer(error, factor[column, column:end])
        errors[:, column - start] = error
    return errors


def _inverse_factor(hessian: torch.Tensor, damp_percent: float) -> torch.Tensor:
    """U, upper triangular, with U^T U = H^-1.

    Row i of U holds what the inverse of H without columns 0 to i-1 has in its first row, over the
    root of its first entry: all that the columns behind i need to know, for every i at once.
    """
    diagonal = hessian.diagonal()
    diagonal += damp_percent * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed.any():
        raise ValueError(
            f"the calibration inputs give a Hessian without a Cholesky factor at damp_percent "
            f"{damp_percent}; raise it (0.1), or calibrate with more text"
        )
    inverse = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky(inverse, upper=True)


def _matrix(q: torch.Tensor, grids: list[Grid], g_idx: torch.Tensor) -> QuantizedMatrix:
    return QuantizedMatrix(
        q=q.to(torch.uint8),
        scales=torch.stack([grid.scale for grid in grids]),
        zeros=torch.stack([grid.zero for grid in grids]).to(torch.int32),
        g_idx=g_idx.to(torch.int32),
    )


def relative_error(
    weight: torch.Tensor, quantized: QuantizedMatrix, hessian: torch.Tensor
) -> float:
    """|WX - QX|² / |WX|² over the calibration inputs, by their Hessian."""
    weight = weight.to(torch.float32)
    difference = weight - quantized.dequantize().to(weight.device)
    error = ((difference @ hessian) * difference).sum()
    return (error / ((weight @ hessian) * weight).sum().clamp(min=1e-30)).item()
