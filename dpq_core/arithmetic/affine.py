"""4-bit codes to values and back, for one value or for all of a layer: see
`dpq_core.layer.grid`."""

from dataclasses import dataclass, replace

from torch import Tensor

from dpq_core.arithmetic.formats import FORMATS, NumberFormat, round_to

CODES = FORMATS["uint4"]


@dataclass(frozen=True)
class Affine:
    """A scale and a zero point for each value; shapes broadcast, [n, out] for n columns."""

    channel_scale: Tensor  # fp32
    group_scale: Tensor  # fp32
    zero_point: Tensor  # fp32
    inner: NumberFormat | None

    def __getitem__(self, column: int) -> "Affine":
        """The grid of one column: all [out]."""
        return replace(
            self,
            channel_scale=self.channel_scale[0],
            group_scale=self.group_scale[column],
            zero_point=self.zero_point[column],
        )

    def encode(self, weight: Tensor) -> Tensor:
        """Codes 0…15 as fp32 for 16-bit weights of the same shape."""
        steps = (weight / self.channel_scale / self.group_scale).round_()
        return steps.add_(self.zero_point).clamp_(CODES.minimum, CODES.maximum)

    def decode8(self, codes: Tensor) -> Tensor:
        """8-bit values (16-bit ones without inner format) of fp32 codes."""
        values = self.group_scale * (codes - self.zero_point)
        return round_to(values, self.inner) if self.inner else values

    def decode(self, codes: Tensor) -> Tensor:
        """Pseudo-16-bit weights of fp32 codes."""
        return self.channel_scale * self.decode8(codes)


@dataclass(frozen=True)
class ColumnGrid:
    """The grid of columns in some order, transposed: a column is a contiguous row here."""

    channel_scale: Tensor  # [1, out] fp32
    group_scale: Tensor  # [G, out] fp32
    zero_point: Tensor  # [G, out] fp32
    group: Tensor  # [n] int64, of each column
    inner: NumberFormat | None

    def __getitem__(self, columns: slice) -> Affine:
        """The grid spread over a range of columns."""
        group = self.group[columns]
        return Affine(
            self.channel_scale, self.group_scale[group], self.zero_point[group], self.inner
        )

    def part(self, columns: slice) -> "ColumnGrid":
        """The grid of a range of columns."""
        return replace(self, group=self.group[columns])

    def rows(self, rows: Tensor) -> "ColumnGrid":
        """The grid of some rows of the weight, `rows` [m] int64."""
        return replace(
            self,
            channel_scale=self.channel_scale[:, rows],
            group_scale=self.group_scale[:, rows],
            zero_point=self.zero_point[:, rows],
        )

    def encode(self, weight: Tensor) -> Tensor:
        """`Affine.encode` of all columns. [n, out]"""
        return self[:].encode(weight)

    def decode(self, codes: Tensor) -> Tensor:
        """`Affine.decode` of all columns. [n, out]"""
        return self[:].decode(codes)
