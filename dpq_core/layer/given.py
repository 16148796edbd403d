"""Codes of a 4-bit checkpoint of others under a grid of ours: W4A8 without quantizing again.

GPTQ, AWQ and compressed-tensors give a weight as codes k [out, in], scales s and zero points z
[out, G], and mean s * (k - z) in 16-bit arithmetic. Our grid means s8 * inner(s4 * (k - z)) by the
same codes and zero points, so what is to be found is s8 and s4, of a product near s:

    inner: none            s8 = 1, s4 = bf16(s): exact but for that rounding
    group_scale: bf16      s8 = max(s * steps) / R, s4 = bf16(s / s8); steps = max(z, 15 - z)
    group_scale: e4m3      s8 = max(s) / 56, such that vLLM finds it again; s4 = e4m3(s / s8)

Then Ŵ8 rounds s4 * (k - z) to E4M3 (exactly where s4 has few bits: a power of two loses nothing).
With `scale_search` mse or hessian, s8 is the one of an octave under which the rounded values of a
row's codes come nearest to the given ones, weighted by diag(H) for hessian:

    min over s8, per row:  sum_j H_jj (s8 inner(s4 (k_j - z)) - s (k_j - z))²

which takes a fifth to a third off that error of normal weights (groups of 64, 9 and 24 a row). To
move s4 as well took half a percent more, and is not done.

The codes never change. That distance is what a layer's report says.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpq_core.arithmetic.affine import CODES
from dpq_core.arithmetic.formats import NumberFormat, round_to
from dpq_core.layer.grid import (
    LARGEST_GROUP_SCALE,
    Grid,
    power_of_two_above,
    raise_largest,
    separable,
    stored_scale,
)
from dpq_core.recipe.scheme import Scheme

_ROW_STEPS = tuple(2 ** (step / 16) for step in range(16))
_VALUES = CODES.steps + 1
_SEARCH_ELEMENTS = 1 << 18  # of codes' values that are tried at a time


@dataclass(frozen=True)
class GivenWeight:
    """A weight as a checkpoint of others gives it, in groups of ours. dtype: 16 bits of its
    model."""

    codes: Tensor  # [out, in] uint8, 0…15
    scale: Tensor  # [out, G] fp32
    zero_point: Tensor  # [out, G] uint8, 0…15
    group_size: int
    dtype: torch.dtype

    def to(self, device: torch.device | str) -> "GivenWeight":
        """The same weight on a device."""
        names = ("codes", "scale", "zero_point")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def decode(self) -> Tensor:
        """s * (k - z) [out, in] fp32."""
        group = torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size
        steps = self.codes.float().sub_(self.zero_point.float()[:, group])
        return steps.mul_(self.scale[:, group])

    def in_16_bits(self) -> Tensor:
        """The weight [out, in] as its model in 16 bits multiplies with it."""
        return self.decode().to(self.dtype)


def given_grid(given: GivenWeight, scheme: Scheme, importance: Tensor) -> Grid:
    """The grid of `scheme` that means by the given codes what is nearest to the given weight.

    Args:
        importance: diag(H) [in], for `scale_search: hessian`.
    """
    inner = scheme.inner_format
    if inner is None:
        ones = torch.ones_like(given.scale[:, :1])
        scale = given.scale.to(torch.bfloat16)
        return Grid(ones, scale, given.zero_point, given.group_size, None)
    row = _row_scale(given, scheme, inner)
    if scheme.scale_search != "minmax":
        columns = importance.float() if scheme.scale_search == "hessian" else None
        row = _nearest(given, row, inner, columns)
    group = stored_scale(given.scale / row, scheme)
    if scheme.group_scale == "e4m3":
        raise_largest(group, row)
    return Grid(row, group, given.zero_point, given.group_size, inner)


def _row_scale(given: GivenWeight, scheme: Scheme, inner: NumberFormat) -> Tensor:
    """s8 [out, 1]: no code of the row lies beyond the inner format."""
    if scheme.group_scale == "e4m3":
        row = given.scale.amax(1, keepdim=True) / LARGEST_GROUP_SCALE
        return separable(row, scheme.power_of_two)
    zero = given.zero_point.float()
    reach = given.scale.abs() * torch.maximum(zero, CODES.maximum - zero)
    row = reach.amax(1, keepdim=True) / inner.maximum
    if scheme.channel_scale == "tensor":
        row = row.max().expand_as(row)
    row = torch.where(row > 0, row, torch.ones_like(row))
    return power_of_two_above(row) if scheme.power_of_two else row.clone()


def _nearest(
    given: GivenWeight,
    row: Tensor,  # [out, 1] fp32
    inner: NumberFormat,
    columns: Tensor | None,  # [in] fp32; None: all alike
) -> Tensor:
    """s8 [out, 1] of the least error, from `row` to twice that."""
    best = row.clone()
    for rows in _slices(given):
        scale, zero = given.scale[rows].unsqueeze(2), given.zero_point[rows].float().unsqueeze(2)
        steps = torch.arange(_VALUES, device=row.device) - zero  # [rows, G, 16]
        weights, wanted = _weights(given, rows, columns), scale * steps
        least = torch.full_like(row[rows], torch.inf)
        for step in _ROW_STEPS:
            channel = row[rows] * step
            group = (given.scale[rows] / channel).to(torch.bfloat16).float().unsqueeze(2)
            found = round_to(group * steps, inner) * channel.unsqueeze(2)
            error = found.sub_(wanted).square_().mul_(weights).sum((1, 2)).unsqueeze(1)
            better = error < least
            least = torch.where(better, error, least)
            best[rows] = torch.where(better, channel, best[rows])
    return best


def _weights(given: GivenWeight, rows: slice, columns: Tensor | None) -> Tensor:
    """[rows, G, 16] fp32: how much each value of a code counts in a group."""
    codes = given.codes[rows]
    count, features = codes.shape
    group = torch.arange(features, device=codes.device) // given.group_size
    at = codes.long() + group * _VALUES
    counted = given.scale.new_zeros(count, given.scale.shape[1] * _VALUES)
    each = given.scale.new_ones(features) if columns is None else columns
    counted.scatter_add_(1, at, each.expand(count, features))
    found: Tensor = counted.unflatten(1, (-1, _VALUES))
    return found


def _slices(given: GivenWeight) -> Iterator[slice]:
    """Slices of rows, which bound the memory that the search takes."""
    rows = max(1, _SEARCH_ELEMENTS // max(given.codes.shape[1], given.scale.shape[1] * _VALUES))
    return (slice(start, start + rows) for start in range(0, len(given.codes), rows))
