"""The values that a layer's 4-bit codes can stand for, and how their scales are chosen.

    s8  = amax(row) / R',  R' = R * 14/15        channel_scale [out, 1] fp32
    W8  = inner(W16 / s8)                        the 8-bit image of the original weight
    s4, z  from the range of W8 in each group    group_scale [out, G] bf16, zero_point [out, G]
    k   = clamp(round(w / s8 / s4) + z, 0, 15)   encode
    Ŵ16 = s8 * inner(clamp(s4 * (k - z), ±R))    decode

`inner` rounds to the 8-bit format of the arithmetic (E4M3 or INT8); for 16-bit arithmetic it is the
identity and s8 is one. The margin of 14/15 in R' keeps the affine range of the second step, which
rounding of s4 and z can widen, inside the inner format. Source: DPQ (Gafni et al.), section 3; the
storage types and the margin are DESIGN's.

`group_scale: e4m3` keeps s4 on the E4M3 grid, at most 56 = 448 / 8, so that s4 * (k - 8) stays
inside E4M3, and gives 56 to the largest group of a row. vLLM takes the product s4 * s8, stored in
BF16, apart in this way when it loads a checkpoint: the row's largest is 56 * s8, s8 no less than
1 / 28672 (its smallest scale of an FP8 value, 1 / (448 * 512), times 8), and what is left of each
product is rounded to E4M3. That gives back this s4 and this s8 where the row's largest product,
56 * s8, is a BF16 number: s8 is chosen so, or is a power of two.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpq_core.arithmetic.affine import CODES, ColumnGrid
from dpq_core.arithmetic.formats import FORMATS, NumberFormat, round_to
from dpq_core.kernels.definitions import split_groups
from dpq_core.kernels.dispatch import kernels_for
from dpq_core.recipe.scheme import Scheme

RANGE_MARGIN = 14 / 15
SYMMETRIC_ZERO_POINT = 8

LARGEST_GROUP_SCALE = FORMATS["e4m3"].maximum / 8  # of `group_scale: e4m3`
_SMALLEST_GROUP_SCALE = 2.0**-9  # the smallest E4M3 number
_LEAST_ROW_SCALE = 8 / (448 * 512)

# Shares of the full range that the shrink search tries, largest first: ties keep the range.
_SHRINK = tuple(1 - step / 64 for step in range(32))
# Of the weight at a time: what stays in a processor's cache, and what fills an accelerator.
_SEARCH_ELEMENTS, _SEARCH_ELEMENTS_ON_DEVICE = 1 << 20, 1 << 26
_BY_ROW = ("channel_scale", "group_scale", "zero_point")


@dataclass(frozen=True)
class Grid:
    """Scales of one layer. Rows are output channels, groups run along the input."""

    channel_scale: Tensor  # [out, 1] fp32
    group_scale: Tensor  # [out, G] bf16
    zero_point: Tensor  # [out, G] uint8, 0…15
    group_size: int
    inner: NumberFormat | None

    def to(self, device: torch.device | str) -> "Grid":
        """The same grid on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _BY_ROW})

    def some(self, rows: slice) -> "Grid":
        """Of these rows alone."""
        return replace(self, **{name: getattr(self, name)[rows] for name in _BY_ROW})

    def saturates(self) -> bool:
        """Whether some code of some group lies beyond the inner format's maximum."""
        if self.inner is None:
            return False
        widest = FORMATS["e4m3"] if self.inner.is_float else self.inner
        return float(round_to(self.reach(), widest)) > self.inner.maximum

    def reach(self) -> Tensor:
        """Largest magnitude that a code of some group stands for, before it is rounded. Scalar."""
        zero = self.zero_point.float()
        steps = torch.maximum(zero, CODES.maximum - zero)
        return (self.group_scale.float().abs() * steps).max()

    def at(self, columns: Tensor) -> ColumnGrid:
        """The grid of single columns, in the order given. `columns` [n] int64."""
        return ColumnGrid(
            channel_scale=self.channel_scale.T.contiguous(),
            group_scale=self.group_scale.T.float().contiguous(),
            zero_point=self.zero_point.T.float().contiguous(),
            group=columns // self.group_size,
            inner=self.inner,
        )

    def decode8(self, codes: Tensor) -> Tensor:
        """Ŵ8, or for 16-bit arithmetic s4 * (k - z). `codes` [out, in] → fp32 [out, in]."""
        columns = torch.arange(codes.shape[1], device=codes.device)
        return self.at(columns)[:].decode8(codes.T.float()).T.contiguous()

    def decode(self, codes: Tensor) -> Tensor:
        """Ŵ16, the weight that the codes stand for. `codes` [out, in] → fp32 [out, in]."""
        return self.channel_scale * self.decode8(codes)


def joined_grids(grids: Sequence[Grid]) -> Grid:
    """The rows of all, one after another."""
    rows = {name: torch.cat([getattr(grid, name) for grid in grids]) for name in _BY_ROW}
    return Grid(**rows, group_size=grids[0].group_size, inner=grids[0].inner)


def choose_grid(weight: Tensor, scheme: Scheme, importance: Tensor | None) -> Grid:
    """Scales and zero points of a layer, from its original weight (static groups).

    Args:
        weight: [out, in], any float type.
        scheme: formats, group size and search.
        importance: diag(H) [in], for `scale_search: hessian`.
    """
    weight = weight.detach().float()
    inner = scheme.inner_format
    maximum = inner.maximum * RANGE_MARGIN if inner else 1.0
    channel_scale = choose_channel_scale(weight, scheme, maximum)
    if scheme.group_scale == "e4m3":
        channel_scale = separable(channel_scale, scheme.power_of_two)
    columns = weight.new_ones(weight.shape[1])
    if scheme.scale_search == "hessian":
        if importance is None:
            raise ValueError("scale_search: hessian needs the layer's calibration statistics")
        columns = importance.float().contiguous()  # a diagonal is not
    ranges = [
        _ranges(weight[rows] / channel_scale[rows], columns, scheme) for rows in _slices(weight)
    ]
    low, high = (torch.cat(ends) for ends in zip(*ranges, strict=True))
    group_scale, zero_point = _affine(low, high, scheme)
    if scheme.group_scale == "e4m3":
        raise_largest(group_scale, channel_scale)
    return Grid(channel_scale, group_scale, zero_point.to(torch.uint8), scheme.group_size, inner)


def choose_channel_scale(weight: Tensor, scheme: Scheme, maximum: float) -> Tensor:
    """s8 [out, 1]: the largest magnitude of a row (or of the weight) meets `maximum`."""
    if scheme.inner_format is None:
        return weight.new_ones(weight.shape[0], 1)
    amax = weight.abs().amax(1, keepdim=True)
    if scheme.channel_scale == "tensor":
        amax = amax.max().expand_as(amax)
    scale = amax / maximum
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return power_of_two_above(scale) if scheme.power_of_two else scale.clone()


def power_of_two_above(scale: Tensor) -> Tensor:
    """The smallest power of two that is not below `scale`, exactly. FP32."""
    mantissa, exponent = torch.frexp(scale)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(scale), exponent)


def separable(scale: Tensor, power_of_two: bool) -> Tensor:
    """Row scales [out, 1] near `scale` that vLLM finds again in 56 * s8 rounded to BF16."""
    scale = scale.clamp(min=_LEAST_ROW_SCALE)
    if power_of_two:
        return power_of_two_above(scale)
    return (scale * LARGEST_GROUP_SCALE).to(torch.bfloat16).float() / LARGEST_GROUP_SCALE


def raise_largest(group_scale: Tensor, channel_scale: Tensor) -> None:
    """Give the largest scale of each row 56, in place; a row scale that is as small as it may be
    needs no such group."""
    largest = group_scale.float().argmax(1, keepdim=True)
    full = torch.full_like(group_scale[:, :1], LARGEST_GROUP_SCALE)
    raised = torch.where(channel_scale > _LEAST_ROW_SCALE, full, group_scale.gather(1, largest))
    group_scale.scatter_(1, largest, raised)


def _affine(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Stored scale (bf16) and zero point (fp32 integers) of ranges [low, high] that include 0."""
    width = 2 * torch.maximum(high, -low) if scheme.symmetric else high - low
    scale = stored_scale(width / CODES.steps, scheme)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if scheme.symmetric:
        return scale, torch.full_like(low, SYMMETRIC_ZERO_POINT)
    return scale, (-low / scale.float()).round().clamp(CODES.minimum, CODES.maximum)


def stored_scale(scale: Tensor, scheme: Scheme) -> Tensor:
    """Group scales in units of s8 as they are stored, bf16. Any shape."""
    if scheme.group_scale == "e4m3":
        scale = round_to(scale, FORMATS["e4m3"])
        scale = scale.clamp_(_SMALLEST_GROUP_SCALE, LARGEST_GROUP_SCALE)
    return scale.to(torch.bfloat16)


def _ranges(scaled: Tensor, importance: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Lower and upper end of each group's range [out, G], of a weight [out, in] in units of s8."""
    inner = scheme.inner_format if scheme.rounds_inside else None
    groups = split_groups(round_to(scaled, inner) if inner else scaled, scheme.group_size)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    del groups
    if scheme.scale_search == "minmax":
        return low, high
    share = _best_shrink(scaled, low, high, importance, scheme, inner)
    return low * share, high * share


def _best_shrink(
    scaled: Tensor,  # [out, in] fp32, in units of s8
    low: Tensor,  # [out, G]
    high: Tensor,  # [out, G]
    importance: Tensor,  # [in]
    scheme: Scheme,
    inner: NumberFormat | None,
) -> Tensor:
    """For each group the share of its range with the least weighted error after inner rounding."""
    shares, best = torch.ones_like(low), torch.full_like(low, torch.inf)
    group_errors = kernels_for(scaled, importance).group_errors
    for share in _SHRINK:
        scale, zero = _affine(low * share, high * share, scheme)
        error = group_errors(scaled, importance, scheme.group_size, scale.float(), zero, inner)
        better = error < best
        best = torch.where(better, error, best)
        shares[better] = share
    return shares


def _slices(weight: Tensor) -> Iterator[slice]:
    """Slices of rows, in which ranges are searched: bounds the memory that it takes."""
    elements = _SEARCH_ELEMENTS if weight.is_cpu else _SEARCH_ELEMENTS_ON_DEVICE
    rows = max(1, elements // weight.shape[1])
    return (slice(start, start + rows) for start in range(0, len(weight), rows))
