"""Codes of a layer's weight that keep its outputs, in place of the nearest ones.

For an output channel with error d = ŵ − w the squared error of its outputs is d H dᵀ, H the second
moments of what the weight is multiplied with: the patch of the input behind each pixel of the
output, of the channel's own group. The steps are the first pipeline's (`dpq_core.layer`), for any
number of bits, and for the many small problems that a depthwise convolution is, all at once:

    the column loop   (GPTQ, Frantar et al., 2023) columns are rounded one by one, and what rounding
        one adds to the error is taken off those that follow, by the inverse of H
    gradient passes   a code moves by a step δ where 2 δ (d H)_j + δ² H_jj < 0: d H dᵀ never rises
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dpq_core.convnet.grids import Codes
from dpq_core.convnet.layer import Layer

_DAMPING = 0.01  # of H's mean diagonal, added to it
_LEAST_GAIN = 1e-3  # of δ² H_jj: keeps float noise from moving codes between ties
_MOST_PASSES = 8
_PICTURES = 8  # whose patches are in memory at a time


@dataclass(frozen=True)
class Grid:
    """Of a weight [groups, out, columns]. scale, zero: [groups, out, 1] fp32."""

    scale: Tensor
    zero: Tensor
    codes: Codes

    def steps(self, weight: Tensor) -> Tensor:
        """The nearest codes, as fp32."""
        return ((weight / self.scale).round() + self.zero).clamp(self.codes.low, self.codes.high)

    def values(self, steps: Tensor) -> Tensor:
        return (steps - self.zero) * self.scale


def outputs_kept(layer: Layer, x: Tensor) -> Tensor | None:
    """The weight, as `layer.weight`, on the grid of the layer's rounding, for inputs x.

    None of a convolution that is not of two dimensions: its codes stay the nearest.
    """
    rounding, weight = layer.rounding, layer.weight.detach()
    moments = second_moments(layer, x)
    if moments is None or rounding is None or rounding.scale is None or rounding.zero is None:
        return None
    groups = len(moments)
    parts = weight.flatten(1).reshape(groups, -1, moments.shape[-1])
    scale, zero = (
        each.float().expand(len(weight)).reshape(groups, -1, 1)
        for each in (rounding.scale, rounding.zero)
    )
    return chosen(parts, Grid(scale, zero, rounding.codes), moments).reshape(weight.shape)


def second_moments(layer: Layer, x: Tensor) -> Tensor | None:
    """H of a layer for its input: [groups, columns, columns] fp32, a mean over pixels."""
    if not layer.convolution:
        rows = x.reshape(1, -1, x.shape[-1])
        return rows.mT @ rows / rows.shape[1]
    if layer.weight.dim() != 4:
        return None
    stride, pads, dilation, groups = _geometry(layer)
    total, count = torch.zeros(()), 0
    for some in functional.pad(x, pads).split(_PICTURES):
        patches = functional.unfold(some, layer.weight.shape[2:], dilation, 0, stride)
        rows = patches.reshape(len(some), groups, -1, patches.shape[-1])
        rows = rows.permute(1, 2, 0, 3).flatten(2)  # [groups, columns, pixels]
        total = total + rows @ rows.mT
        count += rows.shape[-1]
    return total / count


def chosen(weight: Tensor, grid: Grid, moments: Tensor) -> Tensor:
    """The rounded weight.

    Args:
        weight: [groups, out, columns] fp32. moments: [groups, columns, columns] fp32.
    """
    moments = moments.clone()
    diagonal = moments.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    diagonal += _DAMPING * mean + (mean == 0)  # a group of zeros: any codes do
    steps = _column_loop(weight, grid, moments)
    _gradient_passes(steps, weight, grid, moments)
    return grid.values(steps)


def _column_loop(weight: Tensor, grid: Grid, moments: Tensor) -> Tensor:
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    factor = torch.linalg.cholesky(inverse, upper=True)  # [groups, columns, columns]
    left, steps = weight.clone(), torch.empty_like(weight)
    for column in range(weight.shape[2]):
        here = left[:, :, column : column + 1]
        found = grid.steps(here)
        steps[:, :, column : column + 1] = found
        error = (here - grid.values(found)) / factor[:, column, column, None, None]
        left[:, :, column + 1 :] -= error * factor[:, column, None, column + 1 :]
    return steps


def _gradient_passes(steps: Tensor, weight: Tensor, grid: Grid, moments: Tensor) -> None:
    """Until one moves nothing; changes steps."""
    gradient = (grid.values(steps) - weight) @ moments
    for _ in range(_MOST_PASSES):
        moved = 0
        for column in range(weight.shape[2]):
            here = steps[:, :, column : column + 1]
            slope, bend = gradient[:, :, column : column + 1], moments[:, column, column]
            gain = 2 * slope.abs() / grid.scale - (1 + _LEAST_GAIN) * bend[:, None, None]
            after = torch.where(gain > 0, here - slope.sign(), here)
            change = after.clamp(grid.codes.low, grid.codes.high) - here
            if count := int(change.count_nonzero()):
                gradient += change * grid.scale * moments[:, column, None, :]
                steps[:, :, column : column + 1] += change
                moved += count
        if not moved:
            break


def _geometry(layer: Layer) -> tuple[tuple[int, ...], list[int], tuple[int, ...], int]:
    """Stride, all padding in `functional.pad`'s order, dilation, groups."""
    defaults: Sequence[Any] = (1, 0, 1, 1)
    stride, padding, dilation, groups = (*layer.rest, *defaults[len(layer.rest) :])
    high, wide = layer.weight.shape[2:]
    if padding == "same":
        down, right = (d * (n - 1) for d, n in zip(_two(dilation), (high, wide), strict=True))
        pads = [right // 2, right - right // 2, down // 2, down - down // 2]
    else:
        down, right = _two(0 if padding == "valid" else padding)
        pads = [right, right, down, down]
    for place, more in enumerate(layer.pads):
        pads[place] += more
    return _two(stride), pads, _two(dilation), int(groups)


def _two(value: Any) -> tuple[int, ...]:
    found = (value,) if isinstance(value, int) else tuple(value)
    return found * (2 // len(found))
